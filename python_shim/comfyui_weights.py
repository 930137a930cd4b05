# SPDX-License-Identifier: Apache-2.0
"""Stored weights of a MODEL or a CLIP: as plain numbers, and what they are known by."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import comfy.model_management
import torch

from .fingerprint import Identity, identify

_PLAIN_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    *(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)),
}

# Hashing weights takes a second; a loaded model never changes its base weights.
_identities: weakref.WeakKeyDictionary[torch.nn.Module, Identity] = weakref.WeakKeyDictionary()


def base_identity(
    module: torch.nn.Module, base_weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]
) -> Identity:
    if module not in _identities:
        _identities[module] = identify(base_weights())
    return _identities[module]


def is_plain(weight: torch.Tensor) -> bool:
    """Stored as ordinary numbers, not packed, quantised, or kept on no device."""
    ordinary = type(weight) in (torch.Tensor, torch.nn.Parameter) and not weight.is_meta
    return ordinary and weight.dtype in _PLAIN_DTYPES


def converted(weight: torch.Tensor, convert: Callable[..., torch.Tensor]) -> torch.Tensor:
    # A real copy: the conversion and the patches that follow work in place.
    copy = comfy.model_management.cast_to_device(weight, weight.device, torch.float32, copy=True)
    return convert(copy, inplace=True)
