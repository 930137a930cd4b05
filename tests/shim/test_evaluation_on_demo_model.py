# SPDX-License-Identifier: Apache-2.0
"""Evaluate Erasure against what is known of the demo model: edits of every quality are called what
they are, and its counts agree with those of tools/demo_model/score.py.

The agreement takes twenty minutes of a core and is only checked with LACUNA_SLOW=1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "demo_model"
sys.path.insert(0, str(TOOLS))

pytest.importorskip("diffusers", reason="needs diffusers")
import score  # noqa: E402
from evaluator import DemoDetector, Evaluator  # noqa: E402

from python_shim import loader  # noqa: E402
from python_shim.detector import SafeDetector  # noqa: E402

TARGETS = ("dog", "car", "airplane", "hamburger")
SLOW = bool(os.environ.get("LACUNA_SLOW"))
KEPT = ("preserved", "neighbours")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loader.load().NodePack(str(tmp_path_factory.mktemp("output")))


@pytest.fixture(scope="module")
def task() -> dict[str, Any]:
    """The protocol's objects, four of them."""
    task = score.read_protocol()["tasks"]["objects"]
    targets = TARGETS if SLOW else TARGETS[:1]
    task["targets"] = {name: task["targets"][name] for name in targets}
    synonyms = {word: name for name, words in task["targets"].items() for word in words}
    task["lists"]["erased"] = {"head": "object", "names": {n: n for n in targets}, "images": 6}
    task["lists"]["synonyms"] = {"head": "object", "names": synonyms, "images": 6}
    for part in KEPT:
        names = list(task["lists"][part]["names"])[:6]
        task["lists"][part] |= {"names": {name: name for name in names}, "images": 4}
    task["preserve"] = list(task["lists"]["preserved"]["names"])
    return task


@pytest.fixture(scope="module")
def edit(demo, pack, task, tmp_path_factory):
    """A model after a method of score.py."""
    model, clip, _ = demo
    editor = score.Editor(pack, model, clip, score.read_protocol(), tmp_path_factory.mktemp("b"))
    known: dict[str, Any] = {}

    def edit(method: str) -> Any:
        return known.setdefault(method, editor.edit("objects", task, method)[0])

    return edit


@pytest.fixture(scope="module")
def evaluate(demo, pack, task):
    model, clip, vae = demo
    concepts = pack.run("LacunaConceptSet", score.concept_set_inputs(task))[0]

    def evaluate(edited: Any, **widgets: Any) -> dict[str, Any]:
        inputs = {
            "base_model": model, "erased_model": edited, "clip": clip, "vae": vae,
            "concepts": concepts, "neighbours": "\n".join(task["lists"]["neighbours"]["names"]),
            "detector": SafeDetector(DemoDetector()), "prompts": 3, "images": 2, "steps": 10,
            "cfg": 4.0, "sampler": "dpmpp_2m", "width": 64, "height": 64, "batch": 16,
        }  # fmt: skip
        return json.loads(pack.run("LacunaEvaluateErasure", inputs | widgets)[1])

    return evaluate


def counts_of(report: dict[str, Any], task: dict[str, Any], part: str) -> list[int]:
    """Of the report, for the phrases that score.py draws: the node also tries plurals and typing
    errors, which the demo model does not know."""
    if part != "synonyms":
        return report["counts"][part]
    words = task["lists"]["synonyms"]["names"]
    pairs = [p for p in report["pairs"] if p["list"] == "synonyms" and p["phrase"] in words]
    return [sum(not pair["seen_after"] for pair in pairs), len(pairs)]


@pytest.mark.skipif(not SLOW, reason="takes twenty minutes: set LACUNA_SLOW=1")
@pytest.mark.parametrize("method", ["none", "uce", "cached"])
def test_counts_agree_with_the_scoring_protocol(demo, edit, evaluate, task, method: str) -> None:
    _, clip, vae = demo
    protocol = score.read_protocol()
    studio = score.Studio(clip, vae, Evaluator.load(), protocol["sampling"])
    edited = edit(method)
    report = evaluate(edited, prompts=2)
    for part in ("erased", "synonyms", *KEPT):
        trials = score.list_trials(task["lists"][part], protocol["templates"])
        outcome = studio.judge(edited, trials, part in score.NEGATED)
        theirs = score.wilson(sum(outcome.hits), len(outcome.hits))
        hits, count = counts_of(report, task, part)
        assert count > 0
        ours = score.wilson(hits, count)
        print(f"{method} {part}: node {hits}/{count}, score.py {sum(outcome.hits)}/{len(trials)}")
        assert ours[0] <= theirs[1] and theirs[0] <= ours[1], (part, ours, theirs)
    gone = report["counts"]["erased"]
    if method == "none":
        assert report["verdict"][0].startswith("Nothing was erased")
        assert gone[0] < 0.5 * gone[1]  # the model draws what it is asked for
    else:
        # Whether unrelated captions survive is not asked: the protocol protects none of them.
        assert gone[0] > 0.5 * gone[1]
        assert not report["verdict"][0].startswith("Nothing was erased")


def test_noise_instead_of_weights_is_called_damage(demo, evaluate) -> None:
    model = demo[0]
    generator = torch.Generator().manual_seed(2)
    noise = []
    for name, _, _ in model.cross_attention():
        weight = model.effective_weight(name)
        random = weight.std() * torch.randn(weight.shape, generator=generator)
        noise.append((name, random - weight, None))
    report = evaluate(model.with_weight_deltas(noise, 1.0), prompts=1, images=1)
    assert report["verdict"][0].startswith("The edit damages the model")
    kept, count = report["counts"]["preserved"]
    assert kept < 0.5 * count


def test_an_edit_of_something_else_is_not_called_an_erasure(demo, evaluate) -> None:
    model = demo[0]
    nudge = [
        (name, 1e-4 * model.effective_weight(name), None) for name, _, _ in model.cross_attention()
    ]
    report = evaluate(model.with_weight_deltas(nudge, 1.0), prompts=1, images=1)
    assert report["verdict"][0].startswith("Nothing was erased: the pictures of the concept hardly")
