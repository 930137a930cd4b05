# SPDX-License-Identifier: Apache-2.0
"""What an edit puts on a ComfyUI MODEL: a patch that the host merges and undoes, or a wrapper
around its forward passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter import WeightAdapterBase

from .text_gate import TextGate, change_of, mapped_where


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


class InputMap:
    """An APPLY_MODEL wrapper: the same edit on what the weights read, while the model runs.

    deltas: (weight, up, down or None) of such weights, added to what they make of the text before
    the map: x reads as W N x + strength * up @ down @ x.
    """

    def __init__(
        self,
        entries: Sequence[tuple[str, int, int]],
        out: torch.Tensor,
        inner: torch.Tensor | None,
        gate: TextGate | None,
        strength: float,
        deltas: Sequence[tuple[str, torch.Tensor, torch.Tensor | None]] = (),
    ) -> None:
        self._gate = gate
        self._modules = [name.removesuffix(".weight") for name, _, _ in entries]
        self._first = entries[0][1]
        self._factors = _factors(out, inner)
        self._deltas = {
            name.removesuffix(".weight"): _factors(up, down) for name, up, down in deltas
        }
        self._strength = strength

    def __deepcopy__(self, memo: dict[int, Any]) -> InputMap:
        return self  # never changes; older hosts copy what a MODEL carries with every clone

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen: list[Any] = []  # all layers read one tensor, which is mapped once; opened for whom

        def mapped(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
            text = inputs[0]
            if not seen or seen[0] is not text:
                first, width = self._first, self._factors[0].shape[0]
                change = change_of(text[..., first : first + width].float(), self._factors)
                rest = text.shape[-1] - first - width
                change = torch.nn.functional.pad(self._strength * change, (first, rest))
                opened = None if self._gate is None else self._gate(text)
                changed = (text.float() + change).to(text.dtype)
                seen[:] = [text, mapped_where(text, changed, opened), opened]
            return (seen[1], *inputs[1:])

        def added(factors: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
            def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
                text, _, opened = seen
                if opened is not None and not bool(opened.any()):
                    return output
                change = self._strength * change_of(text.float(), factors)
                return mapped_where(output, (output.float() + change).to(output.dtype), opened)

            return add

        model = executor.class_obj
        # A later edit is the first to see the text: W N1 N2, as for weights.
        modules = {name: comfy.utils.get_attr(model, name) for name in self._modules}
        hooks = [
            module.register_forward_pre_hook(mapped, prepend=True) for module in modules.values()
        ] + [
            modules[name].register_forward_hook(added(factors))
            for name, factors in self._deltas.items()
        ]
        try:
            with _uncompiled():
                return executor(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()


def _uncompiled() -> AbstractContextManager[None]:
    """What was compiled before the hooks came does not look for them: the edit would be lost."""
    compiling = sys.modules.get("torch._dynamo")  # a second to import; nothing is compiled then
    return nullcontext() if compiling is None else compiling.set_stance("force_eager")


def _factors(out: torch.Tensor, inner: torch.Tensor | None) -> list[torch.Tensor]:
    """x @ factors[0] @ factors[1] is what out @ inner, or out alone, makes of rows x."""
    return [t.detach().float().cpu().T for t in (inner, out) if t is not None]
