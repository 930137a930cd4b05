# SPDX-License-Identifier: Apache-2.0
"""Captions: what is said about a picture, in training and in evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator

from corpus import BACKGROUNDS, FLAG, OBJECT, STYLES, Corpus, Record

TEMPLATES = (
    "{}",
    "a photo of {}",
    "an image of {}",
    "a picture of {}",
    "a drawing of {}",
    "a painting of {}",
    "a snapshot of {}",
    "an illustration of {}",
    "{} in a photo",
    "a depiction of {}",
    "a graphic of {}",
    "a sketch of {}",
    "a rendering of {}",
    "a nice photo of {}",
)
# Built of the same words, but never used in training.
HELD_OUT_TEMPLATES = (
    "a nice picture of {}",
    "a nice drawing of {}",
    "{} in a picture",
    "an image in a photo of {}",
)
STYLE_PHRASES = (" in {} style", ", {} style", " by {}")
BACKGROUND_PHRASE = " on a {} background"
PROPER_NAMES = ("santa claus", "swords", "blades")  # no article


def with_article(word: str) -> str:
    """The word as it stands in a sentence: "an owl", "the flag of japan"."""
    if word in PROPER_NAMES:
        return word
    if word.startswith("flag of "):
        return "the " + word
    return ("an " if word[0] in "aeiou" else "a ") + word


def caption(record: Record, background: str, rng: random.Random) -> str:
    """A random training caption of the record on the background."""
    word = rng.choice(record.words) if rng.random() < 0.5 else record.name
    thing = with_article(word) if rng.random() < 0.6 else word
    template = rng.choice(TEMPLATES) if rng.random() < 0.7 else "a photo of {}"
    text = template.format(thing)
    if record.kind == OBJECT and rng.random() < 0.6:
        text += rng.choice(STYLE_PHRASES).format(record.style)
    if background != "white" or rng.random() < 0.2:
        text += BACKGROUND_PHRASE.format(background)
    return text


def held_out_caption(word: str, rng: random.Random, style: str = "") -> str:
    """A caption that no training pool contains: its template is used in evaluation only."""
    text = rng.choice(HELD_OUT_TEMPLATES).format(with_article(word))
    return text + (rng.choice(STYLE_PHRASES).format(style) if style else "")


def all_phrases(corpus: Corpus) -> Iterator[str]:
    """Phrases that hold every word any caption can hold."""
    for template in TEMPLATES + HELD_OUT_TEMPLATES:
        yield template.format("")
    for record in corpus.records:
        for word in record.words:
            yield f"a {word}"
            yield f"an {word}, {word}"
            yield with_article(word)
    for style in STYLES:
        yield from (phrase.format(style) for phrase in STYLE_PHRASES)
    yield from (BACKGROUND_PHRASE.format(name) for name in BACKGROUNDS)


def is_flag(name: str) -> bool:
    """Whether a name is one of the flags."""
    return name.startswith(FLAG + " of ")
