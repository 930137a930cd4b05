# SPDX-License-Identifier: Apache-2.0
"""What a user does: drop a workflow on the page, press Run, look."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comfy_server import REPOSITORY, Server
from graphs import Builder

HERE = Path(__file__).parent
SCREENSHOTS = REPOSITORY / "build" / "screenshots"
WORKFLOW = REPOSITORY / "workflows" / "erase_words.json"
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
# The front page's two run here as well; the others do so without a page, in tests/comfyui.
RUN = [file for file in WORKFLOWS if file.stem in ("erase_words", "erase_words_save_lora")]


def run_script(chromium: str, script: str, *arguments: object) -> dict[str, Any]:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["node", HERE / script, *map(str, arguments)],
        env={**os.environ, "CHROMIUM": chromium},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("workflow", RUN, ids=lambda file: file.stem)
def test_drop_run_and_see_the_pictures(chromium: str, page_server: Server, workflow: Path) -> None:
    picture = SCREENSHOTS / f"{page_server.checkout.name}_{workflow.stem}.png"
    seen = run_script(chromium, "run_workflow.mjs", page_server.url("/"), workflow, picture)
    assert seen["status"] == "success"
    assert seen["pictures"] == {"Before": [[64, 64]] * 4, "After": [[64, 64]] * 4}
    assert seen["covered"] == [] and seen["missing"] == [] and seen["failures"] == []
    assert "hamburger -> apple" in seen["report"]
    assert picture.stat().st_size > 50_000


def test_every_workflow_opens_tidily(chromium: str, page_server: Server) -> None:
    folder = SCREENSHOTS / f"{page_server.checkout.name}_opened"
    folder.mkdir(parents=True, exist_ok=True)
    answer = run_script(chromium, "open_workflows.mjs", page_server.url("/"), folder, *WORKFLOWS)
    assert answer["failures"] == []
    assert answer["seen"] == {file.stem: {"covered": [], "missing": []} for file in WORKFLOWS}


@pytest.mark.parametrize(
    ("widget", "value", "sentence"),
    [
        ("concepts", "owl -> owl", "'owl' is its own anchor"),
        ("preserve", "pizza\nhamburger", "'hamburger' is both erased and preserved"),
    ],
)
def test_a_mistake_is_told_on_the_page(
    chromium: str, page_server: Server, widget: str, value: str, sentence: str
) -> None:
    picture = SCREENSHOTS / f"{page_server.checkout.name}_{widget}_error.png"
    change = json.dumps({"title": "Concept Set", "widget": widget, "value": value})
    seen = run_script(
        chromium, "bad_input.mjs", page_server.url("/"), WORKFLOW, picture, change, sentence
    )
    assert seen["times"] == 1  # once, not once per widget


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_the_sheet_and_the_report_are_seen(
    chromium: str, page_server: Server, tmp_path: Path, renderer: str
) -> None:
    if renderer == "vue" and page_server.checkout.version.startswith("0.3."):
        pytest.skip("this ComfyUI has no Nodes 2.0")
    schemas = json.loads((REPOSITORY / "python_shim" / "node_schemas.json").read_text("utf-8"))
    build = Builder(schemas)
    text = {"text": {"class_type": "PreviewAny", "inputs": {"source": ["evaluate", 1]}}}
    graph = build.edit() | build.evaluate(["refine", 0], steps=4) | text
    file = tmp_path / "evaluate.json"
    file.write_text(json.dumps(graph), "utf-8")
    picture = SCREENSHOTS / f"{page_server.checkout.name}_evaluate_{renderer}.png"
    seen = run_script(chromium, "evaluate.mjs", page_server.url("/"), file, picture, renderer)
    assert seen["status"] == "success" and seen["failures"] == []
    pages = seen["elements"] if renderer == "vue" else seen["painted"]
    assert pages and all(width == 1180 and height > 500 for width, height in pages)
    assert any("lacuna.evaluation/1" in value for value in seen["values"])
