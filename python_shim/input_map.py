# SPDX-License-Identifier: Apache-2.0
"""An edit of what weights read, by hooks on their modules: for one forward pass or run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .text_gate import TextGate, change_of, mapped_where


class InputMap:
    """x <- x + strength * x @ (out @ inner).T in the columns that read text; out alone when inner
    is None. With a gate, for the prompts that it opens for.

    entries: (weight, first column, columns; 0: all), alike in all but the weight.
    deltas: (weight, up, down or None) of such weights, added to what they make of the text before
    the map: x reads as W N x + strength * up @ down @ x.
    """

    def __init__(
        self,
        entries: Sequence[tuple[str, int, int]],
        out: torch.Tensor,
        inner: torch.Tensor | None,
        strength: float,
        gate: TextGate | None = None,
        deltas: Sequence[tuple[str, torch.Tensor, torch.Tensor | None]] = (),
    ) -> None:
        self.names = [name for name, _, _ in entries]
        self.factors = _factors(out, inner)
        self.strength = strength
        self._first = entries[0][1]
        self._gate = gate
        self._deltas = {name: _factors(up, down) for name, up, down in deltas if name in self.names}

    def acts_on(self, text: torch.Tensor) -> torch.Tensor | None:
        """Which prompts it acts on, [n] bool; None: on all."""
        return None if self._gate is None else self._gate(text)

    @contextmanager
    def hooked(self, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """While the weights' modules, by weight name, run."""
        seen: list[Any] = []  # all layers read one tensor, which is mapped once; opened for whom

        def mapped(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
            text = inputs[0]
            if not seen or seen[0] is not text:
                first, width = self._first, self.factors[0].shape[0]
                change = change_of(text[..., first : first + width].float(), self.factors)
                rest = text.shape[-1] - first - width
                change = torch.nn.functional.pad(self.strength * change, (first, rest))
                opened = self.acts_on(text)
                changed = (text.float() + change).to(text.dtype)
                seen[:] = [text, mapped_where(text, changed, opened), opened]
            return (seen[1], *inputs[1:])

        def added(factors: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
            def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
                text, _, opened = seen
                if opened is not None and not bool(opened.any()):
                    return output
                change = self.strength * change_of(text.float(), factors)
                return mapped_where(output, (output.float() + change).to(output.dtype), opened)

            return add

        # A later edit is the first to see the text: W N1 N2, as for weights.
        hooks = [
            modules[name].register_forward_pre_hook(mapped, prepend=True) for name in self.names
        ] + [
            modules[name].register_forward_hook(added(factors))
            for name, factors in self._deltas.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def acts_on(edits: Iterable[InputMap], text: torch.Tensor) -> torch.Tensor | None:
    """Which prompts gated edits act on; None where there is none, or one acts on every prompt."""
    opened = [each.acts_on(text) for each in edits]
    if not opened or any(each is None for each in opened):
        return None
    return torch.stack(opened).any(0).cpu()


def _factors(out: torch.Tensor, inner: torch.Tensor | None) -> list[torch.Tensor]:
    """x @ factors[0] @ factors[1] is what out @ inner, or out alone, makes of rows x."""
    return [t.detach().float().cpu().T for t in (inner, out) if t is not None]
