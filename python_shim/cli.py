# SPDX-License-Identifier: Apache-2.0
"""The command line `lacuna`: run a ComfyUI workflow, or judge an erasure, without ComfyUI."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .errors import HostError, brief, read_text

if TYPE_CHECKING:
    import torch

OK, FAILED, INTERRUPTED = 0, 1, 130


class ProgressLine:
    """One line on a terminal, overwritten in place; a line now and then in a log file."""

    _TERMINAL_SECONDS, _LOG_SECONDS = 0.1, 10.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._interval = self._TERMINAL_SECONDS if self._terminal else self._LOG_SECONDS
        self._shown_at = time.monotonic() if not self._terminal else 0.0
        self._width = 0
        self._count = self._line = ""

    def report(self, done: int, total: int) -> None:
        self._count = f"{done}/{total} ({100 * done // max(total, 1)} %)"
        self._show(finished=done >= total)

    def status(self, line: str) -> None:
        self._line = line
        self._show()

    def preview(self, image: torch.Tensor) -> None:
        """A terminal shows no pictures."""

    def _show(self, finished: bool = False) -> None:
        now = time.monotonic()
        due = now - self._shown_at >= self._interval
        if not due and not (self._terminal and finished):
            return
        self._shown_at = now
        text = "  ".join(part for part in (self._count, self._line) if part)
        if self._terminal:
            # a longer line would wrap, and not be overwritten
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def check(self) -> None:
        """Entering this function is what lets Python notice Ctrl-C during native work."""

    def clear(self) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def read_workflow(path: Path) -> dict[str, Any]:
    """Its nodes by id: each has a class_type, inputs and, in _meta, perhaps a title."""
    text = read_text(path, missing="There is no workflow file {}.")
    try:
        workflow = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HostError(f"{path} is not valid JSON ({brief(error)}).") from None
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        raise HostError(
            f"{path} is in ComfyUI's save format; export the workflow with File > Export (API) "
            "and run that file."
        )
    nodes = workflow.values() if isinstance(workflow, dict) else []
    if not nodes or not all(map(_is_node, nodes)):
        raise HostError(
            f"{path} is not a workflow in ComfyUI's API format; export it with File > Export (API)."
        )
    return workflow


def _is_node(node: object) -> bool:
    return (
        isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs", {}), dict)
        and isinstance(node.get("_meta", {}), dict)
    )


def apply_setting(workflow: dict[str, Any], setting: str) -> None:
    """NODE.INPUT=VALUE, where NODE is an id, a title or a node type that occurs once."""
    target, equals, text = setting.partition("=")
    name, dot, key = target.rpartition(".")
    if not equals or not dot or not name or not key:
        raise HostError(
            f'"{setting}" is not a setting; write NODE.INPUT=VALUE, for example --set 3.seed=7.'
        )
    node = workflow[_find_node(workflow, name)]
    inputs = node.setdefault("inputs", {})
    defaults = {item["id"]: item["default"] for item in _widgets(node["class_type"])}
    if key not in inputs and key in defaults:  # a workflow of an earlier version
        inputs[key] = defaults[key]
    if key not in inputs:
        known = ", ".join(dict.fromkeys([*inputs, *defaults])) or "none"
        raise HostError(
            f'Node {name} ({node["class_type"]}) has no input "{key}" in this workflow; '
            f"it has: {known}."
        )
    if isinstance(inputs[key], list):
        raise HostError(
            f'The input "{key}" of node {name} is linked to another node, so that it cannot be set.'
        )
    if not isinstance(inputs[key], str | int | float):
        raise HostError(f'The input "{key}" of node {name} holds no text and no number to set.')
    inputs[key] = _convert(text, inputs[key], target)


def _find_node(workflow: dict[str, Any], name: str) -> str:
    if name in workflow:
        return name
    matches = [
        node_id
        for node_id, node in workflow.items()
        if name in (node["class_type"], node.get("_meta", {}).get("title"))
    ]
    if len(matches) == 1:
        return matches[0]
    titles = {k: node.get("_meta", {}).get("title") for k, node in workflow.items()}
    known = ", ".join(
        f"{k} ({titles[k] or workflow[k]['class_type']})" for k in matches or workflow
    )
    problem = "Several nodes are" if matches else "No node is"
    raise HostError(f'{problem} called "{name}"; use one of these ids: {known}.')


def _convert(text: str, present: object, target: str) -> object:
    """`text` as the type that the workflow has now; \\n in a text input makes a new line."""
    if isinstance(present, str):
        return text.replace("\\n", "\n")
    try:
        if isinstance(present, bool):
            return {"true": True, "false": False}[text.lower()]
        number = (
            int(text) if isinstance(present, int) and text.lstrip("+-").isdigit() else float(text)
        )
        if math.isfinite(number):
            return number
        raise ValueError
    except (KeyError, ValueError, OverflowError):
        kind = "true or false" if isinstance(present, bool) else "a number"
        raise HostError(f'{target} needs {kind}, not "{brief(text)}".') from None


def _run(options: argparse.Namespace) -> int:
    workflow = read_workflow(options.workflow)
    for setting in options.set:
        apply_setting(workflow, setting)

    from . import loader

    native = loader.load()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a model hub
    from .diffusers_host import DiffusersHost

    _make_folder(options.output)
    host = DiffusersHost(
        options.checkpoint,
        output_directory=options.output,
        lora_directory=options.lora_dir,
        device=options.device,
    )
    progress = ProgressLine(sys.stderr)
    try:
        results = native.NodePack().run_workflow(json.dumps(workflow), host, progress)
    finally:
        progress.clear()
    _print_results(results, sys.stdout)
    return OK


def _print_results(results: dict[str, dict[str, list[str]]], stream: TextIO) -> None:
    shown = set()
    for entry in results.values():
        for text in entry.get("text", []):
            if text not in shown:  # a report also passes through the node that previews it
                stream.write(f"{text}\n")
            shown.add(text)
        for path in [*entry.get("images", []), *entry.get("files", [])]:
            stream.write(f"{path}\n")
    stream.flush()


def _evaluate(options: argparse.Namespace) -> int:
    """Base and edited model side by side: report.html, report.json and the sheet as pictures."""
    if options.edited and options.strength is not None:
        raise HostError(
            "--strength scales the LoRA of --lora, and --edited is a whole model; leave it out."
        )
    concept_text = read_text(options.concepts)
    prompt_file = Path(options.prompt_file)
    from . import loader
    from .detector import load_detector

    native = loader.load()
    # What can be wrong is told before anything large is loaded.
    pack = native.NodePack(str(options.output), str(prompt_file.parent))
    inputs = {"concepts": concept_text, "kind": options.kind}
    if options.preserve:
        inputs["preserve"] = read_text(options.preserve)
    concepts, *_, understood = pack.run("LacunaConceptSet", inputs)
    widgets = {item["id"]: getattr(options, item["id"]) for item in _widgets(_EVALUATE)}
    widgets["prompt_file"] = prompt_file.name
    pack.validate(_EVALUATE, widgets)
    detector = load_detector(options.detector) if options.detector else None

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a model hub
    from .diffusers_host import DiffusersHost

    base_host = DiffusersHost(
        options.checkpoint,
        lora_directory=options.lora.parent if options.lora else None,
        device=options.device,
    )
    edited_host = None if options.lora else DiffusersHost(options.edited, device=options.device)
    base, clip, vae = base_host.load_checkpoint("")
    if edited_host is None:
        strength = 1.0 if options.strength is None else options.strength
        edited = base_host.load_lora(base, options.lora.name, strength)
    else:
        edited = edited_host.load_checkpoint("")[0]
    links = {
        "base_model": base, "erased_model": edited, "clip": clip, "vae": vae, "concepts": concepts,
        "detector": detector,
    }  # fmt: skip
    _make_folder(options.output)
    sys.stderr.write(f"{understood}\n")
    progress = ProgressLine(sys.stderr)
    try:
        sheet, report, *_, verdict, harder = pack.run(_EVALUATE, links | widgets, progress)
    finally:
        progress.clear()

    pages = [options.output / f"sheet_{number}.png" for number in range(1, len(sheet) + 1)]
    for page, path in zip(sheet, pages, strict=True):
        native.save_png(page, str(path))
    html = native.evaluation_html(report, [path.read_bytes() for path in pages])
    _write_text(options.output / "report.json", report)
    _write_text(options.output / "report.html", html)
    _write_text(options.output / "harder_concepts.json", harder)
    sys.stdout.write(f"{verdict}\n{options.output / 'report.html'}\n")
    return OK


_EVALUATE = "LacunaEvaluateErasure"
_HELP = {  # where the node's tooltip speaks of ComfyUI
    "prompt_file": "Prompts that must not show the concept: .txt with one a line, or .csv with a "
    "column 'prompt' (and 'concept', 'name').",
}


def _widgets(node: str) -> list[dict[str, Any]]:
    schemas = json.loads(Path(__file__).with_name("node_schemas.json").read_text("utf-8"))
    inputs = next((item["inputs"] for item in schemas if item["id"] == node), [])
    return [item for item in inputs if "default" in item]


def _make_folder(path: Path) -> None:
    """Before the work whose results go there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise HostError(f"{path} is a file; give a folder for --output.") from None
    except (OSError, ValueError) as error:
        raise HostError(f"The folder {brief(path)} cannot be made ({brief(error)}).") from None


