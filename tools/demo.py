# SPDX-License-Identifier: Apache-2.0
"""Erase a concept from the demo model and show it: build/demo.png.

python tools/demo.py [--workflow FILE] [--build DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, ImageDraw, ImageFont

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from python_shim import cli, loader  # noqa: E402
from python_shim.errors import HostError  # noqa: E402

log = logging.getLogger("lacuna.demo")

TILE, GAP, LABEL_WIDTH, LINE = 192, 8, 110, 34

Workflow = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    title: str
    prompt: str
    images: list[Path]


def expand_module() -> ModuleType:
    path = REPOSITORY / "tools" / "demo_model" / "expand.py"
    spec = importlib.util.spec_from_file_location("lacuna_expand_demo_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_checkpoint(build: Path) -> tuple[Path, str]:
    """The trained draft, or a checkpoint of noise when the weights are not there."""
    expand = expand_module()
    try:
        return expand.write_checkpoint(build), "the demo model (draft weights)"
    except expand.DemoModelError as error:
        log.warning("Random weights are used: %s", error)
        return expand.write_checkpoint(build, random=True), "random weights: the pictures are noise"


def upstream(workflow: Workflow, node_id: str, class_type: str) -> str | None:
    """The nearest node of a type among the ancestors of a node."""
    queue, seen = [node_id], set()
    while queue:
        current = queue.pop(0)
        if current in seen or current not in workflow:
            continue
        seen.add(current)
        if workflow[current]["class_type"] == class_type:
            return current
        links = [v for v in workflow[current].get("inputs", {}).values() if isinstance(v, list)]
        queue += [link[0] for link in links]
    return None


def prompt_node(workflow: Workflow, image_node: str) -> str | None:
    sampler = upstream(workflow, image_node, "KSampler")
    positive = workflow[sampler]["inputs"].get("positive") if sampler else None
    return upstream(workflow, positive[0], "CLIPTextEncode") if isinstance(positive, list) else None


def kept_phrase(workflow: Workflow) -> str | None:
    """The first entry of the list of what must stay."""
    for node in workflow.values():
        if node["class_type"] == "LacunaConceptSet":
            lines = str(node["inputs"].get("preserve", "")).split("\n")
            return next((line.strip() for line in lines if line.strip()), None)
    return None


def run(native: ModuleType, host: object, workflow: Workflow) -> tuple[list[Row], list[str]]:
    progress = cli.ProgressLine(sys.stderr)
    try:
        results = native.NodePack().run_workflow(json.dumps(workflow), host, progress)
    finally:
        progress.clear()
    rows, texts = [], []
    for node_id in sorted(results, key=list(workflow).index):
        texts += results[node_id].get("text", [])
        images = [Path(path) for path in results[node_id].get("images", [])]
        if images:
            source = prompt_node(workflow, node_id)
            title = workflow[node_id].get("_meta", {}).get("title", f"node {node_id}")
            rows.append(Row(title, workflow[source]["inputs"]["text"] if source else "", images))
    return rows, texts


def with_prompt(workflow: Workflow, text: str) -> Workflow:
    """The same workflow, drawing something else."""
    changed = json.loads(json.dumps(workflow))
    for node_id, node in workflow.items():
        if node["class_type"] in ("SaveImage", "PreviewImage"):
            source = prompt_node(workflow, node_id)
            if source:
                changed[source]["inputs"]["text"] = text
    return changed


def compose(rows: list[Row], footer: str) -> Image.Image:
    """One line of pictures per row, a heading wherever the prompt changes."""
    columns = max(len(row.images) for row in rows)
    headings = sum(i == 0 or rows[i - 1].prompt != row.prompt for i, row in enumerate(rows))
    width = LABEL_WIDTH + columns * (TILE + GAP)
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
        draw.text((GAP, y + TILE // 2 - 10), row.title, fill="black", font=large)
        for column, path in enumerate(row.images):
            with Image.open(path) as image:
                tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (LABEL_WIDTH + column * (TILE + GAP), y))
        y += TILE + GAP
    draw.text((GAP, y + 8), footer, fill=(90, 90, 90), font=small)
    return sheet


def demo(workflow_file: Path, build: Path) -> Path:
    workflow = cli.read_workflow(workflow_file)
    native = loader.load()
    from python_shim.diffusers_host import DiffusersHost

    checkpoint, what = make_checkpoint(build / "demo")
    host = DiffusersHost(
        checkpoint, output_directory=build / "demo", cache_directory=build / "demo" / "cache"
    )
    started = time.monotonic()
    rows, texts = run(native, host, workflow)
    kept = kept_phrase(workflow)
    if kept:
        rows += run(native, host, with_prompt(workflow, f"a photo of a {kept}"))[0]
    if not rows:
        raise HostError(f"{workflow_file} saves no images, so that there is nothing to show.")
    for text in dict.fromkeys(texts):
        log.info("%s", text)
    footer = f"{workflow_file.name} with {what}"
    path = build / "demo.png"
    compose(rows, footer).save(path)
    log.info("%s: %s, %.0f s", path, footer, time.monotonic() - started)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = REPOSITORY / "workflows" / "api" / "erase_words.json"
    parser.add_argument("--workflow", type=Path, default=default, help="workflow in API format")
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build", help="where files go")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        demo(options.workflow, options.build)
    except (HostError, loader.NativeUnavailable, OSError) as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("Interrupted.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
