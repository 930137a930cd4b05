# SPDX-License-Identifier: Apache-2.0
"""Every workflow we ship runs, and a second queue costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
from comfy_server import REPOSITORY, Graph, Server
from graphs import QUICK

WORKFLOWS = sorted((REPOSITORY / "workflows" / "api").glob("*.json"))
# The front page's two run with the values they are shipped with, the others with fewer prompts,
# steps and pictures: on a CPU they take minutes otherwise.
AS_SHIPPED = ("erase_words", "erase_words_save_lora")
# This one opens a bundle that that one saved.
NEEDS = {"add_concept_to_bundle": "full_pipeline_with_evaluation"}


def _graph(name: str) -> Graph:
    return json.loads((REPOSITORY / "workflows" / "api" / f"{name}.json").read_text("utf-8"))


def _quick(graph: Graph) -> Graph:
    """The same nodes, links, concepts and methods with little to compute."""
    quick = {**QUICK, "KSampler": {"steps": 2}, "EmptyLatentImage": {"batch_size": 1}}
    for spec in graph.values():
        spec["inputs"] |= quick.get(spec["class_type"], {})
        typed = spec["inputs"].get("concepts")
        if isinstance(typed, str) and typed.startswith("{"):
            listed = json.loads(typed)
            for item in listed["concepts"] + listed["preserve"]:
                item["templates"] = 1
            spec["inputs"]["concepts"] = json.dumps(listed)
    return graph


def _ready(server: Server, name: str) -> Graph:
    """The graph as it is tested, after the one whose files it needs."""
    if name in NEEDS and not (server.output / "lacuna" / "bundle_00001_.safetensors").is_file():
        server.run(_ready(server, NEEDS[name]), seconds=900)
    return _graph(name) if name in AS_SHIPPED else _quick(_graph(name))


def _pictures(server: Server, graph: Graph, outputs: dict) -> dict[str, list[bytes]]:
    """Contents of the pictures that each node shows, by its title."""
    pictures: dict[str, list[bytes]] = {}
    for node, output in outputs.items():
        for entry in output.get("images", []):
            folder = server.output if entry["type"] == "output" else server.base / "temp"
            data = (folder / entry["subfolder"] / entry["filename"]).read_bytes()
            pictures.setdefault(graph[node]["_meta"]["title"], []).append(data)
    return pictures


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflow(server: Server, file: Path) -> None:
    graph = _ready(server, file.stem)
    run = server.run(graph, seconds=900)
    pictures = _pictures(server, graph, run.outputs)
    savers = {
        spec["_meta"]["title"] for spec in graph.values() if spec["class_type"] == "SaveImage"
    }
    count = next(
        (s["inputs"]["batch_size"] for s in graph.values() if "batch_size" in s["inputs"]), 0
    )
    assert all(len(pictures[title]) == count for title in savers)
    for title in savers:
        if not title.lower().endswith("before"):
            base = f"{title[:-6]} before" if title.endswith(" after") else "Before"
            assert all(a != b for a, b in zip(pictures[base], pictures[title], strict=True)), title
    assert savers or "Evaluate Erasure" in pictures
    texts = [output["text"][0] for output in run.outputs.values() if "text" in output]
    assert texts and all(texts)
    assert server.run(graph).cached == set(graph)


def test_the_lora_workflow_saves_a_lora(server: Server) -> None:
    graph = _graph("erase_words_save_lora")
    prefix = next(
        spec["inputs"]["filename_prefix"]
        for spec in graph.values()
        if spec["class_type"] == "LacunaSaveLoRA"
    )
    server.run(graph, seconds=900)
    saved = list(server.output.glob(f"{prefix}_*.safetensors"))
    assert saved and all(safetensors.torch.load_file(file) for file in saved)


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
