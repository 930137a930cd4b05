# SPDX-License-Identifier: Apache-2.0
"""The headless host and a real ComfyUI: same tokens, text embeddings, latents and pixels."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comfyui"))

from comfy_server import NoCheckout, find_checkouts, host_environment, host_python
from forward_checks import PlainAttention

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = ["a photo of a cat", "the flag of japan", ""]
CASES = {
    "euler normal": ("euler", "normal", 8, 4.5, 1.0),
    "euler simple": ("euler", "simple", 5, 7.0, 1.0),
    "dpmpp_2m karras": ("dpmpp_2m", "karras", 6, 4.5, 1.0),
    "no guidance": ("dpmpp_2m", "normal", 4, 1.0, 1.0),
    "image to image": ("euler", "normal", 4, 4.5, 0.6),
}


def phrases() -> list[str]:
    names = json.loads((REPOSITORY / "assets/demo_model/names.json").read_text("utf-8"))
    odd = [
        "", "   ", "it's they're I'll don't", "(very:1.2) [odd] {braces}", "🐶🚀 emoji", "日本の旗",
        "naïve café", "100% of 3,000 €", "a_b-c/d\\e", "<|endoftext|> inside", "x" * 200,
        "one\ttab\nline", "\uff21full width", "...!!!", "İstanbul", "ΑΒΓ ß", "ﬁ ligature",
        "e\u0301",
    ]  # fmt: skip
    generator = random.Random(1)
    noise = [
        "".join(chr(generator.choice((
            generator.randrange(32, 127), generator.randrange(0xA0, 0x500),
            generator.randrange(0x2000, 0x3100), 32,
        ))) for _ in range(generator.randrange(40)))
        for _ in range(200)
    ]  # fmt: skip
    return [*names["objects"], *names["flags"], *odd, *noise]


def checkouts() -> list:
    try:
        return find_checkouts() or [None]
    except NoCheckout as error:
        return [error]


@pytest.fixture(scope="module", params=checkouts(), ids=lambda c: getattr(c, "name", "none"))
def reference(request, demo, demo_checkpoint, tmp_path_factory):
    if request.param is None:
        pytest.skip("set COMFYUI_DIR")
    if isinstance(request.param, NoCheckout):
        pytest.fail(str(request.param))
    folder = tmp_path_factory.mktemp("reference")
    start = 5 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    cases = {
        name: dict(
            zip(("sampler", "scheduler", "steps", "cfg", "denoise"), case, strict=True),
            seed=100 + i, prompt=PROMPTS[i % 2],
        )
        for i, (name, case) in enumerate(CASES.items())
    }  # fmt: skip
    levels = demo[0].noise_levels[[20, 500, 999]]
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(10))
    noisy = noise * (1 + levels.reshape(-1, 1, 1, 1) ** 2).sqrt()
    single = {"noisy": noisy.tolist(), "sigma": levels.tolist(), "prompts": PROMPTS}
    job = {
        "phrases": phrases(), "prompts": PROMPTS, "cases": cases, "start": start.tolist(),
        "denoise": single,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("comfyui_reference.py")
    done = subprocess.run(
        [host_python(), script, request.param.folder, demo_checkpoint,
         folder / "job.json", folder / "result.pt"],
        env=host_environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return job, torch.load(folder / "result.pt")


def test_comfyui_loads_the_demo_model_without_a_warning(reference):
    assert reference[1]["warnings"] == []


def test_tokens(reference, demo):
    job, result = reference
    ours = [demo[1].tokenize(text) for text in job["phrases"]]
    different = [
        text for text, a, b in zip(job["phrases"], ours, result["tokens"], strict=True) if a != b
    ]
    assert len(ours) > 300 and different == []


def test_text_embeddings(reference, demo):
    torch.testing.assert_close(
        demo[1].encode(PROMPTS), reference[1]["encoded"], atol=1e-4, rtol=1e-4
    )


def test_forward_passes(reference, demo):
    job, result = reference
    noisy, sigma = (torch.tensor(job["denoise"][name]) for name in ("noisy", "sigma"))
    context, _ = demo[1].embed(PROMPTS)
    for tap in (None, PlainAttention()):
        clean = demo[0].denoise(noisy, sigma, context, None, tap, False)
        for ours, expected in zip(clean, result["denoised"], strict=True):
            relative = float((ours - expected).abs().max() / expected.abs().max())
            assert relative < 1e-3, f"the estimates differ by {relative:.2e} of their range"


@pytest.mark.parametrize("name", CASES)
def test_latents_and_pixels(reference, demo, name):
    job, result = reference
    case = job["cases"][name]
    model, clip, decoder = demo
    start = torch.tensor(job["start"])
    latent = model.sample(
        case["seed"], case["steps"], case["cfg"], case["sampler"], case["scheduler"],
        clip.encode([case["prompt"]]), clip.encode([""]),
        start if case["denoise"] < 1 else torch.zeros_like(start), case["denoise"],
        lambda done, total: None,
    )  # fmt: skip
    expected = result[name]["latent"]
    relative = float((latent - expected).abs().max() / expected.abs().max())
    assert relative < 1e-3, f"latents differ by {relative:.2e} of their range"
    pixels = (decoder.decode(latent) - result[name]["image"]).abs().max()
    assert float(pixels) < 0.5 / 255
