# SPDX-License-Identifier: Apache-2.0
"""What an encoder calls its vocabulary."""

from __future__ import annotations

import torch

from python_shim.vocabulary import whole_words


def test_whole_words_that_the_encoder_tells_apart_in_the_order_of_their_ids() -> None:
    vocabulary = {"owl</w>": 3, "ow": 0, "the</w>": 1, "zyx</w>": 4, "qqq</w>": 2, "ship</w>": 5}
    embedding = torch.nn.Embedding(6, 4)
    with torch.no_grad():
        embedding.weight[4] = embedding.weight[2]  # never trained: read like "qqq"
    assert whole_words(vocabulary, embedding) == ["the", "qqq", "owl", "ship"]
    assert whole_words(vocabulary, embedding.half()) == ["the", "qqq", "owl", "ship"]


def test_no_words() -> None:
    assert whole_words({"ow": 0}, torch.nn.Embedding(1, 4)) == []
