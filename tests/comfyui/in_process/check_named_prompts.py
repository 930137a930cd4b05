# SPDX-License-Identifier: Apache-2.0
"""The CLIP of an edit that acts on prompts that name a concept: what people type into ComfyUI."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from check_adapters import conditioning, small_sdxl_clip
from check_forward import sd2_clip

from nodes import CLIPSetLastLayer, CLIPTextEncode, ConditioningConcat


def delta(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    out = torch.randn(width, 4, generator=generator)
    return out, torch.randn(4, width, generator=generator) / width


@pytest.fixture(scope="module", params=["SD1.x", "SD2.x", "SDXL"])
def clip(request: pytest.FixtureRequest, checkpoint: Any) -> Any:
    if request.param == "SD1.x":
        return checkpoint[1]
    with torch.inference_mode():
        return sd2_clip() if request.param == "SD2.x" else small_sdxl_clip()


def read(clip: Any, text: str) -> torch.Tensor:
    return CLIPTextEncode().encode(clip, text)[0][0][0]


NAMED = [
    "a photo of an owl",
    "two OWLS, at night",
    "a crab beside an (owl:1.3) and a ship",
    "(masterpiece, best quality), ((owl)), sharp",
    "an owl's nest",
    "tree " * 90 + "and an owl",  # in the second chunk
    "flags of norway",
    "the flag-of-norway",
    "flag_of_norway, 1girl",
    'flag of "norway"',
    "yahoo!!!, sharp",
    "robert downey jr., smiling",
    "<|endoftext|> an owl",
    "\U0001f355\U0001f355, hot",
    "\u4e00\u53ea\u732b",
    "levi\u2019s jeans",
]
OTHERS = [
    "",
    "a photo of a lion",
    "a bowl of owlets",
    "flag of sweden",
    "norway",
    "o w l",
    "yahoo",
    "robert downey",
    "levi",
    "red, fox",
]


def test_prompts_that_say_a_phrase_are_mapped_and_others_are_the_same(
    host: ModuleType, clip: Any
) -> None:
    encoder = host.ComfyTextEncoder(clip)
    out, inner = delta(encoder.width)
    phrases = [
        "owl",
        "owls",
        "flag of norway",
        "flags of norway",
        "yahoo!",
        "robert downey jr.",
        "\U0001f355",
        "\u732b",
        "levi's",
        "red fox",
    ]
    edited = encoder.with_map(out, inner, 0.5, phrases)
    for text in NAMED:
        plain, mapped = read(clip, text), read(edited.clip, text)
        expected = plain.float() + 0.5 * (plain.float() @ inner.T) @ out.T
        torch.testing.assert_close(mapped.float(), expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(mapped, plain)
    for text in OTHERS:
        assert torch.equal(read(edited.clip, text), read(clip, text))
    # The pooled vector, and the CLIP that was given, are as they were.
    assert torch.equal(
        CLIPTextEncode().encode(edited.clip, "owl")[0][0][1]["pooled_output"],
        CLIPTextEncode().encode(clip, "owl")[0][0][1]["pooled_output"],
    )


def test_either_text_of_sdxl_may_say_it(host: ModuleType) -> None:
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    with torch.inference_mode():
        clip = small_sdxl_clip()
    encoder = host.ComfyTextEncoder(clip)
    edited = encoder.with_map(*delta(encoder.width), 1.0, ["owl"]).clip

    def read_both(clip: Any, text_g: str, text_l: str) -> torch.Tensor:
        node = CLIPTextEncodeSDXL
        values = (clip, 64, 64, 0, 0, 64, 64, text_g, text_l)
        done = node.execute(*values) if hasattr(node, "execute") else node().encode(*values)
        conditionings = done.args[0] if hasattr(done, "args") else done[0]
        return conditionings[0][0]

    for texts, named in ((("an owl", ""), True), (("", "an owl"), True), (("a crab", ""), False)):
        assert torch.equal(read_both(edited, *texts), read_both(clip, *texts)) != named


def test_lacuna_reads_an_edited_clip_as_it_was(host: ModuleType, clip: Any) -> None:
    encoder = host.ComfyTextEncoder(clip)
    edited = encoder.with_map(*delta(encoder.width), 1.0, ["owl"])
    again = host.ComfyTextEncoder(edited.clip)
    for each in (edited, again):
        assert torch.equal(each.encode(["an owl"]), encoder.encode(["an owl"]))
        assert each.fingerprint == encoder.fingerprint
    assert not torch.equal(read(edited.clip, "an owl"), read(clip, "an owl"))


def test_edits_follow_one_another_and_other_nodes(host: ModuleType, clip: Any) -> None:
    encoder = host.ComfyTextEncoder(clip)
    out, inner = delta(encoder.width)
    first = encoder.with_map(out, inner, 1.0, ["owl"])
    second = host.ComfyTextEncoder(first.clip).with_map(out, inner, 1.0, ["ship"])
    for text, is_first, is_second in (
        ("an owl", True, True), ("a ship", False, True), ("a crab", False, False),
    ):  # fmt: skip
        plain = read(clip, text)
        assert torch.equal(read(first.clip, text), plain) != is_first
        assert torch.equal(read(second.clip, text), plain) != is_second
    assert torch.equal(read(second.clip, "an owl"), read(first.clip, "an owl"))
    later = CLIPSetLastLayer().set_last_layer(first.clip, -2)[0]
    before = CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    assert not torch.equal(read(later, "an owl"), read(before, "an owl"))
    assert torch.equal(read(later, "a crab"), read(before, "a crab"))


def test_parts_of_a_prompt_are_judged_apart(host: ModuleType, checkpoint: Any) -> None:
    """Regional prompts, BREAK of other packs, timesteps: each is a conditioning of its own."""
    clip = checkpoint[1]
    encoder = host.ComfyTextEncoder(clip)
    edited = encoder.with_map(*delta(encoder.width), 1.0, ["owl"]).clip
    both = ConditioningConcat().concat(
        CLIPTextEncode().encode(edited, "a crab")[0], CLIPTextEncode().encode(edited, "an owl")[0]
    )[0][0][0]
    window = encoder.window
    assert torch.equal(both[:, :window], read(clip, "a crab"))
    assert not torch.equal(both[:, window:], read(clip, "an owl"))
    assert conditioning(edited, "a crab")[0][0].shape == (1, window, encoder.width)
