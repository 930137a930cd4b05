# SPDX-License-Identifier: Apache-2.0
"""Forward passes with gradients through a model that was loaded for inference only."""

from __future__ import annotations

from typing import Any

import torch


def usable_for_autograd(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in the same memory, as a tensor that autograd may keep for backward.

    Hosts load models under inference mode, and autograd refuses tensors made there. To be called
    outside of it. Never write to the result.
    """
    detached = tensor.detach()
    if not detached.is_inference():
        return detached
    alias = torch.empty(0, dtype=detached.dtype, device=detached.device)
    storage, offset = detached.untyped_storage(), detached.storage_offset()
    return alias.set_(storage, offset, detached.size(), detached.stride())


def keep_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """For what enters a forward pass: as it is when its gradient is wanted."""
    return tensor if tensor.requires_grad else leave_inference_mode(tensor)


def leave_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    """For results of a host service that ran under inference mode, for a caller that does not."""
    if torch.is_inference_mode_enabled():
        return tensor
    return usable_for_autograd(tensor)


def gradients_wanted() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def call_with_weights(
    module: torch.nn.Module, weights: dict[str, torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    """`module(...)` with some of its weights replaced for this call, and for its backward pass."""
    if not weights:
        return module(*args, **kwargs)
    return torch.func.functional_call(module, weights, args, kwargs, tie_weights=False)
