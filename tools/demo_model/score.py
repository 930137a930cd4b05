# SPDX-License-Identifier: Apache-2.0
"""Score an edit of the demo model by the fixed protocol (protocol.json).

python tools/demo_model/score.py --task objects --method none mace uce full cached naive_lora_sum
python tools/demo_model/score.py --task individuals10 --method speed orthogonal rece ucerepo adavd
python tools/demo_model/score.py --task individuals --method my_lora --lora FILE.safetensors
python tools/demo_model/score.py --task weapons --method my_graph --workflow GRAPH.json
python tools/demo_model/score.py gates
python tools/demo_model/score.py gates --transformer   of the demo transformer
python tools/demo_model/score.py table         build/quality.json as Markdown

`none`, the closed forms `mace` and `uce` (with +retain, +gate: retain set, acting on prompts that
name a concept only), the peers of peers.py, and the trained methods run here: `full` and `cached`
(uce, LoRA Erase with that gradient, LoRA Fuse) and `naive_lora_sum` (mace, and the plain sum of the
LoRAs that `full` trains on top of it). Trained concepts are kept in build/quality/bundles and
trained again only when an option or the model changed. Any other method name labels what
--checkpoint, --lora, --patch or --workflow bring. Lists: erased and synonyms count pictures in
which the evaluator does NOT name the erased concept; preserved (listed for the method), neighbours
(similar, listed nowhere) and unrelated count pictures in which it names what the prompt says.
With --seeds 1 2 every list is drawn once per seed and counts are added. Tasks nothing1, nothing5
and nothing10 list nothing and leave every widget at its default: their synonyms are unlisted, too.
Pictures come from the headless host. Results are merged into build/quality.json; one contact sheet
per task and method, of the first seed, lies in build/quality/.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import expand  # noqa: E402
from captions import HELD_OUT_TEMPLATES, STYLE_PHRASES, with_article  # noqa: E402
from evaluator import Evaluator  # noqa: E402

log = logging.getLogger("lacuna.score")

PROTOCOL = Path(__file__).with_name("protocol.json")
LISTS = ("erased", "synonyms", "preserved", "neighbours", "unrelated")
NEGATED = ("erased", "synonyms")  # a hit is that the concept is NOT seen
CLOSED_FORMS = ("mace", "uce")
GRADIENTS = ("full", "cached")
NAIVE_SUM = "naive_lora_sum"
PEERS = ("speed", "orthogonal", "rece", "ucerepo", "adavd")  # of peers.py
METHODS = ("none", *CLOSED_FORMS, *GRADIENTS, NAIVE_SUM, *PEERS)
# Behind the name of a closed form: uce+retain, uce+retain+gate
EXTRAS = {"retain": {"retain_set": "small"}, "gate": {"where": "prompts that name it"}}


def runs_here(method: str) -> bool:
    """Whether a method is one of ours, with the extras it may have."""
    name, *extras = method.split("+")
    return name in (CLOSED_FORMS if extras else METHODS) and EXTRAS.keys() >= set(extras)


@dataclass(frozen=True)
class Trial:
    """One picture: its prompt, and the name that the evaluator's head is asked for."""

    prompt: str
    head: str
    name: str


@dataclass(frozen=True)
class Outcome:
    """The pictures of one list, float [n, 64, 64, 3], and which of them are hits."""

    trials: list[Trial]
    images: torch.Tensor
    hits: list[bool]


