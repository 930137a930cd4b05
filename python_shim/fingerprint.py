# SPDX-License-Identifier: Apache-2.0
"""What a set of weights is known by, the same in every host and in every order of the tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

SAMPLES = 128  # of a matrix
_STRIDE = 2_654_435_761  # a prime that spreads places evenly over a matrix of any size


@dataclass(frozen=True)
class Identity:
    """An exact hash, and samples that tell the same weights in another type from other weights."""

    fingerprint: str
    samples: dict[str, list[float]]


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """32 hex digits; hashes float16 values, so that a float32 copy of a float16 file matches it."""
    return _combined(_digest(tensor) for tensor in tensors)


def identify(weights: Iterable[tuple[str, torch.Tensor]]) -> Identity:
    """Of named weights, read one after the other; vectors are hashed, but not sampled."""
    digests, samples = [], {}
    for name, tensor in weights:
        digests.append(_digest(tensor))
        if tensor.dim() >= 2 and tensor.numel():
            samples[name] = _sampled(tensor)
    return Identity(_combined(digests), samples)


def _digest(tensor: torch.Tensor) -> bytes:
    half = tensor.detach().to(device="cpu", dtype=torch.float16).contiguous()
    digest = hashlib.sha256(str(tuple(half.shape)).encode())
    digest.update(half.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _combined(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]


def _sampled(tensor: torch.Tensor) -> list[float]:
    places = torch.arange(min(SAMPLES, tensor.numel())) * _STRIDE % tensor.numel()
    flat = tensor.detach().reshape(-1)
    return flat[places.to(flat.device)].float().tolist()
