# SPDX-License-Identifier: Apache-2.0
"""UNets that are told more than a text, or predict something else than noise: drawn, trained and
judged as ComfyUI's sampler would, or refused in one sentence before any work starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.supported_models as kinds
import pytest
import torch
from check_adapters import (
    SMALL,
    SMALL_SD2,
    SMALL_SDXL,
    conditioning,
    random_unet,
    small_sdxl_clip,
)
from check_forward import checks, sd2_clip
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

SIZE = {"width": 64, "height": 64}
UNCLIP = {**SMALL_SD2, "num_classes": "sequential", "adm_in_channels": 1536}


def widened(model: Any, channels: int) -> Any:
    """The same UNet with more input channels, of random weights: what is read there counts."""
    state = {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}
    first = state["input_blocks.0.0.weight"]
    generator = torch.Generator().manual_seed(5)
    more = torch.randn(first.shape[0], channels - 4, 3, 3, generator=generator) * 0.02
    state["input_blocks.0.0.weight"] = torch.cat([first, more.to(first)], dim=1)
    return comfy.sd.load_diffusion_model_state_dict(state)


@pytest.fixture(scope="module", params=[9, 8], ids=["inpainting", "instruct-pix2pix"])
def wide(request: pytest.FixtureRequest, checkpoint: Any) -> Any:
    with torch.inference_mode():
        return widened(checkpoint[0], request.param)


def small(kind: Any, **changes: Any) -> Any:
    """A MODEL of a kind whose real shapes are too large for a test; it reads the demo's texts."""
    config = kind({**SMALL, "context_dim": 768, "dtype": torch.float32, **changes})
    config.unet_config.pop("disable_self_attentions", None)  # of the upscaler, for four levels
    model = config.get_model({}, "")
    weights = model.diffusion_model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        weights[name] = torch.randn(weight.shape, generator=generator) * 0.02
    model.diffusion_model.load_state_dict(weights)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Silent:
    def __getattr__(self, _name: str) -> Any:
        return lambda *_: None


class Pack:
    """The nodes, as comfyui_nodes.py runs them."""

    def __init__(self, host: ModuleType, folder: Path) -> None:
        from lacuna_shim import loader

        self._pack = loader.load().NodePack(str(folder))
        listed = json.loads(self._pack.schemas())
        self._inputs = {item["id"]: item["inputs"] for item in listed}
        self._adapters = {
            "MODEL": host.ComfyDenoiser,
            "CLIP": host.ComfyTextEncoder,
            "VAE": host.ComfyImageDecoder,
        }

    def __call__(self, node: str, **values: Any) -> list[Any]:
        inputs = {item["id"]: item["default"] for item in self._inputs[node] if "default" in item}
        types = {item["id"]: item["type"] for item in self._inputs[node]}
        for name, value in values.items():
            inputs[name] = self._adapters.get(types[name], lambda given: given)(value)
        return self._pack.run(node, inputs, Silent())

    def concepts(self) -> Any:
        return self(
            "LacunaConceptSet", concepts="hamburger -> apple", templates=2, general_prior="none"
        )[0]

    def erase(self, model: Any, clip: Any, gradient: str) -> Any:
        return self(
            "LacunaLoRAErase", model=model, clip=clip, concepts=self.concepts(), gradient=gradient,
            steps=3, images=2, sampling_steps=3, learning_rate=0.01, **SIZE,
        )[0]  # fmt: skip

    def evaluate(self, base: Any, erased: Any, clip: Any, vae: Any) -> Any:
        return self(
            "LacunaEvaluateErasure", base_model=base, erased_model=erased, clip=clip, vae=vae,
            concepts=self.concepts(), prompts=1, images=1, steps=2, neighbours="pie", **SIZE,
        )  # fmt: skip


@pytest.fixture
def pack(host: ModuleType, tmp_path: Path) -> Pack:
    return Pack(host, tmp_path)


# --- models that also read a picture ---


def check_one_step(host: ModuleType, model: Any, clip: Any) -> torch.Tensor:
    """From full noise to zero in one Euler step is the clean estimate itself."""
    denoiser, text = host.ComfyDenoiser(model), "a photo of a hamburger"
    latent = torch.zeros(1, *denoiser.latent_shape(64, 64))
    noise = comfy.sample.prepare_noise(latent, 7)
    expected = comfy.sample.sample(
        model, noise, 1, 1.0, "euler", "normal", conditioning(clip, text),
        conditioning(clip, ""), latent, seed=7, disable_pbar=True,
    )  # fmt: skip
    sigma = denoiser.noise_levels[-1:]
    context, pooled = host.ComfyTextEncoder(clip).embed([text])
    clean = denoiser.denoise(noise * (1 + sigma**2).sqrt(), sigma, context, pooled, None, False)
    checks.close(denoiser.to_host_latent(clean), expected, 1e-4)
    return clean


def test_the_demo_model_is_told_what_the_sampler_tells(
    host: ModuleType, checkpoint: Any, wide: Any
) -> None:
    plain = check_one_step(host, checkpoint[0], checkpoint[1])
    told = check_one_step(host, wide, checkpoint[1])
    reads_a_blank = host.ComfyDenoiser(wide).family == "SD1.x"  # instruct-pix2pix reads zeros
    assert torch.allclose(told, plain, atol=1e-3) != reads_a_blank


@pytest.mark.parametrize("kind", ["SDXL inpainting", "SD2.x inpainting", "unCLIP"])
def test_other_models_are_told_what_the_sampler_tells(host: ModuleType, kind: str) -> None:
    config, clip = {
        "SDXL inpainting": ({**SMALL_SDXL, "in_channels": 9}, small_sdxl_clip),
        "SD2.x inpainting": ({**SMALL_SD2, "in_channels": 9}, sd2_clip),
        "unCLIP": (UNCLIP, sd2_clip),
    }[kind]
    check_one_step(host, random_unet(config), clip())


