# SPDX-License-Identifier: Apache-2.0
"""Errors for people: one sentence that says what failed, on what, and what to do."""

from pathlib import Path

_SCREEN, _ASIDE = 1500, 600  # characters


class HostError(ValueError):
    """A checkpoint, LoRA, workflow or setting that this host cannot use."""

    def __init__(self, sentence: str) -> None:
        super().__init__(brief(sentence, _SCREEN))  # names come from files, at any length


def brief(text: object, longest: int = _ASIDE) -> str:
    """What a file or a library says, on one line, without stacks and pages of detail."""
    line = " ".join(str(text).partition("\nException raised from")[0].split())
    return line if len(line) <= longest else line[:longest] + " ..."


def read_text(path: Path, missing: str = "There is no file {}.") -> str:
    """A text file in UTF-8; every way to fail is a sentence."""
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
    except FileNotFoundError:
        raise HostError(missing.format(path)) from None
    except IsADirectoryError:
        raise HostError(f"{path} is a folder; give a file.") from None
    except UnicodeDecodeError:
        raise HostError(f"{path} is not a text file in UTF-8.") from None
    except (OSError, ValueError) as error:  # a name too long, or with a null character
        raise HostError(f"{brief(path)} cannot be read ({brief(error)}).") from None