def _write_text(path: Path, text: str) -> None:
    """Complete or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _version(options: argparse.Namespace) -> int:
    import torch

    from . import loader

    python = ".".join(str(part) for part in sys.version_info[:3])
    native = loader.load()
    sys.stdout.write(f"lacuna {native.__version__} (torch {torch.__version__}, Python {python})\n")
    return OK


def _integer(text: str) -> int:
    """What fits a widget: seeds use all of 64 bits."""
    number = int(text)
    if not -(2**63) <= number < 2**64:
        raise ValueError
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


# What argparse says of a value that one of them refuses: invalid integer value.
_integer.__name__, _finite.__name__ = "integer", "number"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lacuna", description="Concept erasure for diffusion models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run a workflow without ComfyUI", description="Run a workflow."
    )
    run.add_argument("workflow", type=Path, metavar="WORKFLOW.json", help="workflow in API format")
    run.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH",
        help="SD1.x file, diffusers folder, or a folder that holds the workflow's checkpoint",
    )  # fmt: skip
    run.add_argument(
        "--output", type=Path, default=Path("output"), metavar="DIR", help="where files go (output)"
    )
    run.add_argument(
        "--lora-dir",
        type=Path,
        metavar="DIR",
        help="folder of the LoRA files that the workflow loads",
    )
    run.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE",
        help="change an input; NODE is an id, a title or a node type; may be repeated",
    )  # fmt: skip
    run.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)"
    )
    run.set_defaults(command=_run)

    evaluate = commands.add_parser(
        "evaluate",
        help="compare a model before and after an erasure",
        description="Draw the same pictures before and after an edit; write a report.",
    )
    evaluate.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="the model before the edit"
    )
    edit = evaluate.add_mutually_exclusive_group(required=True)
    edit.add_argument("--lora", type=Path, metavar="FILE", help="the edit as a LoRA file")
    edit.add_argument("--edited", type=Path, metavar="PATH", help="the model after the edit")
    evaluate.add_argument(
        "--strength", type=_finite, metavar="NUMBER", help="of --lora (1); not with --edited"
    )
    evaluate.add_argument(
        "--concepts", type=Path, required=True, metavar="FILE",
        help="one concept a line, or a lacuna.concepts/1 file",
    )  # fmt: skip
    evaluate.add_argument(
        "--preserve", type=Path, metavar="FILE", help="what must stay, one phrase a line"
    )
    evaluate.add_argument(
        "--kind", default="object", choices=("object", "person", "style", "explicit"),
        help="of the concepts (object)",
    )  # fmt: skip
    evaluate.add_argument(
        "--detector", metavar="FILE.py:NAME",
        help="a classifier with score(images, names); without one the base model is the judge",
    )  # fmt: skip
    for item in _widgets(_EVALUATE):
        kinds = {"INT": _integer, "FLOAT": _finite}
        evaluate.add_argument(
            "--" + item["id"].replace("_", "-"),
            type=kinds.get(item["type"], lambda text: text.replace("\\n", "\n")),
            default=item["default"],
            choices=item.get("options"),
            metavar=None if item.get("options") else item["type"],
            help=_HELP.get(item["id"], item["tooltip"]).replace("%", "%%"),
        )
    evaluate.add_argument(
        "--output", type=Path, default=Path("output/evaluation"), metavar="DIR",
        help="where the report goes (output/evaluation)",
    )  # fmt: skip
    evaluate.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the models run (cpu)"
    )
    evaluate.set_defaults(command=_evaluate)

    version = commands.add_parser("version", help="print the versions in use")
    version.set_defaults(command=_version)

    for command in (run, evaluate, version):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.WARNING,
        format="%(message)s",
        stream=sys.stderr,
    )
    # Python's last collection over all loaded libraries would take longer than some runs do.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):  # file names need not be valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for chatty in ("httpx", "urllib3", "filelock", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        _complain("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        _complain(_sentence(error))
        return FAILED


def _complain(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


def _sentence(error: Exception) -> str:
    import torch

    from .loader import NativeUnavailable

    if isinstance(error, HostError | NativeUnavailable) or type(error).__name__ == "LacunaError":
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in (
        "diffusers",
        "transformers",
        "safetensors",
        "tokenizers",
    ):
        return (
            f"The headless host needs {error.name}: run "
            f"`{sys.executable} -m pip install diffusers transformers safetensors pillow`."
        )
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "CPUAllocator" in str(error):
        return (
            "There is not enough memory: use fewer or smaller pictures, or --device cpu "
            f"({brief(error)})."
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'A file'}: {error.strerror}."
    return f"Unexpected {type(error).__name__}: {brief(error)} (run again with --debug for details)"


if __name__ == "__main__":
    sys.exit(main())
