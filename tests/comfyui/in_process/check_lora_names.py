# SPDX-License-Identifier: Apache-2.0
"""Where each loader puts the parts of an exported LoRA, on the full layouts of SD1.5 and SDXL.

Forge looks names up in ComfyUI's own table (a copy of 0.3.77's comfy/lora.py); A1111 has rules of
its own, stated here as arithmetic. Neither program is run.
"""

from __future__ import annotations

import re
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.supported_models
import pytest
import torch

COMMON = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
          "use_spatial_transformer": True, "legacy": False}  # fmt: skip
SD15 = {
    **COMMON,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "context_dim": 768,
    "use_linear_in_transformer": False,
}
SDXL = {
    **COMMON,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_head_channels": 64,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
MODELS = {
    "SD1.5": (comfy.supported_models.SD15, comfy.model_base.BaseModel, SD15, 16),
    "SDXL": (comfy.supported_models.SDXL, comfy.model_base.SDXL, SDXL, 70),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> tuple[Any, int]:
    """(the model without memory for its weights, number of cross-attention layers)."""
    config, kind, unet, layers = MODELS[request.param]
    with torch.device("meta"), torch.inference_mode():
        return kind(config(dict(unet)), device=torch.device("meta")), layers


def a1111_module(name: str) -> str:
    """The module A1111 looks up for `name`, dots as underscores.

    diffusers block names are counted through to those of the checkpoint, three blocks a level;
    any other name has its prefix exchanged.
    """
    inner = name.removeprefix("lora_unet_")
    if match := re.fullmatch(r"(down|up)_blocks_(\d+)_attentions_(\d+)_(.+)", inner):
        side, level, layer, rest = match[1], int(match[2]), int(match[3]), match[4]
        block = 3 * level + layer + (1 if side == "down" else 0)
        inner = f"{'input' if side == 'down' else 'output'}_blocks_{block}_1_{rest}"
    elif match := re.fullmatch(r"mid_block_attentions_0_(.+)", inner):
        inner = f"middle_block_1_{match[1]}"
    return f"diffusion_model_{inner}"


def _names(host: ModuleType, model: Any) -> dict[str, str]:
    """Weight -> name in the LoRA file."""
    denoiser = host.ComfyDenoiser(SimpleNamespace(model=model))
    return {name: lora_name for name, lora_name, _ in denoiser.cross_attention()}


def test_a1111_finds_the_module_of_every_name(host: ModuleType, model: tuple[Any, int]) -> None:
    module, layers = model
    names = _names(host, module)
    assert len(names) == len(set(names.values())) == 2 * layers
    known = {path.replace(".", "_"): path for path, _ in module.named_modules()}
    for name, lora_name in names.items():
        assert known[a1111_module(lora_name)] + ".weight" == name


def test_forge_and_comfyui_find_the_weight_of_every_name(
    host: ModuleType, model: tuple[Any, int]
) -> None:
    known = comfy.lora.model_lora_keys_unet(model[0], {})
    assert all(known[lora_name] == name for name, lora_name in _names(host, model[0]).items())
