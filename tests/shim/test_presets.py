# SPDX-License-Identifier: Apache-2.0
"""presets/: every list is read by the Concept Set, and holds what its name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from python_shim import loader

PRESETS = sorted((REPOSITORY / "presets").glob("*.json"))
PROTOCOL = REPOSITORY / "tools" / "demo_model" / "protocol.json"
# Preset -> (concepts, kind).
CONTENTS = {
    "artists_100": (100, "style"),
    "demo_flags_100": (100, "object"),
    "demo_objects_10": (10, "object"),
    "demo_styles": (1, "style"),
    "demo_weapons": (4, "explicit"),
    "explicit_terms": (4, "explicit"),
    "objects_10": (10, "object"),
}
DEMO_TASKS = {
    "demo_flags_100": "individuals",
    "demo_objects_10": "objects",
    "demo_styles": "styles1",
    "demo_weapons": "weapons",
}


@pytest.fixture(scope="module")
def pack() -> Any:
    return loader.load().NodePack()


def _concept_set(pack: Any, text: str) -> dict[str, Any]:
    """The preset as Concept Set gives it back."""
    return json.loads(pack.run("LacunaConceptSet", {"concepts": text})[1])


def test_the_table_is_complete() -> None:
    assert [file.stem for file in PRESETS] == sorted(CONTENTS)
    page = (REPOSITORY / "docs" / "presets.md").read_text("utf-8")
    assert all(f"presets/{name}.json" in page for name in CONTENTS)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_the_concept_set_reads_it_whole(pack: Any, file: Path) -> None:
    text = file.read_text("utf-8")
    written, read = json.loads(text), _concept_set(pack, text)
    assert read == written
    count, kind = CONTENTS[file.stem]
    assert len(read["concepts"]) == count
    assert {item["kind"] for item in read["concepts"]} == {kind}
    assert read["preserve"], "neighbours that must stay are half of a good list"


@pytest.mark.parametrize(("preset", "task"), DEMO_TASKS.items())
def test_demo_lists_are_those_of_the_protocol(preset: str, task: str) -> None:
    expected = json.loads(PROTOCOL.read_text("utf-8"))["tasks"][task]
    read = json.loads((REPOSITORY / "presets" / f"{preset}.json").read_text("utf-8"))
    assert {item["target"]: item.get("synonyms", []) for item in read["concepts"]} == (
        expected["targets"]
    )
    assert {item["anchor"] for item in read["concepts"]} == {expected["anchor"]}
    assert [item["phrase"] for item in read["preserve"]] == expected["preserve"]
    assert {item["templates"] for item in read["concepts"]} == {expected["templates"]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "lacuna.concepts/9"}, "has format 'lacuna.concepts/9'"),
        ({"author": "somebody"}, "unknown member 'author'"),
        ({"preserve": ["cat"]}, "'cat' is both erased and preserved"),
    ],
)
def test_what_the_page_on_presets_warns_of(
    pack: Any, change: dict[str, Any], sentence: str
) -> None:
    text = (REPOSITORY / "presets" / "objects_10.json").read_text("utf-8")
    with pytest.raises(ValueError, match=sentence):
        _concept_set(pack, json.dumps(json.loads(text) | change))
