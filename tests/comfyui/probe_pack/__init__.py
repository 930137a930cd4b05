# SPDX-License-Identifier: Apache-2.0
"""Nodes of the test suite: look at weights from inside ComfyUI, and break things on purpose."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import folder_paths
import safetensors.torch
import torch


class Weights:
    """Loads the MODEL as for sampling, hashes its weights, writes the K/V matrices to a file."""

    CATEGORY = "tests"
    FUNCTION = "look"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "file": ("STRING", {"default": ""})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    def look(self, model: Any, file: str) -> dict[str, Any]:
        comfy.model_management.load_models_gpu([model])
        weights = model.model.state_dict()
        digest = hashlib.sha256()
        for key in sorted(weights):
            digest.update(key.encode())
            digest.update(weights[key].contiguous().view(-1).view(torch.uint8).numpy())
        if file:
            matrices = {
                k: v.clone() for k, v in weights.items() if ".attn2.to_k" in k or ".attn2.to_v" in k
            }
            safetensors.torch.save_file(
                matrices, os.path.join(folder_paths.get_output_directory(), file)
            )
        return {"ui": {"text": [digest.hexdigest()]}}


class Patches:
    """Tells how many bytes the patches of a MODEL hold; what they share counts once."""

    CATEGORY = "tests"
    FUNCTION = "count"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def count(self, model: Any) -> dict[str, Any]:
        held: dict[int, int] = {}

        def look(value: Any) -> None:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, (list, tuple)):
                for item in value:
                    look(item)
            elif hasattr(value, "weights"):
                look(value.weights)

        for patches in model.patches.values():
            look(patches)
        return {"ui": {"text": [str(sum(held.values()))]}}


class Fail:
    """Passes the model on to nobody."""

    CATEGORY = "tests"
    FUNCTION = "fail"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def fail(self, model: Any) -> None:
        comfy.model_management.load_models_gpu([model])
        raise RuntimeError("failed on purpose")


class OutOfMemory:
    """A MODEL that runs out of memory after so many text cross-attentions."""

    CATEGORY = "tests"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "after": ("INT", {"default": 0})}}

    def patch(self, model: Any, after: int) -> tuple[Any]:
        calls = iter(range(after))

        def out_of_memory(n: torch.Tensor, _options: dict[str, Any]) -> torch.Tensor:
            if next(calls, None) is None:
                raise torch.OutOfMemoryError("no memory left, on purpose")
            return n

        patched = model.clone()
        patched.set_model_attn2_output_patch(out_of_memory)
        return (patched,)


class Flux(torch.nn.Module):
    """Enough of a transformer model to be told apart: no cross-attention that reads a text."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = torch.nn.Linear(2, 2)
        self.model_config = type("Flux", (), {})()


class OtherModel:
    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        device = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(Flux(), device, device),)


class Brightness:
    """A detector that sees every name in bright pictures, and fails on what it is told to."""

    name = "brightness"
    version = "1"

    def __init__(self, fails_on: str) -> None:
        self._fails_on = fails_on

    def score(self, images: torch.Tensor, names: list[str]) -> torch.Tensor:
        if self._fails_on in names:
            raise RuntimeError("failed on purpose")
        return images.mean((1, 2, 3)).unsqueeze(1).repeat(1, len(names))


class Detector:
    """How another pack fills the detector socket: any node with an output of that type."""

    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("LACUNA_DETECTOR",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"fails_on": ("STRING", {"default": ""})}}

    def make(self, fails_on: str) -> tuple[Any]:
        return (Brightness(fails_on),)


VISION_CONFIG = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_hidden_layers": 2, "image_size": 32, "patch_size": 16, "num_channels": 3,
    "projection_dim": 24, "hidden_act": "quick_gelu", "model_type": "clip_vision_model",
}  # fmt: skip


class ClipVision:
    """A CLIP_VISION as a loader gives it, with random weights."""

    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("CLIP_VISION",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        with tempfile.TemporaryDirectory() as folder:
            config = os.path.join(folder, "config.json")
            with open(config, "w", encoding="utf-8") as file:
                json.dump(VISION_CONFIG, file)
            vision = comfy.clip_vision.ClipVisionModel(config)
        generator = torch.Generator().manual_seed(1)
        state = vision.get_sd()
        vision.load_sd(
            {
                key: 0.2 * torch.randn(value.shape, generator=generator)
                for key, value in state.items()
                if value.is_floating_point()
            }
        )
        return (vision,)


NODE_CLASS_MAPPINGS = {
    "LacunaTestClipVision": ClipVision,
    "LacunaTestDetector": Detector,
    "LacunaTestWeights": Weights,
    "LacunaTestPatches": Patches,
    "LacunaTestFail": Fail,
    "LacunaTestOutOfMemory": OutOfMemory,
    "LacunaTestOtherModel": OtherModel,
}
