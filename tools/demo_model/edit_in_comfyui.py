# SPDX-License-Identifier: Apache-2.0
"""Edit the demo model inside a real ComfyUI, over HTTP, and save the checkpoint.

COMFYUI_DIR=... python tools/demo_model/edit_in_comfyui.py --task styles2 --gradient full --out FILE
python tools/demo_model/score.py --task styles2 --method full_http --checkpoint FILE

The graph is the one a user would build: Concept Set, Attention Refine, LoRA Erase, LoRA Fuse,
ComfyUI's own Save Checkpoint, with the settings of protocol.json. Its scores should be those of the
headless host (`score.py --method full`).
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
REPOSITORY = TOOLS.parents[1]
sys.path[:0] = [str(TOOLS), str(REPOSITORY / "tests" / "comfyui")]

import expand  # noqa: E402
from comfy_server import Graph, Server, first_checkout  # noqa: E402
from graphs import Builder  # noqa: E402
from score import GRADIENTS, concept_set_inputs, read_protocol  # noqa: E402

log = logging.getLogger("lacuna.demo_model")

CHECKPOINT = "lacuna_demo.safetensors"


def graph_of(task: str, gradient: str) -> Graph:
    """The full chain for a task of the protocol, down to the saved checkpoint."""
    protocol = read_protocol()
    schemas = json.loads(
        (REPOSITORY / "python_shim" / "node_schemas.json").read_text(encoding="utf-8")
    )
    build = Builder(schemas)
    graph = (
        build.checkpoint(CHECKPOINT)
        | build.concepts(**concept_set_inputs(protocol["tasks"][task]))
        | build.refine(method="uce", **protocol["refinement"])
        | build.erase(gradient=gradient, **protocol["training"][gradient])
        | build.fuse(**protocol["fusion"])
    )
    save = {
        "class_type": "CheckpointSave",
        "inputs": {
            "model": ["fuse", 0],
            "clip": ["ckpt", 1],
            "vae": ["ckpt", 2],
            "filename_prefix": "edited",
        },
    }
    return graph | {"save": save}


def edit(task: str, gradient: str, out: Path, device: str) -> None:
    """Run the graph in the first ComfyUI found and move the checkpoint to `out`."""
    checkout = first_checkout()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        checkpoint = expand.write_checkpoint(base / "demo")
        server = Server(checkout, base, checkpoints={CHECKPOINT: checkpoint}, device=device)
        server.start()
        try:
            started = time.monotonic()
            server.run(graph_of(task, gradient), seconds=3600)
            log.info(
                "%s, %s, in ComfyUI %s: %.0f s",
                task, gradient, checkout.version, time.monotonic() - started,
            )  # fmt: skip
            file = max(server.output.glob("edited_*.safetensors"))
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, out)
        finally:
            server.stop()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=list(read_protocol()["tasks"]))
    parser.add_argument("--gradient", default="full", choices=GRADIENTS)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    edit(options.task, options.gradient, options.out, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
