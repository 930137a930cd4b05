# SPDX-License-Identifier: Apache-2.0
"""Forward passes of the headless host: with a tap, with gradients, stopped half-way."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forward_checks as checks

from python_shim import sampling
from python_shim.diffusers_host import DiffusersDenoiser, DiffusersHost


@contextmanager
def training() -> Iterator[None]:
    """As the core sets it, inside a host's inference mode."""
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module", params=["trained", "random", "loaded in inference mode"])
def models(request, demo, demo_checkpoint, expand, tmp_path_factory) -> tuple[Any, Any]:
    """Denoiser and text encoder."""
    if request.param == "trained":
        return demo[:2]
    folder = tmp_path_factory.mktemp("models")
    file = demo_checkpoint
    if request.param == "random":
        file = expand.write_checkpoint(folder, random=True)
    with torch.inference_mode(request.param != "random"):
        host = DiffusersHost(file, output_directory=folder, cache_directory=folder)
        return host.load_checkpoint("")[:2]


@pytest.fixture(scope="module")
def denoiser(models: tuple[Any, Any]) -> DiffusersDenoiser:
    """With a context map and weight changes on the model."""
    (key, _, _), (value, _, _) = models[0].cross_attention()[:2]
    generator = torch.Generator().manual_seed(8)
    up, down = torch.randn(320, 4, generator=generator), torch.randn(4, 768, generator=generator)
    full = torch.randn(320, 768, generator=generator)
    deltas = [(key, 0.02 * up, down), (value, 0.02 * full, None)]
    identity = torch.eye(768)
    edited = models[0].with_weight_deltas(deltas, 0.5)
    return edited.with_input_maps(checks.sided(edited, identity, -identity), 0.05)


@pytest.fixture(scope="module")
def asked(denoiser, models) -> list[Any]:
    with torch.inference_mode():
        return checks.request(denoiser, models[1].embed)


def test_one_step_of_the_sampler(denoiser, models):
    """From full noise to zero in one Euler step is the clean estimate itself."""
    context, pooled = models[1].embed(["a photo of a cat"])
    assert pooled is None
    expected = denoiser.sample(
        7, 1, 1.0, "euler", "normal", context, context, torch.zeros(1, 4, 8, 8), 1.0,
        lambda done, total: None,
    )  # fmt: skip
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    sigma = denoiser.noise_levels[-1:]
    clean = denoiser.denoise(noise * (1 + sigma**2).sqrt(), sigma, context, None, None, False)
    checks.close(denoiser.to_host_latent(clean), expected, 1e-5)
    checks.close(denoiser.from_host_latent(expected), clean, 1e-5)


def test_every_row_has_its_own_noise_level(denoiser, asked):
    noisy, sigma, context, _ = asked
    both = denoiser.denoise(noisy, sigma, context, None, None, False)
    for row in (slice(0, 1), slice(1, 2)):
        one = denoiser.denoise(noisy[row], sigma[row], context[row], None, None, False)
        checks.close(both[row], one, 1e-5)


def test_noise_levels(models):
    levels = models[0].noise_levels
    assert levels.shape == (1000,) and levels.dtype == torch.float32
    assert torch.equal(levels, sampling.NoiseSchedule().sigmas) and bool((levels.diff() > 0).all())
    assert models[0].latent_shape(512, 384) == [4, 48, 64]


def test_tap(denoiser, asked):
    checks.check_tap(denoiser, asked, denoiser._base.unet)
    blocks = [layer.split(".")[1] for layer in checks.layers_of(denoiser)]
    assert blocks == ["input_blocks", "middle_block", "output_blocks", "output_blocks"]


def test_attention_only(denoiser, asked):
    checks.check_attention_only(denoiser, asked, denoiser._base.unet)
    with training():
        checks.check_attention_only(denoiser, asked, denoiser._base.unet)


def test_gradients(denoiser, asked):
    base = denoiser._base
    layers = checks.layers_of(denoiser)
    with training():
        weighting = torch.randn(asked[0].shape, generator=torch.Generator().manual_seed(4))
        with checks.unharmed(base.unet):
            ours = checks.tapped_gradients(denoiser, asked, weighting, layers)
        double = copy.deepcopy(base.unet).requires_grad_(False).double()
        for name in {change.name for change in denoiser._changes}:
            parameter = double.get_parameter(base.module_names[name])
            parameter.data = denoiser.effective_weight(name).double()
        noisy, sigma, context, _ = (x if x is None else x.clone().double() for x in asked)
        level = sigma.reshape(-1, 1, 1, 1)
        for each in denoiser._input_maps:
            (factor,) = each.factors
            change = torch.eye(768) + each.strength * factor.T
            for name in each.names:
                parameter = double.get_parameter(base.module_names[name])
                parameter.data = parameter.data @ change.double()

        def clean() -> torch.Tensor:
            time = torch.tensor([300, 700])
            noise = double(noisy / (level**2 + 1).sqrt(), time, context).sample
            return noisy - level * noise

        paths = {layer: base.module_names[f"{layer}.to_k.weight"] for layer in layers}
        copies = {
            layer: double.get_submodule(path.removesuffix(".weight"))
            for layer, path in paths.items()
        }
        expected = checks.reference_gradients(denoiser, layers, copies, clean, weighting)
    checks.check_same_gradients(ours, expected)


def test_gradient_of_the_context(denoiser, asked):
    with training():
        checks.check_context_gradient(denoiser, asked, denoiser._base.unet)


def test_exceptions(denoiser, asked):
    checks.check_exceptions(denoiser, asked, denoiser._base.unet)
    with training():
        checks.check_exceptions(denoiser, asked, denoiser._base.unet)


def test_weights_are_merged_once(denoiser, asked, monkeypatch):
    merged: list[str] = []
    effective = DiffusersDenoiser.effective_weight
    monkeypatch.setattr(
        DiffusersDenoiser,
        "effective_weight",
        lambda self, name: merged.append(name) or effective(self, name),
    )
    view = denoiser.with_weight_deltas(
        [(denoiser.cross_attention()[2][0], torch.ones(320, 768), None)], 0.01
    )
    first = view.denoise(*asked, None, False)
    mapped = view.with_input_maps(
        checks.sided(view, torch.eye(768), None), 0.1
    )  # shares the merged weights
    different = mapped.denoise(*asked, None, False)
    assert torch.equal(view.denoise(*asked, None, False), first)
    assert not torch.equal(different, first)
    assert len(merged) == 3 == len(set(merged))
    denoiser.denoise(*asked, None, False)
    assert torch.equal(view.denoise(*asked, None, False), first)
    assert len(merged) == 8, "one set of merged weights is kept, not all"
