# SPDX-License-Identifier: Apache-2.0
"""Forward passes through ComfyUI's own models: with a tap, with gradients, stopped half-way."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch
from check_adapters import (
    SMALL_SD2,
    SMALL_SDXL,
    conditioning,
    lora,
    random_clip,
    random_unet,
    small_sdxl_clip,
)
from comfy.model_sampling import V_PREDICTION

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import forward_checks as checks


@contextmanager
def training() -> Iterator[None]:
    """As the core sets it, inside a node's inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def sd2_clip() -> Any:
    from comfy.text_encoders.sd2_clip import SD2ClipModel, SD2Tokenizer

    return random_clip(SD2Tokenizer, SD2ClipModel, clip_h_model_config={"num_hidden_layers": 3})


def v_prediction(model: Any) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]


@pytest.fixture(scope="module", params=["SD1.x", "SD1.x LoRA", "SD2.x v", "SDXL"])
def models(request: pytest.FixtureRequest, checkpoint: Any) -> tuple[Any, Any]:
    """MODEL and CLIP."""
    with torch.inference_mode():
        if request.param == "SD1.x":
            return checkpoint[:2]
        if request.param == "SD1.x LoRA":
            model, _ = comfy.sd.load_lora_for_models(checkpoint[0], None, lora(), 0.8, 0)
            return model, checkpoint[1]
        if request.param == "SD2.x v":
            return v_prediction(random_unet(SMALL_SD2)), sd2_clip()
        return random_unet(SMALL_SDXL), small_sdxl_clip()


@pytest.fixture
def denoiser(host: ModuleType, models: tuple[Any, Any]) -> Any:
    """With a map of what values read, and a weight change, on the MODEL as it came."""
    plain = host.ComfyDenoiser(models[0])
    name = plain.cross_attention()[-1][0]
    shape = plain.effective_weight(name).shape
    generator = torch.Generator().manual_seed(8)
    identity = torch.eye(shape[1])
    edited = plain.with_weight_deltas(
        [(name, torch.randn(shape, generator=generator) * 0.02, None)], 0.5
    )
    return edited.with_input_maps(checks.sided(edited, None, 0.1 * identity), 0.5)


VALUES_READ = 1.05  # times the text: what that map makes of it


@pytest.fixture
def asked(host: ModuleType, denoiser: Any, models: tuple[Any, Any]) -> list[Any]:
    return checks.request(denoiser, host.ComfyTextEncoder(models[1]).embed)


def unet(denoiser: Any) -> torch.nn.Module:
    denoiser._load(denoiser.patcher)
    return denoiser.patcher.model.diffusion_model


def test_one_step_of_the_hosts_sampler(host: ModuleType, denoiser: Any, models: Any) -> None:
    """From full noise to zero in one Euler step is the clean estimate itself."""
    clip, text = models[1], "a photo of a hamburger"
    latent = torch.zeros(1, *denoiser.latent_shape(64, 64))
    noise = comfy.sample.prepare_noise(latent, 7)
    expected = comfy.sample.sample(
        denoiser.patcher, noise, 1, 1.0, "euler", "normal", conditioning(clip, text),
        conditioning(clip, ""), latent, seed=7, disable_pbar=True,
    )  # fmt: skip
    sigma = denoiser.noise_levels[-1:]
    context, pooled = host.ComfyTextEncoder(clip).embed([text])
    clean = denoiser.denoise(noise * (1 + sigma**2).sqrt(), sigma, context, pooled, None, False)
    checks.close(denoiser.to_host_latent(clean), expected, 1e-4)
    checks.close(denoiser.from_host_latent(expected), clean, 1e-4)


def test_noise_levels(denoiser: Any) -> None:
    levels = denoiser.noise_levels
    assert levels.shape == (1000,) and levels.dtype == torch.float32
    assert bool((levels.diff() > 0).all())
    assert not levels.is_inference()


def test_the_vocabulary_is_what_the_encoder_tells_apart(host: ModuleType, checkpoint: Any) -> None:
    random = host.ComfyTextEncoder(sd2_clip()).vocabulary()
    assert len(random) == len(set(random)) > 30_000 and random.index("the") < random.index("owl")
    # The demo model's encoder was trained on a few hundred words.
    demo = host.ComfyTextEncoder(checkpoint[1]).vocabulary()
    assert "hamburger" in demo and 100 < len(demo) < 1000 and set(demo) < set(random)
    for encoder in (small_sdxl_clip(), sd2_clip()):
        assert len(host.ComfyTextEncoder(encoder).vocabulary()) == len(random)


def test_tap(denoiser: Any, asked: list[Any]) -> None:
    checks.check_tap(denoiser, asked, unet(denoiser))


def test_attention_only(denoiser: Any, asked: list[Any]) -> None:
    checks.check_attention_only(denoiser, asked, unet(denoiser))
    with training():
        checks.check_attention_only(denoiser, asked, unet(denoiser))


