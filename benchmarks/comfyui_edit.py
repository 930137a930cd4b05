# SPDX-License-Identifier: Apache-2.0
"""What Attention Refine takes inside a real ComfyUI: checkpoints of full size, many concepts.

COMFYUI_DIR=... python benchmarks/comfyui_edit.py sd15 --concepts 300 --templates 1
COMFYUI_DIR=... python benchmarks/comfyui_edit.py sdxl --concepts 10 --device cuda

The checkpoint has random weights in the shapes of SD1.5 or SDXL. Attention Refine's MODEL, loaded
as for sampling, is queued over HTTP with the widgets of saved graphs. One other concept goes first,
which loads the model, the encoder and what is cached on disk. Prints one JSON object: wall seconds
of the queued graph, the most memory of ComfyUI's process and of its torch on the card above what
they held before it, and the bytes that the patches on the MODEL hold.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from comfyui import (
    CHECKPOINT,
    FAMILIES,
    REPOSITORY,
    Graph,
    Server,
    card_bytes,
    protocol,
    serving,
    watched,
)
from graphs import Builder


def names(count: int) -> list[str]:
    """As many different names of two or more words as asked for, made of those of the preset."""
    preset = json.loads((REPOSITORY / "presets" / "artists_100.json").read_text("utf-8"))
    words = [item["target"].split() for item in preset["concepts"]]
    words = [item for item in words if len(item) > 1]
    made = (
        f"{words[i][0]} {' '.join(words[(i + turn) % len(words)][1:])}"
        for turn in range(len(words))
        for i in range(len(words))
    )
    return list(dict.fromkeys(made))[:count]


def edit(build: Builder, concepts: list[str], templates: int) -> Graph:
    text = "\n".join(f"{name} -> art" for name in concepts)
    return (
        build.checkpoint(CHECKPOINT)
        | build.concepts(concepts=text, preserve="", templates=templates, general_prior="small")
        | build.refine()
        | build.weights(["refine", 0], "weights")
        | {"patches": {"class_type": "LacunaTestPatches", "inputs": {"model": ["refine", 0]}}}
    )


def megabytes(pid: int, field: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measured(server: Server, graph: Graph) -> dict[str, float]:
    before = megabytes(server.pid, "VmRSS")
    card_before = card_bytes(server)
    Path(f"/proc/{server.pid}/clear_refs").write_text("5", "ascii")  # the peak begins again
    run, seconds, card_peak = watched(server, graph)
    figures = {"seconds": round(seconds, 1)}
    figures["process_mb_above"] = round(megabytes(server.pid, "VmHWM") - before)
    if server.device != "cpu":
        figures["card_mb_above"] = round((card_peak - card_before) / 2**20)
    return figures | {"patch_bytes": int(run.outputs["patches"]["text"][0])}


def measure(family: str, concepts: int, templates: int, device: str) -> dict:
    build = Builder(json.loads((REPOSITORY / "python_shim/node_schemas.json").read_text("utf-8")))
    with serving(family, device, probe=True) as server:
        *asked, other = names(concepts + 1)
        return {
            **protocol(server),
            "concepts": concepts,
            "templates": templates,
            "first_run": measured(server, edit(build, [other], templates)),
            "run": measured(server, edit(build, asked, templates)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--concepts", type=int, default=10)
    parser.add_argument("--templates", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    figures = measure(arguments.family, arguments.concepts, arguments.templates, arguments.device)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
