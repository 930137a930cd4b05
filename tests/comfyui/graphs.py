# SPDX-License-Identifier: Apache-2.0
"""API-format graphs for the tests: small, and of few prompts so that a run takes seconds."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from comfy_server import Graph, Server

CONCEPTS = "hamburger -> apple\nowl -> tree"
PRESERVE = "pizza\nship"
# Widget values that make a run cheap; what is not named here is the schema's default.
QUICK = {
    "LacunaConceptSet": {"templates": 2, "general_prior": "none"},
    "LacunaLoRAErase": {
        "steps": 3, "images": 2, "sampling_steps": 3, "width": 64, "height": 64,
        "learning_rate": 0.01,
    },
    "LacunaEvaluateErasure": {
        "prompts": 1, "images": 1, "steps": 2, "width": 64, "height": 64, "neighbours": "pie",
    },
}  # fmt: skip


def newest_latent(server: Server, prefix: str) -> torch.Tensor:
    """From the newest file of Builder.sample: cached save nodes write no second one."""
    files = sorted(server.output.glob(f"{prefix}_*.latent"), key=lambda file: file.stat().st_mtime)
    return safetensors.torch.load_file(files[-1])["latent_tensor"]


def saved_weights(server: Server, file: str) -> dict[str, torch.Tensor]:
    """What Builder.weights saved: the model's merged keys and values."""
    return safetensors.torch.load_file(server.output / file)


def save_lora_id(listed: dict[str, Any]) -> str:
    """ComfyUI's own node to save a LoRA has been renamed once."""
    return "SaveLoRA" if "SaveLoRA" in listed else "SaveLoRANode"


def defaults(schemas: list[dict[str, Any]], node: str) -> dict[str, Any]:
    schema = next(item for item in schemas if item["id"] == node)
    return {
        item["id"]: item.get("saved", item["default"])  # as in graphs that know no newer input
        for item in schema["inputs"]
        if "default" in item
    }


class Builder:
    """Fills in the defaults, so that a test names only what it is about."""

    def __init__(self, schemas: list[dict[str, Any]]) -> None:
        self._schemas = schemas

    def checkpoint(self, name: str = "lacuna_demo.safetensors") -> Graph:
        return {"ckpt": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}}

    def concepts(self, **values: Any) -> Graph:
        node = "LacunaConceptSet"
        inputs = {"concepts": CONCEPTS, "preserve": PRESERVE, **QUICK[node], **values}
        return {"set": {"class_type": node, "inputs": defaults(self._schemas, node) | inputs}}

    def refine(self, model: list[Any] | None = None, **values: Any) -> Graph:
        node = "LacunaAttentionRefine"
        links = {"model": model or ["ckpt", 0], "clip": ["ckpt", 1], "concepts": ["set", 0]}
        inputs = defaults(self._schemas, node) | links | values
        return {"refine": {"class_type": node, "inputs": inputs}}

    def edit(self, model: list[Any] | None = None, **values: Any) -> Graph:
        """Checkpoint, Concept Set and Attention Refine."""
        return self.checkpoint() | self.concepts() | self.refine(model, **values)

    def erase(self, **values: Any) -> Graph:
        """LoRA Erase on top of Attention Refine's edit."""
        node = "LacunaLoRAErase"
        links = {
            "model": ["ckpt", 0],
            "clip": ["ckpt", 1],
            "concepts": ["set", 0],
            "refinement": ["refine", 1],
        }
        inputs = defaults(self._schemas, node) | QUICK[node] | links | values
        return {"erase": {"class_type": node, "inputs": inputs}}

    def fuse(self, loras: list[Any] | None = None, **values: Any) -> Graph:
        node = "LacunaLoRAFuse"
        links = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "loras": loras or ["erase", 0]}
        inputs = defaults(self._schemas, node) | links | {"lora_rank": 768} | values
        return {"fuse": {"class_type": node, "inputs": inputs}}

    def evaluate(self, erased: list[Any], base: list[Any] | None = None, **values: Any) -> Graph:
        node = "LacunaEvaluateErasure"
        links = {
            "base_model": base or ["ckpt", 0],
            "erased_model": erased,
            "clip": ["ckpt", 1],
            "vae": ["ckpt", 2],
            "concepts": ["set", 0],
        }
        inputs = defaults(self._schemas, node) | QUICK[node] | links | values
        return {"evaluate": {"class_type": node, "inputs": inputs}}

    def pipeline(self, **erase: Any) -> Graph:
        """Concept Set, Attention Refine ('mace'), LoRA Erase and LoRA Fuse."""
        model = erase.pop("model", ["ckpt", 0])
        return (
            self.edit(model, method="mace")
            | self.erase(model=model, **erase)
            | self.fuse(model=model)
        )

    def sample(self, model: list[Any], prefix: str, text: str = "a photo of a hamburger") -> Graph:
        """Latents of a few steps, saved below output/<prefix>."""
        name = prefix.replace("/", "_")
        encode = {"class_type": "CLIPTextEncode"}
        return {
            f"{name}_pos": encode | {"inputs": {"clip": ["ckpt", 1], "text": text}},
            f"{name}_neg": encode | {"inputs": {"clip": ["ckpt", 1], "text": ""}},
            f"{name}_empty": {
                "class_type": "EmptyLatentImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 1},
            },
            f"{name}_sampler": {
                "class_type": "KSampler",
                "inputs": {
                    "model": model,
                    "seed": 3,
                    "steps": 4,
                    "cfg": 4.0,
                    "sampler_name": "euler",
                    "scheduler": "normal",
                    "positive": [f"{name}_pos", 0],
                    "negative": [f"{name}_neg", 0],
                    "latent_image": [f"{name}_empty", 0],
                    "denoise": 1.0,
                },
            },
            f"{name}_save": {
                "class_type": "SaveLatent",
                "inputs": {"samples": [f"{name}_sampler", 0], "filename_prefix": prefix},
            },
        }

    def weights(self, model: list[Any], name: str, file: str = "") -> Graph:
        return {name: {"class_type": "LacunaTestWeights", "inputs": {"model": model, "file": file}}}

    def report(self) -> Graph:
        return {"report": {"class_type": "PreviewAny", "inputs": {"source": ["refine", 3]}}}