def test_gradients(denoiser: Any, asked: list[Any]) -> None:
    module = unet(denoiser)
    layers = checks.layers_of(denoiser)
    with training():
        weighting = torch.randn(asked[0].shape, generator=torch.Generator().manual_seed(4))
        with checks.unharmed(module):
            ours = checks.tapped_gradients(denoiser, asked, weighting, layers)
            again = checks.tapped_gradients(denoiser, asked, weighting, layers)
        assert all(torch.equal(ours[layer], again[layer]) for layer in layers)

        model = denoiser.patcher.model
        double = copy.deepcopy(module).requires_grad_(False).double()
        double.dtype = torch.float64
        noisy, sigma, context, pooled = asked
        noisy, context = noisy.double(), context.double()
        level = sigma.double().reshape(-1, 1, 1, 1)
        conditions = {}
        if pooled is not None:
            conditions["y"] = model.encode_adm(pooled_output=pooled, width=64, height=64).double()
        for layer in layers:
            value = double.get_submodule(f"{layer.removeprefix('diffusion_model.')}.to_v")
            value.register_forward_pre_hook(lambda _module, inputs: (VALUES_READ * inputs[0],))

        def clean() -> torch.Tensor:
            out = double(
                noisy / (level**2 + 1).sqrt(), model.model_sampling.timestep(sigma),
                context=context, **conditions,
            )  # fmt: skip
            if isinstance(model.model_sampling, V_PREDICTION):
                return noisy / (level**2 + 1) - out * level / (level**2 + 1).sqrt()
            return noisy - level * out

        copies = {
            layer: double.get_submodule(f"{layer.removeprefix('diffusion_model.')}.to_k")
            for layer in layers
        }
        expected = checks.reference_gradients(denoiser, layers, copies, clean, weighting)
    checks.check_same_gradients(ours, expected)


def test_gradient_of_the_context(denoiser: Any, asked: list[Any]) -> None:
    with training():
        checks.check_context_gradient(denoiser, asked, unet(denoiser))


def test_exceptions(denoiser: Any, asked: list[Any]) -> None:
    def options() -> str:
        return repr(denoiser.patcher.model_options) + repr(denoiser.patcher.model.current_patcher)

    checks.check_exceptions(denoiser, asked, unet(denoiser), options)
    with training():
        checks.check_exceptions(denoiser, asked, unet(denoiser), options)


def test_the_model_is_loaded_when_it_has_to_be(
    host: ModuleType, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, *args, **options: loaded.extend(models) or load(models, *args, **options),
    )
    plain = host.ComfyDenoiser(checkpoint[0].clone())
    deltas = [(name, torch.ones(320, 768) * 0.01, None) for name, *_ in plain.cross_attention()]
    edited = plain.with_weight_deltas(deltas, 1.0)
    asked = checks.request(plain, host.ComfyTextEncoder(checkpoint[1]).embed)
    loaded.clear()
    first, changed = plain.denoise(*asked, None, False), edited.denoise(*asked, None, False)
    assert loaded == [plain.patcher, edited.patcher] and not torch.allclose(first, changed)
    for _ in range(3):
        assert torch.equal(edited.denoise(*asked, None, False), changed)
    assert len(loaded) == 2
    assert torch.equal(plain.denoise(*asked, None, False), first)


def test_another_replacement_of_the_attention_is_refused(host: ModuleType, checkpoint: Any) -> None:
    model = checkpoint[0].clone()
    model.set_model_attn2_replace(lambda q, k, v, _: 0 * q, "input", 1)
    denoiser = host.ComfyDenoiser(model)
    asked = checks.request(denoiser, host.ComfyTextEncoder(checkpoint[1]).embed)
    with pytest.raises(ValueError, match="Another node replaces"):
        denoiser.denoise(*asked, checks.PlainAttention(), False)
    replaced = denoiser.denoise(*asked, None, False)
    plain = host.ComfyDenoiser(checkpoint[0]).denoise(*asked, None, False)
    assert not torch.allclose(replaced, plain), "without a tap it stays in force"


def test_what_cannot_be_trained_through_is_named(host: ModuleType, checkpoint: Any) -> None:
    """A weight that another pack made in inference mode and put into the forward pass."""
    foreign = torch.full((320,), 1.01)
    model = checkpoint[0].clone()
    model.set_model_attn1_output_patch(lambda n, _: n * foreign)
    denoiser = host.ComfyDenoiser(model)
    asked = checks.request(denoiser, host.ComfyTextEncoder(checkpoint[1]).embed)
    assert denoiser.denoise(*asked, None, False).isfinite().all()
    with training(), pytest.raises(ValueError, match="cannot be trained through"):
        checks.tapped_gradients(denoiser, asked, asked[0], checks.layers_of(denoiser))


def test_sdxl_needs_the_clip_of_sdxl(denoiser: Any, asked: list[Any]) -> None:
    noisy, sigma, context, pooled = asked
    if pooled is None:
        assert denoiser.denoise(noisy, sigma, context, torch.ones(2, 7), None, False) is not None
        return
    with pytest.raises(ValueError, match="the CLIP is not"):
        denoiser.denoise(noisy, sigma, context, None, None, False)
