# SPDX-License-Identifier: Apache-2.0
"""Which prompts an edit acts on: told from their embedding while the model runs, or, where their
words are at hand, from what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .autograd import leave_inference_mode

# now [d, k], before [d, k] or None, offset [k], last row only
Test = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, bool]
GateParts = tuple[Sequence[Test], int]  # and the window


class TextGate:
    """`lacuna::TextGate`: open for prompts with a row whose score is above zero."""

    def __init__(self, tests: Sequence[Test], window: int) -> None:
        self._tests = [
            (_kept(now), None if before is None else _kept(before), _kept(offset), last_row_only)
            for now, before, offset, last_row_only in tests
        ]
        self._window = window

    def __call__(self, text: torch.Tensor) -> torch.Tensor:
        """[n] bool for [n, windows * window, d]."""
        n, length, width = text.shape
        rows = text.float().reshape(n, length // self._window, self._window, width)
        opened = torch.zeros(n, dtype=torch.bool, device=text.device)
        for now, before, offset, last_row_only in self._tests:
            first = self._window - 1 if last_row_only else 1
            score = rows[:, :, first:] @ now.to(text.device) - offset.to(text.device)
            if before is not None:
                score = score + rows[:, :, first - 1 : -1] @ before.to(text.device)
            opened |= (score > 0).reshape(n, -1).any(1)
        return opened


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return leave_inference_mode(tensor.detach().float())


def mapped_where(
    text: torch.Tensor, mapped: torch.Tensor, opened: torch.Tensor | None
) -> torch.Tensor:
    """The mapped text of opened prompts; the very same tensor where none is."""
    if opened is None or bool(opened.all()):
        return mapped
    if not bool(opened.any()):
        return text
    return torch.where(opened.reshape(-1, *[1] * (text.dim() - 1)), mapped, text)


def as_words(tokens: Iterable[str]) -> str:
    """Tokens of CLIP's vocabulary, as the words they were made of."""
    return "".join(tokens).replace("</w>", " ").strip()


class NamedMap:
    """x + strength * x @ delta.T for prompts that say a phrase word for word, as the tokenizer
    reads words; the very same tensor for all others. delta = out @ inner, or out alone."""

    def __init__(
        self,
        out: torch.Tensor,
        inner: torch.Tensor | None,
        strength: float,
        phrases: Iterable[str],
    ) -> None:
        self._factors = [_kept(each).T for each in (inner, out) if each is not None]
        self._strength = strength
        self._phrases = sorted({f" {phrase} " for phrase in phrases if phrase})

    def names(self, words: str) -> bool:
        text = f" {words} "
        return any(phrase in text for phrase in self._phrases)

    def __call__(self, text: torch.Tensor, words: str) -> torch.Tensor:
        if not self.names(words):
            return text
        change = text.float()
        for factor in self._factors:
            change = change @ factor.to(text.device)
        return (text.float() + self._strength * change).to(text.dtype)
