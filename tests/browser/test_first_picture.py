# SPDX-License-Identifier: Apache-2.0
"""A stock ComfyUI with our folder added: three actions to the first forgotten picture, filmed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_server import Server
from PIL import Image, ImageChops, ImageStat
from test_page import SCREENSHOTS, run_script


def _difference(before: Path, after: Path) -> float:
    """Mean difference of two pictures in levels of 0 to 255."""
    with Image.open(before) as a, Image.open(after) as b:
        levels = ImageStat.Stat(ImageChops.difference(a.convert("RGB"), b.convert("RGB"))).mean
    return sum(levels) / len(levels)


@pytest.mark.stock
@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_three_actions_to_the_first_forgotten_picture(
    chromium: str, page_server: Server, renderer: str
) -> None:
    version = page_server.checkout.version
    if renderer == "vue":
        if version.startswith("0.3."):
            pytest.skip("this ComfyUI has no Nodes 2.0")
        settings = page_server.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text(json.dumps({"Comfy.VueNodes.Enabled": True}), "utf-8")
    assert [file.name for file in (page_server.base / "custom_nodes").iterdir()] == ["lacuna"]
    film = SCREENSHOTS / f"film_{version}_{renderer}"
    for old in SCREENSHOTS.glob(f"{film.name}_*.png"):
        old.unlink()

    seen = run_script(chromium, "first_picture.mjs", page_server.url("/"), film, page_server.output)

    assert seen["failures"] == []
    assert seen["actions"] == 3
    assert seen["first"] == seen["second"] == {"Before": [[64, 64]] * 4, "After": [[64, 64]] * 4}
    assert seen["restored"] == {"nodes": 14, "concepts": "owl -> tree"}
    saved = page_server.output / "lacuna"
    pairs = [
        [saved / f"{name}_{number:05}_.png" for name in ("before", "after")]
        for number in range(1, 9)  # four of the hamburger, four of the owl
    ]
    assert all(_difference(*pair) > 10 for pair in pairs)
    assert len(list(SCREENSHOTS.glob(f"{film.name}_*.png"))) == 9
