# SPDX-License-Identifier: Apache-2.0
"""CLIP's byte-pair vocabulary, built from the data file that travels with the package."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DATA_FILE = Path(__file__).parent / "data" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
# How CLIP splits text into words, applied after lower-casing.
_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def _byte_symbols() -> list[str]:
    """One visible character per byte; the printable bytes come first and stand for themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


@functools.cache
def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    symbols = _byte_symbols()
    count = VOCABULARY_SIZE - 2 * len(symbols) - 2
    with gzip.open(DATA_FILE, "rt", encoding="utf-8") as file:
        file.readline()  # the version
        merges = [tuple(line.split()) for _, line in zip(range(count), file, strict=False)]
    words = (
        symbols
        + [symbol + "</w>" for symbol in symbols]
        + ["".join(pair) for pair in merges]
        + [START, END]
    )
    vocabulary = {word: index for index, word in enumerate(words)}
    if len(vocabulary) != VOCABULARY_SIZE:
        raise RuntimeError(f"the CLIP vocabulary {DATA_FILE} is damaged; install Lacuna again.")
    return vocabulary, merges


def make_tokenizer(
    vocabulary: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None
) -> Tokenizer:
    """CLIP's tokenizer: lower-cased literal text between start and end token, never cut.

    Built on `tokenizers` itself, because transformers changed its constructors between 4 and 5.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    if vocabulary is None or merges is None:
        vocabulary, merges = vocabulary_and_merges()
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])],
    )
    return tokenizer
