# SPDX-License-Identifier: Apache-2.0
"""An edit that acts only where a prompt names a concept, headless and on the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from python_shim import loader
from python_shim.text_gate import TextGate, mapped_where


def sample(model: Any, clip: Any, prompts: list[str]) -> torch.Tensor:
    latent = torch.zeros(len(prompts), 4, 8, 8)
    return model.sample(
        3, 4, 4.0, "euler", "normal", clip.encode(prompts), clip.encode([""]), latent, 1.0,
        lambda done, total: None,
    )  # fmt: skip


def test_a_gate_scores_rows_with_the_row_before():
    torch.manual_seed(1)
    now, before, offset = torch.randn(5, 2), torch.randn(5, 2), torch.randn(2)
    text = torch.randn(3, 8, 5)  # two windows of four rows
    expected = []
    for prompt in text:
        scores = []
        for window in prompt.split(4):
            for t in range(1, 4):
                scores.append(window[t] @ now + window[t - 1] @ before - offset)
        expected.append(bool((torch.stack(scores) > 0).any()))
    assert TextGate([(now, before, offset, False)], 4)(text).tolist() == expected
    last = torch.stack([text[:, 3] @ now - offset, text[:, 7] @ now - offset])
    gate = TextGate([(now, None, offset, True)], 4)
    assert gate(text).tolist() == (last > 0).any(0).any(-1).tolist()


def test_what_is_not_opened_is_the_very_same_tensor():
    text, mapped = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    assert mapped_where(text, mapped, torch.tensor([False, False])) is text
    assert mapped_where(text, mapped, torch.tensor([True, True])) is mapped
    assert mapped_where(text, mapped, None) is mapped
    mixed = mapped_where(text, mapped, torch.tensor([False, True]))
    assert torch.equal(mixed[0], text[0]) and torch.equal(mixed[1], mapped[1])


@pytest.fixture(scope="module")
def erased(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """The demo model that forgets an owl and a flag where they are named, and the report."""
    model, clip, _ = demo
    pack = loader.load().NodePack(str(tmp_path_factory.mktemp("out")))
    concepts = pack.run(
        "LacunaConceptSet",
        {"concepts": "owl -> star\nflag of norway -> flag", "general_prior": "none",
         "templates": 4, "kind": "object"},
        None,
    )[0]  # fmt: skip
    edited, _, _, report, edited_clip = pack.run(
        "LacunaAttentionRefine",
        {"model": model, "clip": clip, "concepts": concepts, "regularization": 1.0,
         "retain_set": "small", "where": "prompts that name it"},
        None,
    )  # fmt: skip
    return edited, report, edited_clip


@pytest.mark.parametrize(
    "prompt",
    ["a photo of a pizza", "flag of sweden", "a drawing of a lion", "", "a tiger and a car"],
)
def test_prompts_that_name_nothing_are_drawn_by_the_model_as_it_was(
    demo: Any, erased: Any, prompt: str
):
    model, clip, _ = demo
    assert torch.equal(sample(erased[0], clip, [prompt]), sample(model, clip, [prompt]))


@pytest.mark.parametrize("prompt", ["a photo of an owl", "owl", "a nice drawing of flag of norway"])
def test_prompts_that_name_a_concept_are_edited(demo: Any, erased: Any, prompt: str):
    model, clip, _ = demo
    changed = (sample(erased[0], clip, [prompt]) - sample(model, clip, [prompt])).abs().max()
    assert changed > 0.1


def test_rows_of_a_batch_are_judged_apart(demo: Any, erased: Any):
    model, clip, _ = demo
    prompts = ["a photo of a pizza", "a photo of an owl"]
    edited, plain = sample(erased[0], clip, prompts), sample(model, clip, prompts)
    assert torch.equal(edited[0], plain[0])
    assert (edited[1] - plain[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "prompt",
    [
        "a picture of a crab and an owl",
        "a large house on a hill next to a tree with two owls, sunset, detailed",
        "a bear holding the flag of norway in a garden",
        "flags of norway",
        "Flag-of-Norway",
        "flag_of_norway, night",
    ],
)
def test_prompts_that_say_a_concept_beside_other_things_are_edited_by_the_clip(
    demo: Any, erased: Any, prompt: str
):
    clip, edited = demo[1], erased[2]
    changed = (edited.conditioning([prompt]) - clip.conditioning([prompt])).abs().max()
    assert changed > 0.1
    assert torch.equal(edited.encode([prompt]), clip.encode([prompt]))  # what Lacuna reads


@pytest.mark.parametrize("prompt", ["", "a bowl", "owlet", "flag of sweden", "norway", "a crab"])
def test_other_prompts_are_read_by_the_clip_as_they_were(demo: Any, erased: Any, prompt: str):
    assert torch.equal(erased[2].conditioning([prompt]), demo[1].encode([prompt]))


def test_the_report_says_where_it_acts_and_what_was_retained(erased: Any):
    report = erased[1]
    assert "Acts on prompts that name a concept" in report
    assert "Save Checkpoint writes the model with the concepts still in it" in report
    assert "Retain set: " in report and '"flag of ..."' not in report.split("Retain set")[0]


def test_weights_cannot_tell_prompts_apart(demo: Any, tmp_path: Path):
    model, clip, _ = demo
    pack = loader.load().NodePack(str(tmp_path))
    concepts = pack.run("LacunaConceptSet", {"concepts": "owl -> star"}, None)[0]
    with pytest.raises(Exception, match="weights act on every prompt"):
        pack.run(
            "LacunaAttentionRefine",
            {"model": model, "clip": clip, "concepts": concepts, "apply_as": "weights",
             "where": "prompts that name it"},
            None,
        )  # fmt: skip
