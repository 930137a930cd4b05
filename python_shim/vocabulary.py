# SPDX-License-Identifier: Apache-2.0
"""Words of a tokenizer."""

from __future__ import annotations

import hashlib

import torch

_AT_ONCE = 4096


def whole_words(vocabulary: dict[str, int], embedding: torch.nn.Module) -> list[str]:
    """Words that are one token each, the most frequent first: merges were learned in that order.

    An encoder that was trained on few words has one embedding for all others: of words that it
    reads alike only the first is listed.
    """
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens = [token for token in ordered if token.endswith("</w>")]
    device = next(embedding.parameters()).device
    words: list[str] = []
    seen: set[bytes] = set()
    for begin in range(0, len(tokens), _AT_ONCE):
        part = tokens[begin : begin + _AT_ONCE]
        ids = torch.tensor([vocabulary[token] for token in part], device=device)
        with torch.inference_mode():
            rows = embedding(ids).float().cpu().numpy()
        for token, row in zip(part, rows, strict=True):
            # A digest of the row: the rows themselves are a hundred megabytes.
            digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                words.append(token.removesuffix("</w>"))
    return words
