# SPDX-License-Identifier: Apache-2.0
"""What LoRA Erase takes inside a real ComfyUI on a GPU: checkpoints of full size, float16.

COMFYUI_DIR=... python benchmarks/comfyui.py sd15 512 --concepts 4
COMFYUI_DIR=... python benchmarks/comfyui.py sdxl 1024 --concepts 1

The checkpoint has random weights in the shapes of SD1.5 or SDXL, and a small VAE. The graph,
Concept Set and LoRA Erase, is queued over HTTP with every widget of LoRA Erase at its default but
for the size. A short run goes first, which loads the model and the kernels. Wall seconds of the
queued graph, and the most memory of the card that ComfyUI's torch held. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
COMFYUI_TESTS = REPOSITORY / "tests" / "comfyui"
sys.path[:0] = [str(REPOSITORY / "tools" / "demo_model"), str(COMFYUI_TESTS)]

import expand  # noqa: E402
from comfy_server import Graph, Run, Server, first_checkout, host_environment  # noqa: E402
from graphs import Builder, defaults  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

FAMILIES = ("sd15", "sdxl")
CONCEPTS = ("hamburger -> apple", "owl -> tree", "ship -> house", "car -> rose")
CHECKPOINT = "random.safetensors"
ERASE = "LacunaLoRAErase"
SHORT = {"steps": 2, "images": 1, "sampling_steps": 1}


# --------------------------------------------------------------------------- checkpoint


def write_checkpoint(family: str, out: Path) -> None:
    """Runs in a process of its own, which imports ComfyUI."""
    sys.path[:0] = [os.environ["COMFYUI_DIR"], str(COMFYUI_TESTS / "in_process")]
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models
    from check_lora_names import SD15, SDXL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    sdxl = family == "sdxl"
    shape = SDXL if sdxl else SD15
    encoder = comfy.sdxl_clip.SDXLClipModel if sdxl else comfy.sd1_clip.SD1ClipModel
    config = (comfy.supported_models.SDXL if sdxl else comfy.supported_models.SD15)(dict(shape))
    with torch.device("meta"):
        parts = [UNetModel(**shape).state_dict(), encoder().state_dict()]
    generator = torch.Generator().manual_seed(1)
    unet, text = (
        expand.lively_weights({name: w.shape for name, w in part.items()}, generator, gain=0.7)
        for part in parts
    )
    weights = {expand.UNET_PREFIX + name: w for name, w in unet.items()}
    weights |= config.process_clip_state_dict_for_saving(text)
    small = load_file(expand.write_checkpoint(out.parent, random=True))
    weights |= {name: w for name, w in small.items() if name.startswith(expand.VAE_PREFIX)}
    save_file({name: w.half().contiguous() for name, w in weights.items()}, out)


# --------------------------------------------------------------------------- runs


def train(build: Builder, concepts: int, **widgets: object) -> Graph:
    text = {"concepts": "\n".join(CONCEPTS[:concepts]), "preserve": "", "templates": 30}
    graph = build.checkpoint(CHECKPOINT) | build.concepts(**text) | build.erase(**widgets)
    del graph["erase"]["inputs"]["refinement"]
    save = {"loras": ["erase", 0], "filename_prefix": "bundle"}
    return graph | {"save": {"class_type": "LacunaSaveBundle", "inputs": save}}


def card_bytes(server: Server) -> int:
    """What torch holds of the card."""
    return server.get("/system_stats")["devices"][0]["torch_vram_total"]


def watched(server: Server, graph: Graph) -> tuple[Run, float, int]:
    """The finished graph, its seconds, and the most that torch held of the card, in bytes."""
    begin, peak = time.monotonic(), 0
    prompt_id = server.queue(graph)
    while prompt_id not in server.get(f"/history/{prompt_id}"):
        time.sleep(0.05)
        peak = max(peak, card_bytes(server))
    seconds = time.monotonic() - begin
    run = server.wait(prompt_id)
    if run.status != "success":
        raise SystemExit(f"{run.error}\n{server.log_tail()}")
    return run, seconds, peak


def measured(server: Server, graph: Graph) -> dict[str, float]:
    _, seconds, peak = watched(server, graph)
    return {"seconds": round(seconds, 2), "peak_mb": round(peak / 2**20)}


@contextmanager
def serving(family: str, device: str, *, probe: bool = False) -> Iterator[Server]:
    """A started host that has a checkpoint of the family's shapes."""
    checkout = first_checkout()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        file = base / CHECKPOINT
        write = [sys.executable, __file__, family, "64", "--write", str(file)]
        environment = host_environment(device, COMFYUI_DIR=str(checkout.folder))
        subprocess.run(write, check=True, env=environment)
        server = Server(checkout, base, checkpoints={CHECKPOINT: file}, device=device, probe=probe)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def protocol(server: Server) -> dict[str, str]:
    return {
        "comfyui": server.checkout.version,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if server.device == "cuda" else "cpu",
    }


def measure(family: str, size: int, concepts: int, device: str) -> dict:
    schemas = json.loads((REPOSITORY / "python_shim/node_schemas.json").read_text("utf-8"))
    build = Builder(schemas)
    picture = {"width": size, "height": size}
    with serving(family, device) as server:
        widgets = defaults(schemas, ERASE) | picture
        server.run(train(build, concepts, **widgets | SHORT | {"gradient": "cached"}), 3600)
        figures = {**protocol(server), "concepts": concepts}
        for gradient in ("cached", "full"):  # torch keeps what it has had: the larger one last
            graph = train(build, concepts, **widgets | {"gradient": gradient})
            figures[gradient] = measured(server, graph)
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("size", type=int, help="width and height of the pictures, in pixels")
    parser.add_argument("--concepts", type=int, default=1, choices=range(1, len(CONCEPTS) + 1))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--write", type=Path, metavar="FILE", help="only write the checkpoint")
    arguments = parser.parse_args()
    if arguments.write is not None:
        write_checkpoint(arguments.family, arguments.write)
        return
    figures = measure(arguments.family, arguments.size, arguments.concepts, arguments.device)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
