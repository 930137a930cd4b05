# SPDX-License-Identifier: Apache-2.0
"""The rooms of native/: what may include what (CONTRIBUTING.md)."""

from __future__ import annotations

import re
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"
# Every room may use those before it, `host.h` and `error.h`.
ROOMS = ("files", "concepts", "closed_form", "training", "evaluation")
INCLUDE = re.compile(r'^#include "(?:lacuna/)?(?:(\w+)/)?(\w+)\.h"', re.MULTILINE)


def sources() -> list[Path]:
    return [*NATIVE.glob("include/lacuna/**/*.h"), *NATIVE.glob("src/**/*.[hc]*")]


def includes() -> dict[tuple[str, str], set[tuple[str, str]]]:
    """(room, stem) of each source and header -> what both include."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for file in sources():
        room = file.parent.name if file.parent.name in ROOMS else ""
        own = (room, file.stem)
        named = {(to, stem) for to, stem in INCLUDE.findall(file.read_text("utf-8"))}
        found.setdefault(own, set()).update(named - {own})
    return found


def test_every_source_has_a_room() -> None:
    alone = {stem for room, stem in includes() if not room}
    assert alone == {"host", "error", "embedded_lines", "stb"}


def test_no_arrow_climbs() -> None:
    climbing = [
        f"{room}/{stem} -> {to}/{name}"
        for (room, stem), named in includes().items()
        for to, name in named
        if to in ROOMS and room in ROOMS and ROOMS.index(to) > ROOMS.index(room)
    ]
    assert not climbing


def test_no_arrows_make_a_circle() -> None:
    arrows = includes()

    def reached(start: tuple[str, str]) -> set[tuple[str, str]]:
        seen: set[tuple[str, str]] = set()
        left = list(arrows.get(start, ()))
        while left:
            at = left.pop()
            if at not in seen:
                seen.add(at)
                left.extend(arrows.get(at, ()))
        return seen

    circles = sorted("/".join(each) for each in arrows if each in reached(each))
    assert not circles
