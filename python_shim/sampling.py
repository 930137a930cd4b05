# SPDX-License-Identifier: Apache-2.0
"""Noise schedules and samplers of the headless host, with the sigmas that a ComfyUI user expects.

Written from the publications: Karras et al. 2022 (schedule, Euler) and Lu et al. 2022
(DPM-Solver++ 2M).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .errors import HostError

TRAINING_STEPS = 1000
KARRAS_RHO = 7.0

Denoise = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # (noisy latent, sigma) -> clean estimate
OnStep = Callable[[int, int], None]


class NoiseSchedule:
    """SD1.x: scaled-linear betas 0.00085..0.012 over 1000 steps, noise prediction."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAINING_STEPS, dtype=torch.float64) ** 2
        kept = torch.cumprod(1.0 - betas, dim=0)
        self.sigmas = ((1.0 - kept) / kept).sqrt().float()
        self.log_sigmas = self.sigmas.log()

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The training step nearest to `sigma`; of each one in a column [n, 1]."""
        return (self.log_sigmas - sigma.float().cpu().log()).abs().argmin(dim=-1)

    def sigma(self, timestep: float) -> float:
        """Noise level of a possibly fractional training step."""
        low, high = math.floor(timestep), math.ceil(timestep)
        weight = timestep - low
        return float(((1.0 - weight) * self.log_sigmas[low] + weight * self.log_sigmas[high]).exp())


def _normal(schedule: NoiseSchedule, steps: int) -> list[float]:
    return [schedule.sigma(float(t)) for t in torch.linspace(TRAINING_STEPS - 1, 0, steps)]


def _simple(schedule: NoiseSchedule, steps: int) -> list[float]:
    stride = TRAINING_STEPS / steps
    return [float(schedule.sigmas[TRAINING_STEPS - 1 - int(i * stride)]) for i in range(steps)]


def _karras(schedule: NoiseSchedule, steps: int) -> list[float]:
    low, high = (float(schedule.sigmas[i]) ** (1 / KARRAS_RHO) for i in (0, -1))
    return [
        float((high + position * (low - high)) ** KARRAS_RHO)
        for position in torch.linspace(0, 1, steps)
    ]


def _euler(
    x: torch.Tensor, sigmas: torch.Tensor, denoise: Denoise, on_step: OnStep
) -> torch.Tensor:
    for i in range(len(sigmas) - 1):
        slope = (x - denoise(x, sigmas[i])) / sigmas[i]
        x = x + slope * (sigmas[i + 1] - sigmas[i])
        on_step(i + 1, len(sigmas) - 1)
    return x


def _dpmpp_2m(
    x: torch.Tensor, sigmas: torch.Tensor, denoise: Denoise, on_step: OnStep
) -> torch.Tensor:
    previous, previous_step = None, None
    for i in range(len(sigmas) - 1):
        clean = denoise(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = clean
        else:
            step = (sigmas[i] / sigmas[i + 1]).log()  # in log-SNR/2
            estimate = clean
            if previous is not None:
                half_ratio = step / (2 * previous_step)
                estimate = (1 + half_ratio) * clean - half_ratio * previous
            x = (sigmas[i + 1] / sigmas[i]) * x - torch.expm1(-step) * estimate
            previous_step = step
        previous = clean
        on_step(i + 1, len(sigmas) - 1)
    return x


SCHEDULERS = {"normal": _normal, "simple": _simple, "karras": _karras}
SAMPLERS = {"euler": _euler, "dpmpp_2m": _dpmpp_2m}


def make_sigmas(
    schedule: NoiseSchedule, scheduler: str, steps: int, denoise: float
) -> torch.Tensor:
    """Falling noise levels to 0; `denoise` < 1 keeps the last `steps` of a longer schedule."""
    if scheduler not in SCHEDULERS:
        raise HostError(
            f'The scheduler "{scheduler}" is not available in the headless host; '
            f"use one of: {', '.join(SCHEDULERS)}."
        )
    if steps < 1:
        raise HostError(f"The sampler needs at least 1 step, not {steps}.")
    if not 0.0 <= denoise <= 1.0:
        raise HostError(f"The denoise value must lie between 0 and 1, not {denoise:g}.")
    if denoise == 0.0:
        return torch.zeros(0)  # nothing to do: the latent stays as it is
    total = steps if denoise > 0.9999 else int(steps / denoise)
    levels = [*SCHEDULERS[scheduler](schedule, total), 0.0]
    return torch.tensor(levels[-(steps + 1) :], dtype=torch.float32)


def run_sampler(
    sampler: str, x: torch.Tensor, sigmas: torch.Tensor, denoise: Denoise, on_step: OnStep
) -> torch.Tensor:
    if sampler not in SAMPLERS:
        raise HostError(
            f'The sampler "{sampler}" is not available in the headless host; '
            f"use one of: {', '.join(SAMPLERS)}."
        )
    return SAMPLERS[sampler](x, sigmas, denoise, on_step)
