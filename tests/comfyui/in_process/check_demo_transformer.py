# SPDX-License-Identifier: Apache-2.0
"""The demo transformer's checkpoint in ComfyUI: it computes what its training computes.

The reference is written by ../transformer_reference.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ["LACUNA_TEST_TRANSFORMER"])
PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def transformer() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE."""
    file = FOLDER / "lacuna_random_transformer.safetensors"
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(file))[:3]


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "reference.safetensors")


def conditioning(clip: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    entry = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
    return entry[0], entry[1]["pooled_output"]


def test_text_is_read_as_in_training(
    transformer: tuple[Any, Any, Any], reference: dict[str, torch.Tensor]
) -> None:
    context, pooled = conditioning(transformer[1], PROMPT)
    assert context.shape == (1, 77, 4096) and pooled.shape == (1, 2048)
    assert torch.allclose(context[..., :768], reference["context"], atol=2e-3)
    assert torch.allclose(pooled[:, :768], reference["pooled"], atol=2e-3)
    assert not context[..., 768:].any() and not pooled[:, 768:].any()


def test_the_model_predicts_the_velocity_of_training(
    transformer: tuple[Any, Any, Any], reference: dict[str, torch.Tensor]
) -> None:
    model, clip, _ = transformer
    context, pooled = conditioning(clip, PROMPT)
    noisy, sigma = reference["noisy"], reference["sigma"]
    sampling = model.model.model_sampling
    assert sampling.shift == reference["shift"]
    column = sigma.view(-1, 1, 1, 1)
    by_host = sampling.noise_scaling(column, reference["noise"], reference["clean"])
    assert torch.allclose(by_host, noisy, atol=1e-6)
    comfy.model_management.load_models_gpu([model])
    denoised = model.model.apply_model(
        noisy, sigma, c_crossattn=context.expand(3, -1, -1), y=pooled.expand(3, -1)
    )
    assert reference["velocity"].std() > 0.1
    expected = noisy - column * reference["velocity"]
    assert torch.allclose(denoised, expected, atol=2e-3 * float(expected.abs().max()))


def test_copies_of_latents_decode_as_their_mean(
    transformer: tuple[Any, Any, Any], reference: dict[str, torch.Tensor]
) -> None:
    model, _, vae = transformer
    # what a sampler hands to VAE Decode, and what VAE Encode hands to a sampler
    latent_format = model.model.latent_format
    pictures = vae.decode(latent_format.process_out(reference["latents"]))
    assert torch.allclose(pictures, reference["pictures"], atol=0.02)
    back = latent_format.process_in(vae.encode(reference["pictures"]))
    assert back.shape == reference["latents"].shape
    assert torch.equal(back[:, :4], back[:, 4:8])


def test_it_samples(transformer: tuple[Any, Any, Any]) -> None:
    model, clip, _ = transformer
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 8, 8))
    noise = comfy.sample.prepare_noise(latent, 7)
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")
    )
    samples = comfy.sample.sample(
        model, noise, 2, 4.0, "euler", "simple", positive, negative, latent, seed=7,
        disable_pbar=True,
    )  # fmt: skip
    assert samples.shape == (1, 16, 8, 8) and samples.isfinite().all()