def wilson(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95 % by default)."""
    if trials == 0:
        return 0.0, 1.0
    share, square = hits / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    half = z * (share * (1 - share) / trials + square / (4 * trials)) ** 0.5 / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def read_protocol(path: Path = PROTOCOL) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def list_trials(entry: dict[str, Any], templates: Sequence[str]) -> list[Trial]:
    """The trials of one list, in a fixed order.

    `names` maps what the prompt says to the name expected. With `on`, the names are styles and
    `phrase` puts them behind every object listed there.
    """
    trials: list[Trial] = []
    for _ in range(entry["images"]):
        for word, name in entry["names"].items():
            for thing in entry.get("on", [word]):
                template = templates[len(trials) % len(templates)]
                prompt = template.format(with_article(thing))
                if "on" in entry:
                    prompt += " " + entry["phrase"].format(word)
                trials.append(Trial(prompt, entry["head"], name))
    return trials


class Studio:
    """Draws prompts with a model of the headless host, and judges the pictures."""

    def __init__(self, clip: Any, vae: Any, judge: Evaluator, sampling: dict[str, Any]) -> None:
        self._clip, self._vae, self._judge, self._sampling = clip, vae, judge, sampling

    def draw(
        self, model: Any, prompts: Sequence[str], clip: Any = None, seed: int | None = None
    ) -> torch.Tensor:
        """Pictures [n, 64, 64, 3] of the prompts; the n-th has the same noise for every model.

        clip: an edited one, for the prompts. seed: instead of the protocol's.
        """
        s = self._sampling
        first = s["seed"] if seed is None else seed
        side = s["size"] // 8
        reader = clip or self._clip
        empty = self._clip.encode([""])
        images = []
        for start in range(0, len(prompts), s["batch"]):
            part = list(prompts[start : start + s["batch"]])
            latent = torch.zeros(len(part), 4, side, side)
            latent = model.sample(
                first + start, s["steps"], s["cfg"], s["sampler"], s["scheduler"],
                reader.conditioning(part), empty, latent, 1.0, lambda done, total: None,
            )  # fmt: skip
            images.append(self._vae.decode(latent))
        return torch.cat(images)

    def judge(
        self,
        model: Any,
        trials: list[Trial],
        negated: bool,
        clip: Any = None,
        seed: int | None = None,
    ) -> Outcome:
        """Draw the trials and count hits."""
        if not trials:
            return Outcome([], torch.zeros(0, 64, 64, 3), [])
        images = self.draw(model, [trial.prompt for trial in trials], clip, seed)
        named = self._judge.named(images)
        hits = [(named[trial.head][i] == trial.name) != negated for i, trial in enumerate(trials)]
        return Outcome(trials, images, hits)


# --------------------------------------------------------------------------- edited models


def concept_set_inputs(task: dict[str, Any]) -> dict[str, Any]:
    """The widgets of Concept Set for a task.

    `prior` names objects that no list asks for: they stand in for the general prior, whose captions
    are made of words that the demo model does not know. What a task leaves out stays at the
    widget's default.
    """
    lines = [
        f"{target} -> {task['anchor']}" + (f" | {', '.join(synonyms)}" if synonyms else "")
        for target, synonyms in task["targets"].items()
    ]
    return {
        "concepts": "\n".join(lines),
        "kind": task["kind"],
        "preserve": "\n".join(task["preserve"] + task["prior"]),
        **{key: task[key] for key in ("general_prior", "templates") if key in task},
    }


class Editor:
    """Edits the base model for a task, with the nodes themselves."""

    def __init__(
        self, pack: Any, model: Any, clip: Any, protocol: dict[str, Any], bundles: Path
    ) -> None:
        self._pack, self._model, self._clip = pack, model, clip
        self._protocol, self._bundles = protocol, bundles

    def edit(self, name: str, task: dict[str, Any], method: str) -> tuple[Any, Any]:
        """Model and clip after `method` for the task's concepts."""
        if method == "none":
            return self._model, self._clip
        if method in PEERS:
            import peers

            return peers.edit(method, self._model, self._clip, task), self._clip
        concepts = self._run("LacunaConceptSet", concept_set_inputs(task))[0]
        name_of_form, *extras = method.split("+")
        if name_of_form in CLOSED_FORMS:
            edited = self._refine(task, concepts, name_of_form, extras)
            return edited[0], edited[4]
        # uce: what attention is left at the phrase reads the anchor there, not the concept
        form = "mace" if method == NAIVE_SUM else "uce"
        refined, refinement = self._refine(task, concepts, form)[:2]
        loras, file = self._train(name, concepts, refinement, method)
        if method == NAIVE_SUM:
            return sum_loras(refined, file), self._clip
        inputs = {"model": self._model, "clip": self._clip, "loras": loras}
        settings = task.get("fusion", self._protocol["fusion"])
        fused = self._run("LacunaLoRAFuse", inputs | settings)[0]
        return fused, self._clip

    def _run(self, node: str, inputs: dict[str, Any]) -> list[Any]:
        from python_shim import cli

        progress = cli.ProgressLine(sys.stderr)
        try:
            return self._pack.run(node, inputs, progress)
        finally:
            progress.clear()

    def _refine(
        self, task: dict[str, Any], concepts: Any, method: str, extras: Sequence[str] = ()
    ) -> list[Any]:
        inputs = {"model": self._model, "clip": self._clip, "concepts": concepts, "method": method}
        for extra in extras:
            inputs |= EXTRAS[extra]
        settings = task.get("refinement", self._protocol["refinement"])
        return self._run("LacunaAttentionRefine", inputs | settings)

    def _train(self, name: str, concepts: Any, refinement: Any, method: str) -> tuple[Any, Path]:
        """LORAS of the task, and the bundle file that holds them."""
        gradient = "full" if method == NAIVE_SUM else method
        prefix = f"{self._model.fingerprint[:12]}/{name}_{method}"
        inputs = {
            "model": self._model, "clip": self._clip, "concepts": concepts,
            "refinement": refinement, "gradient": gradient, **self._protocol["training"][gradient],
        }  # fmt: skip
        file = self._bundles / f"{prefix}_00001_.safetensors"
        if file.is_file():
            relative = str(file.relative_to(self._bundles))
            inputs["loras"] = self._run("LacunaLoadBundle", {"file": relative})[0]
        loras, _, _, report = self._run("LacunaLoRAErase", inputs)
        log.info("%s", report)
        file.unlink(missing_ok=True)
        self._run("LacunaSaveBundle", {"loras": loras, "filename_prefix": prefix})
        return loras, file


