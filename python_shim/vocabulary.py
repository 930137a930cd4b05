# SPDX-License-Identifier: Apache-2.0
"""Words of a tokenizer."""

from __future__ import annotations


def whole_words(vocabulary: dict[str, int]) -> list[str]:
    """Words that are one token each, the most frequent first: merges were learned in that order."""
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return [token.removesuffix("</w>") for token in ordered if token.endswith("</w>")]
