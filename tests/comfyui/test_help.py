# SPDX-License-Identifier: Apache-2.0
"""What explains the nodes to a user: tooltips, help pages, translations."""

from __future__ import annotations

import importlib.util
import json
import re
import urllib.request
from typing import Any

import pytest
from comfy_server import REPOSITORY, Server

DOCS = REPOSITORY / "web" / "docs"
LANGUAGES = sorted(folder.name for folder in (REPOSITORY / "locales").iterdir())
# Languages that ComfyUI's page offers.
OFFERED = {"ar", "en", "es", "fa", "fr", "ja", "ko", "pt-BR", "ru", "tr", "zh", "zh-TW"}


def _english(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    file = REPOSITORY / "tools" / "write_schemas.py"
    spec = importlib.util.spec_from_file_location("lacuna_write_schemas", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.english(schemas)


def _texts(node: dict[str, Any]) -> dict[str, str]:
    """path -> text of everything translatable of one node."""
    texts = {key: node[key] for key in ("display_name", "description")}
    for group in ("inputs", "outputs"):
        for key, item in node[group].items():
            texts |= {f"{group}.{key}.{part}": item[part] for part in ("name", "tooltip")}
    return texts


def test_everything_has_a_tooltip(server: Server, schemas: list[dict]) -> None:
    listed = server.get("/object_info")
    for schema in schemas:
        info = listed[schema["id"]]
        assert info["description"] and schema["search_aliases"]
        assert len(info["output_tooltips"]) == len(info["output"])
        for text in info["output_tooltips"]:
            assert text.endswith("."), (schema["id"], text)
        for group in info["input"].values():
            for name, (_, *options) in group.items():
                if group is not info["input"].get("hidden"):
                    assert options[0]["tooltip"].endswith("."), (schema["id"], name)


def test_every_help_page_is_served_and_complete(server: Server, schemas: list[dict]) -> None:
    assert {file.stem for file in DOCS.glob("*.md")} == {schema["id"] for schema in schemas}
    for schema in schemas:
        base = server.url("/extensions/lacuna/docs/")
        with urllib.request.urlopen(f"{base}{schema['id']}.md", timeout=60) as answer:
            page = answer.read().decode("utf-8")
        assert page.startswith(f"# {schema['display_name']}\n")
        tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
        named = {name.strip() for row in re.findall(r"^\| ([^|]*) \|", tables, re.M)
                 for name in row.split(",")}  # fmt: skip
        shown = {item["display_name"] for item in schema["inputs"] + schema["outputs"]}
        assert named - {"input", "output"} == shown, schema["id"]
        assert "Smallest graph:" in page
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
        assert pictures
        for picture in pictures:
            with urllib.request.urlopen(base + picture, timeout=60) as answer:
                assert answer.read(3) == b"\xff\xd8\xff"  # JPEG
            assert (DOCS / picture).stat().st_size < 300_000


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_complete_and_reach_the_page(
    server: Server, schemas: list[dict], language: str
) -> None:
    assert language in OFFERED
    served = server.get("/i18n")[language]["nodeDefs"]
    english = _english(schemas)
    for node, original in english.items():
        texts, originals = _texts(served[node]), _texts(original)
        assert texts.keys() == originals.keys(), node
        assert all(text.strip() for text in texts.values()), node
        if language == "en":
            assert texts == originals
        else:
            untranslated = [k for k, text in texts.items() if text == originals[k] and "." in text]
            assert not untranslated, (node, untranslated)
    file = REPOSITORY / "locales" / language / "nodeDefs.json"
    assert set(json.loads(file.read_text("utf-8"))) == set(english)
