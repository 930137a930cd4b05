# SPDX-License-Identifier: Apache-2.0
"""Which prompts an edit acts on: told from their embedding while the model runs, or, where their
words are at hand, from what they say."""

from __future__ import annotations

import re
import unicodedata
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
        """[n] bool for [n, rows, d], in windows."""
        opened = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        for rows in text.float().split(self._window, 1):  # the last may be shorter
            for now, before, offset, last_row_only in self._tests:
                first = max(rows.shape[1] - 1 if last_row_only else 1, 1)
                score = rows[:, first:] @ now.to(text.device) - offset.to(text.device)
                if before is not None:
                    score = score + rows[:, first - 1 : -1] @ before.to(text.device)
                opened |= (score > 0).flatten(1).any(1)
        return opened


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return leave_inference_mode(tensor.detach().float())


def change_of(text: torch.Tensor, factors: Iterable[torch.Tensor]) -> torch.Tensor:
    """text @ factors[0] @ factors[1] ..., on the device and in the type of the text."""
    for factor in factors:
        text = text @ leave_inference_mode(factor).to(text)
    return text


def mapped_where(
    text: torch.Tensor, mapped: torch.Tensor, opened: torch.Tensor | None
) -> torch.Tensor:
    """The mapped text of opened prompts; the very same tensor where none is."""
    if opened is None or bool(opened.all()):
        return mapped
    if not bool(opened.any()):
        return text
    return torch.where(opened.reshape(-1, *[1] * (text.dim() - 1)), mapped, text)


# Scripts without spaces word by word, letters together, digits and signs one by one. Hyphens,
# underscores and quotes part words like spaces do.
_UNSPACED = "\\u0e00-\\u0e7f\\u3040-\\u30ff\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|\d|[^\s\w]")
_PARTING = frozenset("-\u2010\u2011\u2012\u2013\u2014\"'`\u00b4\u2018\u2019\u201c\u201d")


def _words(text: str) -> str:
    found = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    return " ".join(word for word in found if word not in _PARTING)


class NamedMap:
    """x + strength * x @ delta.T for prompts that say a phrase word for word; the very same tensor
    for all others. delta = out @ inner, or out alone."""

    def __init__(
        self,
        out: torch.Tensor,
        inner: torch.Tensor | None,
        strength: float,
        phrases: Iterable[str],
    ) -> None:
        self._factors = [_kept(each).T for each in (inner, out) if each is not None]
        self._strength = strength
        self._phrases = sorted({f" {words} " for words in map(_words, phrases) if words})

    def names(self, prompt: str) -> bool:
        text = f" {_words(prompt)} "
        return any(phrase in text for phrase in self._phrases)

    def __call__(self, text: torch.Tensor, prompts: Iterable[str]) -> torch.Tensor:
        """text: what was read of all of one prompt, which may have been said in several ways."""
        if not any(map(self.names, prompts)):
            return text
        plain = text.float()
        return (plain + self._strength * change_of(plain, self._factors)).to(text.dtype)
