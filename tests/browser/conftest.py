# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's real page in a headless Chromium, for each ComfyUI checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "comfyui"))

from comfy_server import REPOSITORY, Checkout, Server
from host_fixtures import (
    CHECKPOINT_NAME,
    add_log,
    checkout,
    checkpoint_file,
    made_once,
    report_header,
    share_text_cache,
)

__all__ = ["checkout", "checkpoint_file"]

PAGE_TOOLS = REPOSITORY / "tools" / "page"


def pytest_report_header() -> list[str]:
    return report_header()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    add_log(item, outcome.get_result())


@pytest.fixture(scope="session")
def chromium() -> str:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None or shutil.which("npm") is None:
        pytest.skip("needs chromium (or CHROMIUM=...) and npm")
    with made_once():
        if not (PAGE_TOOLS / "node_modules").is_dir():
            subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=PAGE_TOOLS, check=True)
    return path


@pytest.fixture(scope="session")
def front_end(checkout: Checkout) -> Path:
    """The page that this ComfyUI asks for, from PyPI."""
    requirements = (checkout.folder / "requirements.txt").read_text("utf-8")
    wanted = re.search(r"comfyui-frontend-package==([\d.]+)", requirements)[1]
    target = REPOSITORY / "build" / "front_end" / wanted
    with made_once():
        if not target.is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            package = f"comfyui-frontend-package=={wanted}"
            subprocess.run([*pip, "--target", target, package], check=True)
    return target / "comfyui_frontend_package" / "static"


@pytest.fixture
def page_server(
    request: pytest.FixtureRequest,
    checkout: Checkout,
    front_end: Path,
    checkpoint_file: Path,
    tmp_path: Path,
) -> Iterator[Server]:
    """Fresh for every test: the page keeps its settings in the user folder. With the mark `stock`
    there is nothing but our folder and the demo model."""
    share_text_cache(tmp_path)
    host = Server(
        checkout,
        tmp_path,
        checkpoints={CHECKPOINT_NAME: checkpoint_file},
        front_end=front_end,
        probe=request.node.get_closest_marker("stock") is None,
    )
    host.start()
    yield host
    host.stop()