@pytest.mark.parametrize("gradient", ["full", "cached"])
def test_loras_are_trained(checkpoint: Any, wide: Any, pack: Pack, gradient: str) -> None:
    loras = pack.erase(wide, checkpoint[1], gradient)
    fused = pack("LacunaLoRAFuse", model=wide, clip=checkpoint[1], loras=loras)[0]
    base = type(fused)(wide)
    changed = [
        name
        for name, _, role in base.cross_attention()
        if role == "key"
        and not torch.equal(fused.effective_weight(name), base.effective_weight(name))
    ]
    assert len(changed) == 4


def test_erasures_are_judged(checkpoint: Any, wide: Any, pack: Pack) -> None:
    _, clip, vae = checkpoint
    refined = pack("LacunaAttentionRefine", model=wide, clip=clip, concepts=pack.concepts())[0]
    report = json.loads(pack.evaluate(wide, refined.patcher, clip, vae)[1])
    # The edit acts where a prompt names the concept, and nowhere else.
    for kind, changes in (("erased", True), ("unrelated", False)):
        pairs = [pair for pair in report["pairs"] if pair["list"] == kind]
        assert pairs and all((pair["latent_change"] > 0) == changes for pair in pairs)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: small(kinds.SDXLRefiner, num_classes="sequential", adm_in_channels=2560),
            "is an SDXL refiner, which only finishes",
        ),
        (lambda: small(kinds.SD_X4Upscaler, in_channels=7), "is an upscaler"),
        (lambda: small(kinds.LotusD, adm_in_channels=4), "is an estimator of depth"),
        (lambda: small(kinds.SD20, in_channels=5), "reads 5 channels and ComfyUI gives it 9"),
    ],
    ids=["refiner", "upscaler", "depth", "unknown"],
)
def test_what_cannot_draw_from_text_is_refused_at_once(
    checkpoint: Any, pack: Pack, monkeypatch: pytest.MonkeyPatch, make: Any, sentence: str
) -> None:
    _, clip, vae = checkpoint
    model = make()
    monkeypatch.setattr(
        "lacuna_shim.comfyui_text.ComfyTextEncoder._encode",
        lambda *_: pytest.fail("texts were encoded first"),
    )
    monkeypatch.setattr("lacuna_shim.comfyui_text.ComfyTextEncoder.width", 768)
    for attempt in (
        lambda: pack.erase(model, clip, "cached"),
        lambda: pack.evaluate(model, model, clip, vae),
    ):
        with pytest.raises(ValueError, match=sentence) as refused:
            attempt()
        assert str(refused.value).count(". ") == 0


# --- what a model predicts ---


@pytest.mark.parametrize("zsnr", [False, True], ids=["", "zero-terminal SNR"])
@pytest.mark.parametrize("sampling", ["eps", "v_prediction", "x0"])
def test_clean_latents_of_every_prediction(
    host: ModuleType, checkpoint: Any, sampling: str, zsnr: bool
) -> None:
    """At every level, the last one (sigma 4518) included: noised, scaled and read as the host
    does, from its own three functions."""
    model = ModelSamplingDiscrete().patch(checkpoint[0], sampling, zsnr)[0]
    denoiser = host.ComfyDenoiser(model)
    context, _ = host.ComfyTextEncoder(checkpoint[1]).embed(["a photo of a cat"])
    levels = denoiser.noise_levels
    assert (float(levels[-1]) > 4000) == zsnr
    generator = torch.Generator().manual_seed(6)
    clean = torch.randn(1, 4, 8, 8, generator=generator)
    comfy.model_management.load_models_gpu([model])
    theirs, network = model.get_model_object("model_sampling"), model.model.diffusion_model
    for timestep in (0, 300, 700, 899, 998, 999):
        sigma = levels[timestep : timestep + 1]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = clean + sigma * noise  # as training and judging do it
        torch.testing.assert_close(noisy, theirs.noise_scaling(sigma, noise.clone(), clean))
        assert int(theirs.timestep(sigma)) == timestep
        with torch.inference_mode():
            out = network(
                theirs.calculate_input(sigma, noisy), theirs.timestep(sigma).float(),
                context=context, transformer_options={},
            )  # fmt: skip
        expected = theirs.calculate_denoised(sigma, out.float(), noisy)
        seen = denoiser.denoise(noisy, sigma, context, None, None, False)
        assert seen.isfinite().all()
        # To the rounding of a latent that is mostly noise.
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5 * (1 + float(sigma)))
        if sampling == "v_prediction":  # the noise that judging compares, from the definition of v
            alpha = (sigma**2 + 1).rsqrt()
            predicted = alpha * out + sigma * alpha * (alpha * noisy)
            torch.testing.assert_close((noisy - seen) / sigma, predicted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", ["full", "cached"])
def test_zero_terminal_snr_is_trained(checkpoint: Any, pack: Pack, gradient: str) -> None:
    model = ModelSamplingDiscrete().patch(checkpoint[0], "v_prediction", True)[0]
    loras = pack.erase(model, checkpoint[1], gradient)
    fused = pack("LacunaLoRAFuse", model=model, clip=checkpoint[1], loras=loras)[0]
    base = type(fused)(model)
    for name, _, role in base.cross_attention():
        weight = fused.effective_weight(name)
        assert weight.isfinite().all()
        assert role == "value" or not torch.equal(weight, base.effective_weight(name))
