# SPDX-License-Identifier: Apache-2.0
"""The whole graph on CUDA tensors gives what it gives on a CPU; skipped where there is no CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_host import FakeProgress

from python_shim import loader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytest.importorskip("diffusers", reason="needs diffusers")

DEVICES = ("cpu", "cuda")
CONCEPTS = {
    "concepts": "hamburger -> apple\nowl -> tree\nship -> house",
    "preserve": "pizza", "general_prior": "none", "templates": 2,
}  # fmt: skip
ERASE = {
    "width": 64, "height": 64, "images": 2, "sampling_steps": 4, "batch": 2, "steps": 6,
    "learning_rate": 0.01, "suppress_value": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from python_shim.diffusers_host import DiffusersHost

    folder = tmp_path_factory.mktemp("cuda")
    return {
        device: DiffusersHost(
            demo_checkpoint, output_directory=folder, cache_directory=folder, device=device
        ).load_checkpoint("")
        for device in DEVICES
    }


def run(node: str, **inputs: Any) -> list:
    return loader.load().NodePack().run(node, inputs, FakeProgress())


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu() - expected.cpu()).norm() / expected.cpu().norm())


def edited_weights(model: Any, base: Any) -> torch.Tensor:
    """What all cross-attention weights were changed by."""
    return torch.cat([
        (model.effective_weight(name) - base.effective_weight(name)).flatten().cpu()
        for name, _, _ in base.cross_attention()
    ])  # fmt: skip


def draw(model: Any, clip: Any) -> torch.Tensor:
    return model.sample(
        7, 6, 4.0, "dpmpp_2m", "karras", clip.encode(["a photo of an owl"]), clip.encode([""]),
        torch.zeros(1, 4, 8, 8), 1.0, lambda done, total: None,
    )  # fmt: skip


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model._base.unet.named_parameters())


@pytest.mark.parametrize("method", ["mace", "uce"])
def test_closed_forms(hosts, method):
    changes, latents = {}, {}
    for device, (model, clip, _) in hosts.items():
        concepts = run("LacunaConceptSet", **CONCEPTS)[0]
        edited = run(
            "LacunaAttentionRefine", model=model, clip=clip, concepts=concepts, method=method
        )[0]
        changes[device] = edited_weights(edited, model)
        latents[device] = draw(edited, clip)
    assert difference(changes["cuda"], changes["cpu"]) < 1e-3
    assert difference(latents["cuda"], latents["cpu"]) < 1e-2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gradient", ["full", "cached"])
def test_training_and_fusion(hosts, gradient, mode):
    losses, changes, previews = {}, {}, {}
    for device, (model, clip, vae) in hosts.items():
        before = {name: value.clone() for name, value in parameters(model).items()}
        with mode():
            concepts = run("LacunaConceptSet", **CONCEPTS)[0]
            loaded = {"model": model, "clip": clip}
            refinement = run("LacunaAttentionRefine", concepts=concepts, method="mace", **loaded)[1]
            loras, previews[device], loss, _ = run(
                "LacunaLoRAErase", concepts=concepts, refinement=refinement, vae=vae,
                gradient=gradient, **ERASE, **loaded,
            )  # fmt: skip
            fused = run("LacunaLoRAFuse", loras=loras, **loaded)[0]
        losses[device] = torch.tensor(loss["loss"])
        changes[device] = edited_weights(fused, model)
        draw(fused, clip)
        for name, value in parameters(model).items():
            assert value.device.type == device and torch.equal(value, before[name]), name
            assert value.grad is None and not value.requires_grad
    assert difference(losses["cuda"], losses["cpu"]) < 0.02
    assert difference(changes["cuda"], changes["cpu"]) < 0.05
    assert difference(previews["cuda"], previews["cpu"]) < 0.05


def test_evaluation(hosts):
    model, clip, vae = hosts["cuda"]
    concepts = run("LacunaConceptSet", **CONCEPTS)[0]
    erased = run("LacunaAttentionRefine", model=model, clip=clip, concepts=concepts)[0]
    outputs = run(
        "LacunaEvaluateErasure", base_model=model, erased_model=erased, clip=clip, vae=vae,
        concepts=concepts, level="quick", images=1, steps=4, width=64, height=64,
    )  # fmt: skip
    assert outputs[0].device.type == "cpu"
