# SPDX-License-Identifier: Apache-2.0
"""Erase three concepts of different kinds from the demo model and show it: build/demo.png.

python tools/demo.py [--build DIR]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS / "demo_model")]

import expand  # noqa: E402
from evaluator import Evaluator  # noqa: E402
from score import Studio, Trial, read_protocol  # noqa: E402

from python_shim import cli, loader  # noqa: E402
from python_shim.errors import HostError  # noqa: E402

log = logging.getLogger("lacuna.demo")

TILE, GAP, LABEL_WIDTH, LINE = 160, 8, 190, 34
PICTURES = 4

# An object, an individual and a style, in one edit.
CONCEPTS = {
    "object": "hamburger -> apple | burger\nflag of bangladesh -> star",
    "style": "twemoji style -> a photo",
}
PRESERVE = "pizza\nwatermelon\ncat\nflag of armenia"
ERASED = [
    Trial("a photo of a hamburger", "object", "hamburger"),
    Trial("a photo of the flag of bangladesh", "flag", "flag of bangladesh"),
    Trial("a photo of a ship in twemoji style", "style", "twemoji"),
]
KEPT = [
    Trial("a photo of a pizza", "object", "pizza"),
    Trial("a photo of the flag of armenia", "flag", "flag of armenia"),
    Trial("a photo of a lion", "object", "lion"),  # listed nowhere
]


@dataclass(frozen=True)
class Row:
    title: str
    prompt: str
    images: torch.Tensor  # [n, H, W, 3] in 0..1


# As a new node is set: the edit acts on prompts that name a concept.
SAFE = {"retain_set": "small", "where": "prompts that name it"}


def erase(pack: Any, model: Any, clip: Any, progress: Any) -> tuple[Any, Any, str]:
    """Model and clip without the three concepts, and the report of Attention Refine."""
    concepts = None
    for kind, lines in CONCEPTS.items():
        inputs = {"concepts": lines, "kind": kind, "preserve": "" if concepts else PRESERVE}
        if concepts:
            inputs["previous"] = concepts
        concepts = pack.run("LacunaConceptSet", inputs)[0]
    inputs = {"model": model, "clip": clip, "concepts": concepts, **SAFE}
    erased, _, _, report, erased_clip = pack.run("LacunaAttentionRefine", inputs, progress)
    return erased, erased_clip, report


def compose(rows: list[Row], footer: str) -> Image.Image:
    """One line of pictures per row, a heading wherever the prompt changes."""
    headings = sum(i == 0 or rows[i - 1].prompt != row.prompt for i, row in enumerate(rows))
    width = LABEL_WIDTH + PICTURES * (TILE + GAP)
    height = headings * LINE + len(rows) * (TILE + GAP) + LINE
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(14)
    y, prompt = 0, None
    for row in rows:
        if row.prompt != prompt:
            prompt = row.prompt
            draw.text((GAP, y + 7), f'"{prompt}"', fill="black", font=large)
            y += LINE
        draw.text((GAP, y + TILE // 2 - 20), row.title, fill="black", font=small)
        for column, image in enumerate(row.images):
            tile = Image.fromarray((image * 255).round().byte().numpy())
            tile = tile.resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (LABEL_WIDTH + column * (TILE + GAP), y))
        y += TILE + GAP
    draw.text((GAP, y + 8), footer, fill=(90, 90, 90), font=small)
    return sheet


def demo(build: Path) -> Path:
    native = loader.load()
    from python_shim.diffusers_host import DiffusersHost

    started = time.monotonic()
    folder = build / "demo"
    host = DiffusersHost(
        expand.write_checkpoint(folder), output_directory=folder, cache_directory=folder / "cache"
    )
    model, clip, vae = host.load_checkpoint("")
    progress = cli.ProgressLine(sys.stderr)
    try:
        erased, erased_clip, report = erase(native.NodePack(str(folder)), model, clip, progress)
    finally:
        progress.clear()
    log.info("%s", report)

    sampling = read_protocol()["sampling"]
    studio = Studio(clip, vae, Evaluator.load(), sampling)
    rows = []
    for trial in [*ERASED, *KEPT]:
        for title, shown, read in (("Before", model, clip), ("After", erased, erased_clip)):
            outcome = studio.judge(shown, [trial] * PICTURES, False, read)
            seen = f"{sum(outcome.hits)} of {PICTURES}"
            log.info("%-7s %-40s '%s' seen in %s", title, trial.prompt, trial.name, seen)
            text = f"{title}\n{trial.name}:\nseen in {seen}"
            rows.append(Row(text, trial.prompt, outcome.images))
    footer = (
        f"Demo model, uce, {sampling['sampler']}, {sampling['steps']} steps, "
        f"cfg {sampling['cfg']:g}, seed {sampling['seed']}; seen: by the demo model's evaluator"
    )
    path = build / "demo.png"
    compose(rows, footer).save(path)
    log.info("%s: %.0f s", path, time.monotonic() - started)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    build = TOOLS.parent / "build"
    parser.add_argument("--build", type=Path, default=build, help="where files go")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        demo(options.build)
    except (HostError, loader.NativeUnavailable, expand.DemoModelError, OSError) as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("Interrupted.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
