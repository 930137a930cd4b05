# SPDX-License-Identifier: Apache-2.0
"""What all training stages share: options, schedule, checkpoints, progress lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger("lacuna.demo_model")


@dataclass(frozen=True)
class Options:
    """How to run a stage."""

    work: Path  # corpus, checkpoints
    steps: int  # total, counted over all runs of the stage
    seed: int = 0
    device: str = "cpu"
    start: Path | None = None  # folder of compact weights to continue from
    save_every: int = 100
    pool: int = 24  # captions per image (UNet stage)
    batch: int | None = None  # pictures of a step, instead of the stage's own number
    cool_down: int = (
        0  # last steps, in which the learning rate falls to nothing (transformer stage)
    )

    def checkpoint(self, stage: str) -> Path:
        return self.work / f"{stage}.pt"


def learning_rate(
    step: int, total: int, peak: float, warmup: int = 100, hold: float = 0.6, floor: float = 0.03
) -> float:
    """Warm up linearly, hold until the fraction `hold` of the steps, then fall linearly."""
    rise = min(1.0, (step + 1) / warmup)
    fall = max(floor, min(1.0, (1 - step / max(total, 1)) / (1 - hold)))
    return peak * rise * fall


def set_learning_rate(
    optimizer: torch.optim.Optimizer | ConvolutionOptimizer, value: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("factor", 1.0)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write so that the file is whole at any moment."""
    temporary = path.with_name(path.name + ".part")
    torch.save(content, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict | None:
    """The stage's checkpoint, or None where it has not begun."""
    return torch.load(path, weights_only=True) if path.is_file() else None


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU; CPUs gain nothing from them."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step: a resumed run draws what an uninterrupted one would."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Progress:
    """A line with running means every few steps."""

    def __init__(self, stage: str, total: int, every: int = 10) -> None:
        self._stage, self._total, self._every = stage, total, every
        self.means: dict[str, float | torch.Tensor] = {}
        self._since, self._steps = time.monotonic(), 0

    def __call__(self, step: int, **figures: float | torch.Tensor) -> None:
        """Report that `step` steps are done; tensors are only read when a line is due."""
        for name, value in figures.items():
            self.means[name] = 0.98 * self.means.get(name, value) + 0.02 * value
        self._steps += 1
        if step % self._every and step != self._total:
            return
        seconds = (time.monotonic() - self._since) / self._steps
        text = "  ".join(f"{name} {value:.4f}" for name, value in self.means.items())
        log.info(
            "%s %s %d/%d  %s  %.2f s/step",
            time.strftime("%H:%M:%S"), self._stage, step, self._total, text, seconds,
        )  # fmt: skip
        self._since, self._steps = time.monotonic(), 0


class ConvolutionOptimizer:
    """torch's Muon on the hidden convolutions of the VAE, as matrices; AdamW on everything else.

    The decoder gained more in fifty steps of it than in three hundred of AdamW alone.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], peak: float) -> None:
        parameters = list(parameters)
        hidden = [
            weight for weight in parameters if weight.dim() == 4 and min(weight.shape[:2]) >= 64
        ]
        taken = {id(weight) for weight in hidden}
        self._views = [
            (weight, torch.nn.Parameter(self._matrix(weight.detach()))) for weight in hidden
        ]
        self._muon = torch.optim.Muon(
            [view for _, view in self._views], peak, weight_decay=1e-4,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        others = [weight for weight in parameters if id(weight) not in taken]
        self._adam = torch.optim.AdamW(others, peak, weight_decay=1e-4)
        self._parameters = parameters
        self.param_groups = self._muon.param_groups + self._adam.param_groups

    @staticmethod
    def _matrix(weight: torch.Tensor) -> torch.Tensor:
        """[out, in, h, w] in either memory format as [out, ...], sharing its memory."""
        if weight.is_contiguous():
            return weight.view(len(weight), -1)
        return weight.permute(0, 2, 3, 1).view(len(weight), -1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self._parameters:
            weight.grad = None

    def step(self) -> None:
        for weight, view in self._views:
            view.grad = (
                weight.grad if weight.is_contiguous() else weight.grad.permute(0, 2, 3, 1)
            ).reshape(view.shape)
        self._muon.step()
        self._adam.step()

    def state_dict(self) -> dict:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
        self.param_groups = self._muon.param_groups + self._adam.param_groups


def clip_and_step(
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer | ConvolutionOptimizer,
    parameters: Iterable[torch.Tensor],
) -> None:
    """One optimiser step with the gradient's norm limited to 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
