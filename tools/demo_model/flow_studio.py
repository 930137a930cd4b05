# SPDX-License-Identifier: Apache-2.0
"""Pictures of the demo transformer, drawn from its compact weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from evaluator import Evaluator
from networks import (
    FLOW_COPIES,
    LATENT_CHANNELS,
    LATENT_SIZE,
    load_weights,
    make_decoder,
    make_transformer,
)
from score import Studio
from stage_decoder import load_latent_space
from stage_text import load_text_encoder
from stage_transformer import MULTIPLIER, SHIFT
from training import Options


def shifted_sigmas(steps: int) -> torch.Tensor:
    """Noise levels from 1 to 0, float [steps + 1]: evenly spaced, then moved to SD3's shift."""
    even = torch.linspace(1, 1 / MULTIPLIER, steps)
    return torch.cat([SHIFT * even / (1 + (SHIFT - 1) * even), torch.zeros(1)])


class FlowStudio(Studio):
    """A studio of the demo transformer: Euler steps along its velocity, guided (CFG)."""

    def __init__(
        self, weights: Path, assets: Path, judge: Evaluator, sampling: dict[str, Any]
    ) -> None:
        options = Options(work=assets, steps=0, start=assets)
        self._judge, self._sampling = judge, sampling
        self._model = load_weights(make_transformer(), weights).eval()
        self._text = load_text_encoder(options)
        self._decoder = load_weights(make_decoder(), assets / "vae_decoder.safetensors")
        self._latent_std = load_latent_space(options)[1]

    @torch.no_grad()
    def draw(
        self, model: Any, prompts: Sequence[str], clip: Any = None, seed: int | None = None
    ) -> torch.Tensor:
        """Pictures [n, 64, 64, 3] of the prompts; `model` and `clip` are not asked."""
        s = self._sampling
        first = s["seed"] if seed is None else seed
        images = []
        for start in range(0, len(prompts), s["batch"]):
            part = [*prompts[start : start + s["batch"]], ""]
            count = len(part) - 1
            hidden, pooled = self._text.conditioning(self._text.rows(part))
            rows = torch.tensor([*range(count), *[count] * count])
            shape = (count, FLOW_COPIES * LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
            generator = torch.Generator().manual_seed(first + start)
            latent = torch.randn(shape, generator=generator)
            sigmas = shifted_sigmas(s["steps"]).tolist()
            for sigma, following in pairwise(sigmas):
                prompted, empty = self._model(
                    hidden_states=torch.cat([latent, latent]),
                    encoder_hidden_states=hidden[rows],
                    pooled_projections=pooled[rows],
                    timestep=torch.full((2 * count,), MULTIPLIER * sigma),
                    return_dict=False,
                )[0].chunk(2)
                latent += (following - sigma) * torch.lerp(empty, prompted, s["cfg"])
            mean = latent.unflatten(1, (FLOW_COPIES, LATENT_CHANNELS)).mean(1)
            pictures = self._decoder(mean * self._latent_std)
            images.append(pictures.clamp(0, 1).permute(0, 2, 3, 1))
        return torch.cat(images)
