# SPDX-License-Identifier: Apache-2.0
"""One node that forgets words: listed, placed and run, in ComfyUI versions that have blueprints."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from comfy_server import REPOSITORY, Server
from graphs import QUICK
from test_page import SCREENSHOTS, run_script

NAMES = ("Forget words", "Forget words (thorough)")
LOADER, SUBGRAPH, PREVIEW = 2, 1, 3


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "lacuna_build_blueprints", REPOSITORY / "tools" / "build_blueprints.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _file(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "subgraphs" / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_what_the_tool_writes(tool: ModuleType, name: str) -> None:
    text = (REPOSITORY / "python_shim" / "node_schemas.json").read_text("utf-8")
    schemas = {schema["id"]: schema for schema in json.loads(text)}
    blueprint = next(item for item in tool.BLUEPRINTS if item.name == name)
    assert _file(name) == tool.build(blueprint, schemas)


def _placed(name: str) -> dict[str, Any]:
    """The blueprint between a loader and a preview of its text, with little to compute."""
    graph = _file(name)
    (node,) = graph["nodes"]
    page = json.loads((REPOSITORY / "workflows" / "erase_words.json").read_text("utf-8"))
    loader = next(n for n in page["nodes"] if n["type"] == "CheckpointLoaderSimple")
    preview = next(n for n in page["nodes"] if n["type"] == "PreviewAny")
    loader["id"], preview["id"] = LOADER, PREVIEW
    loader["pos"], node["pos"], preview["pos"] = [0, 0], [400, 0], [800, 0]
    node["widgets_values"] = ["hamburger -> apple"]
    links = []
    for output in loader["outputs"]:
        output["links"] = []
    for target, item in enumerate(node["inputs"]):
        if "widget" not in item:
            slot = ("MODEL", "CLIP", "VAE").index(item["type"])
            links.append([len(links) + 1, LOADER, slot, SUBGRAPH, target, item["type"]])
            item["link"] = len(links)
            loader["outputs"][slot]["links"].append(len(links))
    text = next(i for i, item in enumerate(node["outputs"]) if item["type"] == "STRING")
    links.append([len(links) + 1, SUBGRAPH, text, PREVIEW, 0, "STRING"])
    node["outputs"][text]["links"] = [len(links)]
    preview["inputs"][0]["link"] = len(links)
    for inner in graph["definitions"]["subgraphs"][0]["nodes"]:
        named = inner["widgets_values_named"]
        named |= {k: v for k, v in QUICK.get(inner["type"], {}).items() if k in named}
        inner["widgets_values"] = list(named.values())
    graph |= {"nodes": [node, loader, preview], "links": links}
    return graph | {"last_node_id": 3, "last_link_id": len(links)}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_listed_and_runs(
    chromium: str, page_server: Server, name: str, tmp_path: Path
) -> None:
    if page_server.checkout.version.startswith("0.3."):
        pytest.skip("this ComfyUI has no blueprints")
    listed = page_server.get("/global_subgraphs")
    key = next(key for key, entry in listed.items() if entry["name"] == name)
    assert listed[key]["info"]["node_pack"] == "custom_nodes.lacuna"
    assert json.loads(page_server.get(f"/global_subgraphs/{key}")["data"]) == _file(name)

    file = tmp_path / "placed.json"
    file.write_text(json.dumps(_placed(name)), "utf-8")
    picture = SCREENSHOTS / f"{page_server.checkout.name}_{name.replace(' ', '_')}.png"
    seen = run_script(chromium, "run_workflow.mjs", page_server.url("/"), file, picture)
    assert seen["status"] == "success" and seen["failures"] == []
    assert "hamburger" in seen["report"]
