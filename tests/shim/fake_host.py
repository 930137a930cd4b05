# SPDX-License-Identifier: Apache-2.0
"""The smallest hosts that satisfy python_shim's protocol: random weights, words as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch


class FakeTextEncoder:
    window = 77
    fingerprint = "fake"
    cache_directory = ""

    def __init__(self, width: int = 16) -> None:
        self.width = width
        self.on_encode: Callable[[], None] = lambda: None

    def tokenize(self, text: str) -> list[int]:
        words = (int(hashlib.sha256(w.encode()).hexdigest()[:8], 16) for w in text.split())
        return [1, *words, 2]

    def encode(self, prompts: list[str]) -> torch.Tensor:
        self.on_encode()
        rows = []
        for prompt in prompts:
            seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
            generator = torch.Generator().manual_seed(seed)
            rows.append(torch.randn(self.window, self.width, generator=generator))
        return torch.stack(rows)


class FakeDenoiser:
    family = "SD1.x"
    fingerprint = "fake"
    patchable = True

    def __init__(self, width: int = 16, weights: dict[str, torch.Tensor] | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weights = weights or {
            f"layer.to_{role}": torch.randn(8, width, generator=generator) for role in "kv"
        }

    def cross_attention(self) -> list[tuple[str, str, str]]:
        return [
            (name, "lora_unet_" + name.replace(".", "_"), "key" if name.endswith("k") else "value")
            for name in self.weights
        ]

    def effective_weight(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def with_weight_deltas(self, deltas: list, strength: float) -> FakeDenoiser:
        weights = dict(self.weights)
        for name, up, down in deltas:
            weights[name] = weights[name] + strength * (up if down is None else up @ down)
        return FakeDenoiser(weights=weights)
