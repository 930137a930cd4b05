# SPDX-License-Identifier: Apache-2.0
"""The demo transformer's checkpoint in ComfyUI: it computes what its training computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools" / "demo_model"))

import expand
import expand_transformer
import networks
import stage_transformer

PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the checkpoint whose transformer is noise."""
    file = expand_transformer.write_checkpoint(tmp_path_factory.mktemp("sd3"), random=True)
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(file))[:3]


def conditioning(clip: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    entry = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
    return entry[0], entry[1]["pooled_output"]


def test_text_is_read_as_in_training(transformer: tuple[Any, Any, Any]) -> None:
    weights = expand.read_weights(expand.ASSETS / "text_encoder.safetensors")[0]
    encoder = networks.TextEncoder(weights["token_ids"].tolist()).eval()
    encoder.load_compact(weights)
    ids = [token for token, _ in transformer[1].tokenize(PROMPT)["l"][0]]
    rows = torch.tensor([[encoder.token_ids.index(token) for token in ids]])
    expected, expected_pooled = encoder.conditioning(rows)
    context, pooled = conditioning(transformer[1], PROMPT)
    assert context.shape == (1, networks.WINDOW, expand_transformer.CONTEXT)
    assert pooled.shape == (1, expand_transformer.POOLED)
    width = networks.WIDTH
    assert torch.allclose(context[..., :width], expected, atol=2e-3)
    assert torch.allclose(pooled[:, :width], expected_pooled, atol=2e-3)
    assert not context[..., width:].any() and not pooled[:, width:].any()


def test_the_model_predicts_the_velocity_of_training(transformer: tuple[Any, Any, Any]) -> None:
    model, clip, _ = transformer
    compact = networks.make_transformer()
    weights = expand.half(expand_transformer.random_compact(0))
    compact.load_state_dict({key: value.float() for key, value in weights.items()})
    context, pooled = conditioning(clip, PROMPT)
    generator = torch.Generator().manual_seed(2)
    clean, noise = torch.randn(2, 3, 16, 8, 8, generator=generator)
    sigma = torch.tensor([0.2, 0.7, 0.95])
    sampling = model.model.model_sampling
    assert sampling.shift == stage_transformer.SHIFT
    noisy = sampling.noise_scaling(sigma.view(-1, 1, 1, 1), noise, clean)
    assert torch.allclose(noisy, clean.lerp(noise, sigma.view(-1, 1, 1, 1)), atol=1e-6)
    velocity = compact(
        hidden_states=noisy,
        encoder_hidden_states=context[..., : networks.WIDTH].expand(3, -1, -1),
        pooled_projections=pooled[:, : networks.WIDTH].expand(3, -1),
        timestep=stage_transformer.MULTIPLIER * sigma,
        return_dict=False,
    )[0]
    comfy.model_management.load_models_gpu([model])
    denoised = model.model.apply_model(
        noisy, sigma, c_crossattn=context.expand(3, -1, -1), y=pooled.expand(3, -1)
    )
    assert velocity.std() > 0.1
    expected = noisy - sigma.view(-1, 1, 1, 1) * velocity
    assert torch.allclose(denoised, expected, atol=1e-3 * float(expected.abs().max()))


def test_copies_of_latents_decode_as_their_mean(transformer: tuple[Any, Any, Any]) -> None:
    model, _, vae = transformer
    weights = expand.demo_weights(unet=False)
    decoder = networks.make_decoder()
    decoder.load_state_dict({key: value.float() for key, value in weights["decoder"].items()})
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    copies = latents.repeat(1, networks.FLOW_COPIES, 1, 1)
    expected = decoder(latents * weights["latent_std"]).clamp(0, 1).movedim(1, -1)
    # what a sampler hands over, and what Encode gives it
    latent_format = model.model.latent_format
    assert torch.allclose(vae.decode(latent_format.process_out(copies)), expected, atol=0.02)
    back = latent_format.process_in(vae.encode(expected))
    assert back.shape == copies.shape
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
