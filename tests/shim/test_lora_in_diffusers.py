# SPDX-License-Identifier: Apache-2.0
"""The LoRA output, loaded by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

from python_shim import loader

FP16_ROUNDING = 2.0**-11


@pytest.fixture(scope="module")
def edit(demo: Any) -> list:
    model, clip, _ = demo
    pack = loader.load().NodePack()
    concepts = pack.run(
        "LacunaConceptSet",
        {"concepts": "hamburger -> apple", "general_prior": "none", "templates": 4},
    )[0]
    inputs = {"model": model, "clip": clip, "concepts": concepts, "lora_rank": 768}
    return pack.run("LacunaAttentionRefine", inputs)


def test_it_loads_completely_and_gives_the_patched_weights(
    expand: ModuleType, demo: Any, edit: list, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft", reason="diffusers loads LoRAs with peft")
    model = demo[0]
    erased, _, lora, *_ = edit
    file = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(lora, file)
    expand.main(["--out", str(tmp_path), "--diffusers"])
    folder = next(item for item in tmp_path.iterdir() if (item / "model_index.json").is_file())
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)

    # diffusers raises ValueError when a key of the file is left over.
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="erase")
    pipeline.fuse_lora(adapter_names=["erase"])
    pipeline.unload_lora_weights()
    weights = dict(pipeline.unet.named_parameters())
    checked = 0
    for name, lora_name, _ in model.cross_attention():
        path = next(
            key for key in weights
            if "lora_unet_" + key.removesuffix(".weight").replace(".", "_") == lora_name
        )  # fmt: skip
        before, after = model.effective_weight(name), erased.effective_weight(name)
        error = (weights[path].float() - after).norm() / (after - before).norm()
        # Two float16 factors; the pipeline itself computes in float32.
        assert error < 4 * FP16_ROUNDING
        checked += 1
    assert checked == 8
    untouched = sum(
        torch.equal(model.effective_weight(name), erased.effective_weight(name))
        for name in model.weight_names()
    )
    assert untouched == len(model.weight_names()) - 8


def test_any_kohya_loader_gets_the_patched_weights(demo: Any, edit: list) -> None:
    """What A1111 and Forge do with the tensors: up @ down * alpha / rank, nothing left over."""
    model, (erased, _, lora, *_) = demo[0], edit
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    names = {name: lora_name for name, lora_name, _ in model.cross_attention()}
    assert set(lora) == {f"{name}.{part}" for name in names.values() for part in parts}
    for name, lora_name in names.items():
        down, up, alpha = (lora[f"{lora_name}.{part}"] for part in parts)
        assert down.dtype == up.dtype == torch.float16
        assert down.shape[0] == up.shape[1] == alpha.item()  # hence strength 1 is the edit
        change = up.float() @ down.float() * (alpha.item() / down.shape[0])
        wanted = erased.effective_weight(name) - model.effective_weight(name)
        assert (change - wanted).norm() < 4 * FP16_ROUNDING * wanted.norm()
