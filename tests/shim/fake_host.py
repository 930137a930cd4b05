# SPDX-License-Identifier: Apache-2.0
"""The smallest hosts that satisfy python_shim's protocol: random weights, words as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import ClassVar

import torch

Tap = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class FakeTextEncoder:
    window = 77
    fingerprint = "fake"
    weight_samples: ClassVar[dict[str, list[float]]] = {}
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

    def encode_start(self, prompts: list[str], length: int) -> torch.Tensor:
        return self.encode(prompts)[:, :length]

    def embed(self, prompts: list[str]) -> tuple[torch.Tensor, None]:
        return self.encode(prompts), None


class FakeDenoiser:
    family = "SD1.x"
    fingerprint = "fake"
    weight_samples: ClassVar[dict[str, list[float]]] = {}
    patchable = True
    revision = ""

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

    def text_entries(self) -> list[tuple[str, str, str, str, int, int]]:
        return [(*each, "context", 0, 0) for each in self.cross_attention()]

    def effective_weight(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def with_weight_deltas(self, deltas: list, strength: float) -> FakeDenoiser:
        weights = dict(self.weights)
        for name, up, down in deltas:
            weights[name] = weights[name] + strength * (up if down is None else up @ down)
        return FakeDenoiser(weights=weights)

    def with_weight_maps(self, maps: list, strength: float) -> FakeDenoiser:
        weights = dict(self.weights)
        for entries, out, inner in maps:
            delta = out if inner is None else out @ inner
            for name, _first, _columns in entries:
                weights[name] = weights[name] + strength * weights[name] @ delta
        return FakeDenoiser(weights=weights)

    def acts_on(self, context: torch.Tensor) -> None:
        return None

    noise_levels = torch.linspace(0.03, 14.0, 1000)

    def latent_shape(self, width: int, height: int) -> list[int]:
        return [4, height // 8, width // 8]

    def to_host_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / 2

    def from_host_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return latent * 2

    def denoise(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor | None,
        tap: Tap | None,
        attention_only: bool,
    ) -> torch.Tensor | None:
        """Each layer reads the text with the pixels as queries and shifts the picture a little."""
        image = noisy / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt()
        keys = [name for name in self.weights if name.endswith("to_k")]
        for name in keys:
            key = context @ self.weights[name].T
            value = context @ self.weights[name.removesuffix("to_k") + "to_v"].T
            pixels = image.flatten(2).transpose(1, 2)
            query = pixels.repeat(1, 1, key.shape[-1] // pixels.shape[-1])
            attend = _plain_attention if tap is None else tap
            read = attend(name.removesuffix(".to_k"), query, key, value, 2)
            if attention_only and name == keys[-1]:
                return None
            shift = read[..., : image.shape[1]].transpose(1, 2).reshape(image.shape)
            image = image + 0.1 * shift
        return image


def _plain_attention(
    _layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(2)


class FakeImageDecoder:
    """A pixel of the picture is a place in the latent."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent[:, :3].permute(0, 2, 3, 1).sigmoid()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        latent = images.permute(0, 3, 1, 2).clamp(1e-3, 1 - 1e-3).logit()
        return torch.cat([latent, latent[:, :1]], dim=1)


class FakeProgress:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, int]] = []
        self.lines: list[str] = []
        self.previews: list[torch.Tensor] = []

    def report(self, done: int, total: int) -> None:
        self.reports.append((done, total))

    def check(self) -> None:
        pass

    def status(self, line: str) -> None:
        self.lines.append(line)

    def preview(self, image: torch.Tensor) -> None:
        self.previews.append(image)
