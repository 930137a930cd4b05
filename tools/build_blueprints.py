# SPDX-License-Identifier: Apache-2.0
"""Write subgraphs/*.json: graphs of ours as single nodes, for ComfyUI versions that list those.

The inner nodes are those of a workflow that the page has saved; their widgets get the defaults.

python tools/build_blueprints.py
"""

from __future__ import annotations

import copy
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
INPUT_NODE, OUTPUT_NODE = -10, -20  # ComfyUI's ids of a subgraph's two ends

JSON = dict[str, Any]


@dataclass(frozen=True)
class Blueprint:
    name: str
    description: str
    workflow: str  # workflows/<workflow>.json
    types: tuple[str, ...]  # of the nodes taken from it
    widgets: dict[str, JSON]  # node type -> values other than the defaults
    inputs: dict[str, tuple[str, str]]  # name -> (node type of one of its ends, input there)
    outputs: dict[str, tuple[str, str]]  # name -> (node type, output)


WORDS = ("LacunaConceptSet", "concepts")
BLUEPRINTS = (
    Blueprint(
        name="Forget words",
        description="Makes the model forget words, one a line, in seconds and without training: "
        "Concept Set and Attention Refine in one node.",
        workflow="erase_words",
        types=("LacunaConceptSet", "LacunaAttentionRefine"),
        widgets={},
        inputs={
            "model": ("LacunaAttentionRefine", "model"),
            "clip": ("LacunaAttentionRefine", "clip"),
            "words": WORDS,
        },
        outputs={
            name: ("LacunaAttentionRefine", name) for name in ("model", "lora", "report", "clip")
        },
    ),
    Blueprint(
        name="Forget words (thorough)",
        description="Makes the model forget words, one a line, by training small LoRAs on top of "
        "the closed-form edit, and shows what is gone and what survived.",
        workflow="full_pipeline_with_evaluation",
        types=(
            "LacunaConceptSet",
            "LacunaAttentionRefine",
            "LacunaLoRAErase",
            "LacunaLoRAFuse",
            "LacunaEvaluateErasure",
        ),
        widgets={},
        inputs={
            "model": ("LacunaAttentionRefine", "model"),
            "clip": ("LacunaAttentionRefine", "clip"),
            "vae": ("LacunaEvaluateErasure", "vae"),
            "words": WORDS,
        },
        outputs={
            "model": ("LacunaLoRAFuse", "model"),
            "lora": ("LacunaLoRAFuse", "lora"),
            "sheet": ("LacunaEvaluateErasure", "sheet"),
            "verdict": ("LacunaEvaluateErasure", "verdict"),
        },
    ),
)