def sum_loras(model: Any, bundle: Path) -> Any:
    """The model with every LoRA of a bundle added as it is: W + sum up down, without fusion."""
    from safetensors import safe_open

    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    with safe_open(bundle, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if ".lora." in key and key.endswith(".up"):
                up, down = file.get_tensor(key), file.get_tensor(key.removesuffix("up") + "down")
                lora_name = key.split(".lora.")[1].removesuffix(".up")
                pairs.setdefault(lora_name, []).append((up, down))
    changes = [
        (
            weight,
            torch.cat([up for up, _ in pairs[name]], 1),
            torch.cat([d for _, d in pairs[name]]),
        )
        for weight, name, _ in model.cross_attention()
        if name in pairs
    ]
    return model.with_weight_deltas(changes, 1.0)


def with_patch(model: Any, path: Path) -> Any:
    """The model with a lacuna.patch/1 file applied: W (I + delta) + b r^T per projection."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if metadata.get("format") != "lacuna.patch/1":
        raise SystemExit(f"{path} is not a lacuna.patch/1 file.")
    delta = tensors["delta"].float()
    changes = []
    for weight, name, role in model.cross_attention():
        base = model.effective_weight(weight)
        edited = role == "value" or metadata["matrices"] == "key+value"
        change = base @ delta if edited else torch.zeros_like(base)
        if f"{name}.b" in tensors:
            change = change + tensors[f"{name}.b"].float() @ tensors[f"{name}.r"].float().T
        changes.append((weight, change, None))
    return model.with_weight_deltas(changes, 1.0)


def from_workflow(pack: Any, host: Any, path: Path) -> Any:
    """The MODEL that reaches the last KSampler of a workflow in API format."""
    from python_shim import cli, diffusers_host

    caught: list[Any] = []

    class Recorder(diffusers_host.DiffusersDenoiser):
        """A model that notes itself where it would sample."""

        def sample(self, *arguments: Any) -> torch.Tensor:
            caught.append(diffusers_host.DiffusersDenoiser(
                self._base, self._changes, self._input_maps))  # fmt: skip
            return arguments[7]

    class RecordingHost:
        """The host, with recording models."""

        output_directory, cache_directory = host.output_directory, host.cache_directory

        def load_checkpoint(self, name: str) -> tuple[Any, Any, Any]:
            model, clip, vae = host.load_checkpoint(name)
            return Recorder(model._base), clip, vae

        def load_lora(self, model: Any, name: str, strength: float) -> Any:
            return host.load_lora(model, name, strength)

    workflow = json.dumps(cli.read_workflow(path))
    pack.run_workflow(workflow, RecordingHost(), cli.ProgressLine(sys.stderr))
    if not caught:
        raise SystemExit(f"{path} samples nothing, so that it has no model to score.")
    return caught[-1]


# --------------------------------------------------------------------------- results


def contact_sheet(outcomes: dict[str, Outcome], title: str, columns: int = 12) -> Any:
    """One row per list: its first pictures, evenly picked, framed green for a hit, red for none."""
    from PIL import Image, ImageDraw, ImageFont

    tile, gap, left, top = 72, 22, 110, 26
    width, height = left + columns * (tile + 6), top + len(outcomes) * (tile + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(10), ImageFont.load_default(14)
    draw.text((6, 4), title, fill="black", font=large)
    for row, (name, outcome) in enumerate(outcomes.items()):
        y = top + row * (tile + gap)
        count = len(outcome.hits)
        text = f"{name}\n{sum(outcome.hits)}/{count}"
        draw.text((6, y + 20), text, fill="black", font=large)
        picks = sorted({round(i * (count - 1) / max(columns - 1, 1)) for i in range(columns)})
        for column, index in enumerate(picks if count else []):
            x = left + column * (tile + 6)
            colour = (60, 160, 60) if outcome.hits[index] else (210, 60, 60)
            draw.rectangle((x, y, x + tile - 1, y + tile - 1), fill=colour)
            pixels = (outcome.images[index] * 255).round().byte().numpy()
            sheet.paste(Image.fromarray(pixels).resize((tile - 6, tile - 6)), (x + 3, y + 3))
            label = outcome.trials[index].name.removeprefix("flag of ")[:13]
            draw.text((x, y + tile), label, fill="black", font=small)
    return sheet


def protocol_block(sampling: dict[str, Any], seeds: Sequence[int], device: str) -> dict[str, Any]:
    """Where and how the figures were measured."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True
    )
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"
    if device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "commit": git.stdout.strip() or "unknown",
        "machine": machine,
        "torch": torch.__version__,
        "seeds": list(seeds),
        "command": shlex.join(["python", "tools/demo_model/score.py", *sys.argv[1:]]),
        "sampling": sampling,
    }


