# SPDX-License-Identifier: Apache-2.0
"""What the page sees: the nodes that ComfyUI lists are those that the native module declares."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from comfy_server import REPOSITORY, Server

# The promise to saved workflows. It only grows, at the ends of its lists:
# LACUNA_UPDATE_SNAPSHOT=1 writes it anew, and its diff must show nothing but additions.
SNAPSHOT = Path(__file__).with_name("object_info.json")
SOCKET_OPTIONS = ("default", "min", "max", "step", "multiline", "tooltip", "display_name")


def _listed_inputs(info: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any], bool]]:
    """id -> (type, options, optional), in display order; a COMBO may be listed as its options."""
    listed = {}
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *rest = info["input"][group][name]
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):
                kind, options["options"] = "COMBO", kind
            listed[name] = (kind, options, group == "optional")
    return listed


def test_the_schema_file_is_that_of_the_binary(shim: Any, schemas: list[dict]) -> None:
    import lacuna_shim.loader

    assert json.loads(lacuna_shim.loader.load().NodePack().schemas()) == schemas


def test_nodes_are_listed_as_declared(server: Server, schemas: list[dict]) -> None:
    listed = {k: v for k, v in server.get("/object_info").items() if v["category"] == "lacuna"}
    assert set(listed) == {schema["id"] for schema in schemas}
    for schema in schemas:
        info = listed[schema["id"]]
        assert info["display_name"] == schema["display_name"]
        assert info["description"] == schema["description"]
        assert info["output_node"] == schema["output_node"]
        assert info["output"] == [item["type"] for item in schema["outputs"]]
        assert info["output_name"] == [item["display_name"] for item in schema["outputs"]]
        assert info["output_tooltips"] == [item["tooltip"] for item in schema["outputs"]]
        inputs = _listed_inputs(info)
        declared = sorted(schema["inputs"], key=lambda item: item["optional"])  # stable
        assert list(inputs) == [item["id"] for item in declared]
        for item in declared:
            kind, options, optional = inputs[item["id"]]
            assert kind == item["type"] and optional == item["optional"]
            for key in SOCKET_OPTIONS:
                assert options.get(key) == item.get(key), (schema["id"], item["id"], key)
            assert options.get("options") == item.get("options")
            if "advanced" in options:  # newer hosts fold these widgets away
                assert options["advanced"] == item["advanced"]


def _promise(info: dict[str, Any]) -> dict[str, list[str]]:
    """What a saved workflow relies on: it holds widgets by position, sockets by name."""
    promise: dict[str, list[str]] = {"widgets": [], "sockets": [], "outputs": []}
    for name, (kind, options, optional) in _listed_inputs(info).items():
        kept = {k: options[k] for k in ("default", "min", "max", "step", "options") if k in options}
        entry = f"{name}: {kind}{' (optional)' if optional else ''}"
        if kept:
            promise["widgets"].append(f"{entry} {json.dumps(kept)}")
        else:
            promise["sockets"].append(entry)
    for name, kind in zip(info["output_name"], info["output"], strict=True):
        promise["outputs"].append(f"{name}: {kind}")
    return promise


def test_the_promise_to_saved_workflows_is_kept(server: Server) -> None:
    listed = server.get("/object_info")
    now = {node: _promise(info) for node, info in listed.items() if info["category"] == "lacuna"}
    if os.environ.get("LACUNA_UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", "utf-8")
    promised = json.loads(SNAPSHOT.read_text("utf-8"))
    for node, expected in promised.items():
        for part, entries in expected.items():
            kept = now[node][part][: len(entries)]
            assert kept == entries, f"{node}: saved workflows would break"
    assert now == promised, "something new: run once with LACUNA_UPDATE_SNAPSHOT=1 and commit"


def test_search_words_reach_hosts_that_know_them(server: Server, schemas: list[dict]) -> None:
    info = server.get("/object_info/LacunaConceptSet")["LacunaConceptSet"]
    if "search_aliases" not in info:
        pytest.skip("this ComfyUI has no search aliases")
    schema = next(item for item in schemas if item["id"] == "LacunaConceptSet")
    assert info["search_aliases"] == schema["search_aliases"]


def test_the_pack_imports_quickly(server: Server, record_property: Any) -> None:
    match = re.search(
        r"([\d.]+) seconds( \(IMPORT FAILED\))?: .*custom_nodes/lacuna\n", server.log()
    )
    assert match and not match[2]
    record_property("import_seconds", float(match[1]))
    print(f"\n{server.checkout.name}: the pack imports in {match[1]} s")
    assert float(match[1]) <= 1.0


def test_the_template_list_has_our_workflows(server: Server) -> None:
    names = {file.stem for file in (REPOSITORY / "workflows").glob("*.json")}
    assert names and names <= set(server.get("/workflow_templates")["lacuna"])
