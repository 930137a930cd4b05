# SPDX-License-Identifier: Apache-2.0
"""What an edit puts on a ComfyUI MODEL: a patch that the host merges and undoes, or a wrapper
around its forward passes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter import WeightAdapterBase

from .input_map import InputMap


class TextMapAdapter(WeightAdapterBase):
    """W <- W + strength * W @ delta in the columns that read text, one delta for all such weights.

    Merged by the host like a LoRA: on the weight's device, after the patches before it.
    """

    name = "lacuna_text_map"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights  # out, inner, (first column, columns; 0: all)

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[torch.Tensor], torch.Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        *factors, (first, columns) = self.weights
        reads = weight[:, first : first + columns] if columns else weight[:, first:]
        change = reads.float()  # in half precision the product would be worth less than the edit
        for factor in factors:
            if factor is not None:
                cast = comfy.model_management.cast_to_device(factor, weight.device, torch.float32)
                change = change @ cast
        reads += function((strength * change).to(weight.dtype))
        return weight


class InputMapWrapper:
    """An APPLY_MODEL wrapper: the same edit on what the weights read, while the model runs."""

    def __init__(self, edit: InputMap) -> None:
        self.edit = edit

    def __deepcopy__(self, memo: dict[int, Any]) -> InputMapWrapper:
        return self  # never changes; older hosts copy what a MODEL carries with every clone

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        modules = {
            name: comfy.utils.get_attr(executor.class_obj, name.removesuffix(".weight"))
            for name in self.edit.names
        }
        with self.edit.hooked(modules), _uncompiled():
            return executor(*args, **kwargs)


def _uncompiled() -> AbstractContextManager[None]:
    """What was compiled before the hooks came does not look for them: the edit would be lost."""
    compiling = sys.modules.get("torch._dynamo")  # a second to import; nothing is compiled then
    return nullcontext() if compiling is None else compiling.set_stance("force_eager")
