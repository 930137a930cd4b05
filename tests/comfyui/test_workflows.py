# SPDX-License-Identifier: Apache-2.0
"""The workflows we ship run as they are, and a second queue costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
from comfy_server import REPOSITORY, Graph, Server

WORKFLOWS = sorted((REPOSITORY / "workflows" / "api").glob("*.json"))


def _graph(file: Path) -> Graph:
    return json.loads(file.read_text("utf-8"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflow(server: Server, file: Path) -> None:
    graph = _graph(file)
    run = server.run(graph, seconds=900)
    titles = {node: spec["_meta"]["title"] for node, spec in graph.items()}
    pictures = {}
    for node, output in run.outputs.items():
        for entry in output.get("images", []):
            folder = server.output if entry["type"] == "output" else server.base / "temp"
            data = (folder / entry["subfolder"] / entry["filename"]).read_bytes()
            pictures.setdefault(titles[node], []).append(data)
    assert len(pictures["Before"]) == len(pictures["After"]) == 4
    assert all(a != b for a, b in zip(pictures["Before"], pictures["After"], strict=True))
    assert server.run(graph).cached == set(graph)


def test_the_lora_workflow_saves_a_lora(server: Server) -> None:
    graph = _graph(REPOSITORY / "workflows" / "api" / "erase_words_save_lora.json")
    prefix = next(
        spec["inputs"]["filename_prefix"]
        for spec in graph.values()
        if spec["class_type"] == "LacunaSaveLoRA"
    )
    server.run(graph, seconds=900)
    saved = list(server.output.glob(f"{prefix}_*.safetensors"))
    assert len(saved) == 1 and safetensors.torch.load_file(saved[0])


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_both_formats_hold_the_same_graph(file: Path) -> None:
    """workflows/x.json is for the page, workflows/api/x.json for scripts."""
    api = json.loads(file.read_text("utf-8"))
    page = json.loads((REPOSITORY / "workflows" / file.name).read_text("utf-8"))
    assert file.with_name(file.name).is_file()
    assert (REPOSITORY / "workflows" / f"{file.stem}.jpg").is_file()
    nodes = {str(node["id"]): node for node in page["nodes"] if node["type"] != "MarkdownNote"}
    assert {i: node["type"] for i, node in nodes.items()} == {
        i: node["class_type"] for i, node in api.items()
    }
    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    for node_id, node in nodes.items():
        linked = {item["name"]: links[item["link"]] for item in node["inputs"] if item.get("link")}
        expected = {k: v for k, v in api[node_id]["inputs"].items() if isinstance(v, list)}
        assert linked == expected
        values = [v for v in api[node_id]["inputs"].values() if not isinstance(v, list)]
        shown = [v for v in node.get("widgets_values", []) if v not in ("fixed", "randomize")]
        assert shown == values, node["type"]
