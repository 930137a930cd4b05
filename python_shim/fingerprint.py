# SPDX-License-Identifier: Apache-2.0
"""A short name for a set of weights, the same in every host and in every order of the tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """32 hex digits; hashes float16 values, so that a float32 copy of a float16 file matches it."""
    digests = []
    for tensor in tensors:
        half = tensor.detach().to(device="cpu", dtype=torch.float16).contiguous()
        digest = hashlib.sha256(str(tuple(half.shape)).encode())
        digest.update(half.reshape(-1).view(torch.uint8).numpy().tobytes())
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]