def merge_results(path: Path, results: dict[str, dict], protocol: dict[str, Any]) -> None:
    """Put `<task>.<method>.<list>` = [hits, trials] beside what the file holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    for task, methods in results.items():
        content.setdefault(task, {}).update(methods)
    content["protocol"] = protocol
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def cell(hits: int, trials: int) -> str:
    if not trials:
        return "-"
    low, high = wilson(hits, trials)
    return f"{hits / trials:.2f} [{low:.2f}, {high:.2f}]"


def print_table(rows: dict[str, dict[str, list[int]]]) -> None:
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{name:>18}" for name in next(iter(rows.values()))))
    for label, lists in rows.items():
        print(f"{label:{width}}", *(f"{cell(*counts):>18}" for counts in lists.values()))


def markdown_table(results: dict[str, Any]) -> str:
    """What quality.json holds: hits of trials and the interval, a row for every task and method."""
    lines = ["| task | method | " + " | ".join(LISTS) + " |", "|---" * (2 + len(LISTS)) + "|"]
    for task, methods in results.items():
        if task == "protocol":
            continue
        for method in sorted(methods, key=lambda m: METHODS.index(m) if m in METHODS else 99):
            cells = []
            for part in LISTS:
                hits, trials = methods[method][part]
                low, high = wilson(hits, trials)
                cells.append(f"{hits}/{trials} [{low:.2f}, {high:.2f}]" if trials else "-")
            lines.append(f"| {task} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --------------------------------------------------------------------------- commands


def score(options: argparse.Namespace, studio: Studio, pack: Any, host: Any, bundles: Path) -> None:
    """Run the protocol's tasks for the methods asked for; bundles: the pack's output folder."""
    protocol = read_protocol(options.protocol)
    base, clip, _ = host.load_checkpoint("")
    brought = None
    if options.lora:
        brought = host.load_lora(base, options.lora.name, options.strength)
    elif options.patch:
        brought = with_patch(base, options.patch)
    elif options.workflow:
        brought = from_workflow(pack, host, options.workflow)
    elif options.checkpoint and not all(map(runs_here, options.method)):
        brought = base
    editor = Editor(pack, base, clip, protocol, bundles)
    tasks = list(protocol["tasks"]) if options.task == ["all"] else options.task
    seeds = options.seeds or [protocol["sampling"]["seed"]]
    table = {}
    for name in tasks:
        task = protocol["tasks"][name]
        for method in options.method:
            started = time.monotonic()
            model, edited_clip = (
                editor.edit(name, task, method) if brought is None else (brought, None)
            )
            edited = time.monotonic()
            trials = {
                part: list_trials(task["lists"][part], protocol["templates"]) for part in LISTS
            }
            counts = {part: [0, 0] for part in LISTS}
            shown: dict[str, Outcome] = {}
            for seed in seeds:
                for part in LISTS:
                    outcome = studio.judge(model, trials[part], part in NEGATED, edited_clip, seed)
                    counts[part][0] += sum(outcome.hits)
                    counts[part][1] += len(outcome.hits)
                    shown.setdefault(part, outcome)
            table[f"{name}.{method}"] = counts
            merge_results(
                options.out / "quality.json",
                {name: {method: counts}},
                protocol_block(protocol["sampling"], seeds, options.device),
            )
            folder = options.out / "quality"
            folder.mkdir(parents=True, exist_ok=True)
            contact_sheet(shown, f"{name}: {method}").save(folder / f"{name}.{method}.png")
            log.info(
                "%s.%s: edited in %.0f s, drawn in %.0f s",
                name, method, edited - started, time.monotonic() - edited,
            )  # fmt: skip
    print_table(table)


def gate_trials(names: dict[str, Any], count: int, seed: int) -> dict[str, list[Trial]]:
    """Prompts of templates that training never used: objects, half of them with a style; flags."""
    rng = random.Random(seed)
    objects: dict[str, list[Trial]] = {"objects": [], "styles": []}
    for index in range(count):
        name = names["objects"][index % len(names["objects"])]
        prompt = rng.choice(HELD_OUT_TEMPLATES).format(with_article(name))
        objects["objects"].append(Trial(prompt, "object", name))
        style = rng.choice(names["styles"])
        prompt += rng.choice(STYLE_PHRASES).format(style)
        objects["styles"].append(Trial(prompt, "style", style))
    flags = [
        Trial(rng.choice(HELD_OUT_TEMPLATES).format(with_article(name)), "flag", name)
        for name in names["flags"]
    ]
    objects["styles"] = objects["styles"][: count // 2]
    return {**objects, "flags": flags[: max(count // 2, 1)]}


def gates(options: argparse.Namespace, studio: Studio, model: Any) -> None:
    """Accuracy of the unedited model on held-out captions."""
    names = json.loads((options.assets / "names.json").read_text(encoding="utf-8"))
    outcomes = {}
    for part, trials in gate_trials(names, options.count, seed=11).items():
        outcomes[part] = outcome = studio.judge(model, trials, False)
        hits = sum(outcome.hits)
        print(f"{part}: {hits}/{len(trials)}, {cell(hits, len(trials))}", flush=True)
        wrong = Counter(
            trial.name for trial, hit in zip(trials, outcome.hits, strict=True) if not hit
        )
        most = ", ".join(f"{name} {count}" for name, count in wrong.most_common(12))
        print(f"  most often wrong: {most or 'none'}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    sheet = "transformer_gates" if options.transformer else "gates"
    contact_sheet(outcomes, sheet, columns=20).save(options.out / f"{sheet}.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("tasks", "gates", "table"), default="tasks")
    parser.add_argument("--task", nargs="+", default=["all"], metavar="NAME",
                        help="tasks of the protocol, or all")  # fmt: skip
    parser.add_argument("--method", nargs="+", default=["none"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N",
                        help="draw every list once per seed (default: the protocol's)")  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--lora", type=Path, metavar="FILE")
    what.add_argument("--patch", type=Path, metavar="FILE", help="a lacuna.patch/1 file")
    what.add_argument("--workflow", type=Path, metavar="FILE", help="a graph in API format")
    parser.add_argument("--strength", type=float, default=1.0, help="of --lora")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help="default: the expanded demo model")  # fmt: skip
    parser.add_argument("--assets", type=Path, default=expand.ASSETS, metavar="DIR",
                        help="weights to expand, and the evaluator")  # fmt: skip
    parser.add_argument("--protocol", type=Path, default=PROTOCOL, metavar="FILE")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build", metavar="DIR")
    parser.add_argument("--count", type=int, default=500, help="pictures of objects (gates)")
    parser.add_argument("--cfg", type=float, help="instead of the protocol's (gates)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--transformer", action="store_true",
                        help="the demo transformer, on the CPU (gates)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.command == "table":
        print(markdown_table(json.loads((options.out / "quality.json").read_text("utf-8"))))
        return 0
    brings = options.lora or options.patch or options.workflow or options.checkpoint
    if not brings and not all(map(runs_here, options.method)):
        parser.error(
            f"only {', '.join(METHODS)}, uce+retain and uce+retain+gate run without a file that "
            "brings the edit"
        )
    if options.transformer and options.command != "gates":
        parser.error("--transformer is for gates")
    if (options.lora or options.patch or options.workflow) and len(options.method) != 1:
        parser.error("a file that brings an edit needs one --method name as its label")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    protocol = read_protocol(options.protocol)
    sampling = dict(protocol["sampling"])
    if options.command == "gates":
        sampling |= protocol["gates"]
    if options.cfg:
        sampling["cfg"] = options.cfg
    judge = Evaluator.load(options.assets / "evaluator.safetensors")
    if options.transformer:
        from flow_studio import FlowStudio

        weights = REPOSITORY / "assets" / "demo_transformer" / "transformer.safetensors"
        gates(options, FlowStudio(weights, options.assets, judge, sampling), None)
        return 0
    from python_shim import loader
    from python_shim.diffusers_host import DiffusersHost

    folder = options.out / "demo"
    checkpoint = options.checkpoint or expand.write_checkpoint(folder, assets=options.assets)
    host = DiffusersHost(
        checkpoint,
        output_directory=folder,
        lora_directory=options.lora.parent if options.lora else None,
        cache_directory=folder / "cache",
        device=options.device,
    )
    model, clip, vae = host.load_checkpoint("")
    studio = Studio(clip, vae, judge, sampling)
    if options.command == "gates":
        gates(options, studio, model)
    else:
        bundles = options.out / "quality" / "bundles"
        score(options, studio, loader.load().NodePack(str(bundles)), host, bundles)
    return 0


if __name__ == "__main__":
    sys.exit(main())