def _id(*names: str) -> str:
    """The same id on every build."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("lacuna", *names))))


def _slot(slots: list[JSON], name: str) -> int:
    labels = [slot["name"] for slot in slots]
    return labels.index(name)


def _with_outputs(node: JSON, schema: JSON) -> None:
    """What the node has had since the workflow was saved."""
    for item in schema["outputs"][len(node["outputs"]) :]:
        node["outputs"].append({"name": item["display_name"], "type": item["type"], "links": []})


def _with_defaults(node: JSON, schema: JSON, values: JSON) -> None:
    named = {
        item["id"]: values.get(item["id"], item["default"])
        for item in schema["inputs"]
        if "default" in item
    }
    node["widgets_values"] = list(named.values())
    node["widgets_values_named"] = named


def build(blueprint: Blueprint, schemas: dict[str, JSON]) -> JSON:
    file = REPOSITORY / "workflows" / f"{blueprint.workflow}.json"
    page = json.loads(file.read_text("utf-8"))
    nodes = {n["type"]: copy.deepcopy(n) for n in page["nodes"] if n["type"] in blueprint.types}
    for kind, node in nodes.items():
        _with_outputs(node, schemas[kind])
    kept = {node["id"]: node for node in nodes.values()}
    links: list[JSON] = []
    inputs = [
        {"id": _id(blueprint.name, "in", name), "name": name, "linkIds": []}
        for name in blueprint.inputs
    ]
    outputs = [
        {"id": _id(blueprint.name, "out", name), "name": name, "linkIds": []}
        for name in blueprint.outputs
    ]

    def link(origin: int, origin_slot: int, target: int, target_slot: int, kind: str) -> int:
        links.append({"id": len(links) + 1, "origin_id": origin, "origin_slot": origin_slot,
                      "target_id": target, "target_slot": target_slot, "type": kind})  # fmt: skip
        if origin != INPUT_NODE:
            kept[origin]["outputs"][origin_slot].setdefault("links", []).append(len(links))
        if target != OUTPUT_NODE:
            kept[target]["inputs"][target_slot]["link"] = len(links)
        return len(links)

    # Links to the model loader become links to the subgraph's inputs.
    outside = {}
    for position, (name, (kind, slot)) in enumerate(blueprint.inputs.items()):
        target = nodes[kind]
        inner = target["inputs"][_slot(target["inputs"], slot)]
        inputs[position]["type"] = inner["type"]
        if name == "words":
            outside[None] = (position, target["id"], _slot(target["inputs"], slot))
        else:
            origin = next(item for item in page["links"] if item[0] == inner["link"])
            outside[origin[1], origin[2]] = position
    for node in nodes.values():
        node["pos"] = [node["pos"][0], node["pos"][1]]
        for item in node["inputs"]:
            item["link"] = None
        for item in node["outputs"]:
            item["links"] = []
    for _, origin, origin_slot, target, target_slot, kind in page["links"]:
        if target not in kept:
            continue
        if origin in kept:
            link(origin, origin_slot, target, target_slot, kind)
        else:
            position = outside[origin, origin_slot]
            inputs[position]["linkIds"].append(
                link(INPUT_NODE, position, target, target_slot, kind)
            )
    position, target, target_slot = outside[None]
    inputs[position]["linkIds"].append(link(INPUT_NODE, position, target, target_slot, "STRING"))
    for position, (kind, slot) in enumerate(blueprint.outputs.values()):
        origin_slot = _slot(nodes[kind]["outputs"], slot)
        output = nodes[kind]["outputs"][origin_slot]
        outputs[position]["type"] = output["type"]
        outputs[position]["linkIds"].append(
            link(nodes[kind]["id"], origin_slot, OUTPUT_NODE, position, output["type"])
        )
    for kind, node in nodes.items():
        _with_defaults(node, schemas[kind], blueprint.widgets.get(kind, {}))

    left = min(node["pos"][0] for node in nodes.values())
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values())
    top = min(node["pos"][1] for node in nodes.values())
    inner_id = _id(blueprint.name)
    words = nodes["LacunaConceptSet"]["widgets_values"][0]
    outer = {
        "id": 1, "type": inner_id, "pos": [0, 0], "size": [320, 200], "flags": {}, "order": 0,
        "mode": 0, "title": blueprint.name,
        "inputs": [
            {"name": item["name"], "type": item["type"], "link": None}
            | ({"widget": {"name": "words"}} if item["name"] == "words" else {})
            for item in inputs
        ],
        "outputs": [
            {"name": item["name"], "type": item["type"], "links": None} for item in outputs
        ],
        "properties": {"proxyWidgets": [["-1", "words"]]},
        "widgets_values": [words],
    }  # fmt: skip
    definition = {
        "id": inner_id, "version": 1, "revision": 0, "config": {}, "name": blueprint.name,
        "description": blueprint.description, "category": "lacuna",
        "state": {"lastGroupId": 0, "lastNodeId": max(kept), "lastLinkId": len(links),
                  "lastRerouteId": 0},
        "inputNode": {"id": INPUT_NODE, "bounding": [left - 200, top, 120, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 80, top, 120,
                                                       40 + 20 * len(outputs)]},
        "inputs": inputs, "outputs": outputs, "widgets": [], "nodes": list(nodes.values()),
        "groups": [], "links": links, "extra": {},
    }  # fmt: skip
    return {
        "revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [outer], "links": [],
        "version": 0.4, "definitions": {"subgraphs": [definition]}, "extra": {},
    }  # fmt: skip


def main() -> None:
    text = (REPOSITORY / "python_shim" / "node_schemas.json").read_text("utf-8")
    schemas = {schema["id"]: schema for schema in json.loads(text)}
    for blueprint in BLUEPRINTS:
        file = REPOSITORY / "subgraphs" / f"{blueprint.name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(build(blueprint, schemas), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
