# SPDX-License-Identifier: Apache-2.0
"""Fixtures of every test that needs a real ComfyUI."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import REPOSITORY, Checkout, NoCheckout, Server, find_checkouts
from filelock import FileLock

CHECKPOINT_NAME = "lacuna_demo.safetensors"
TEST_DATA = REPOSITORY / "build" / "test_data"


def made_once() -> FileLock:
    """Held while something is made that all test processes share."""
    TEST_DATA.mkdir(parents=True, exist_ok=True)
    return FileLock(TEST_DATA / "made_once.lock")


try:
    CHECKOUTS, PROBLEM = find_checkouts(), ""
except NoCheckout as error:
    CHECKOUTS, PROBLEM = [], str(error)


def report_header() -> list[str]:
    return [f"ComfyUI {item.version}: {item.folder}" for item in CHECKOUTS] or [
        PROBLEM or "no ComfyUI: real-host tests are skipped, set COMFYUI_DIR to run them"
    ]


@pytest.fixture(scope="session", params=CHECKOUTS or [None], ids=lambda c: c.name if c else "none")
def checkout(request: pytest.FixtureRequest) -> Checkout:
    if PROBLEM:
        pytest.fail(PROBLEM)
    if request.param is None:
        pytest.skip("set COMFYUI_DIR")
    return request.param


@pytest.fixture(scope="session")
def checkpoint_file() -> Path:
    """The demo model, expanded once per checkout of this repository."""
    file = TEST_DATA / CHECKPOINT_NAME
    script = REPOSITORY / "tools" / "demo_model" / "expand.py"
    sources = [script, *(REPOSITORY / "assets" / "demo_model").iterdir()]
    newest = max(source.stat().st_mtime for source in sources)
    with made_once():
        if not file.is_file() or file.stat().st_mtime < newest:
            subprocess.run([sys.executable, script, "--out", TEST_DATA], check=True)
    return file


def share_text_cache(base: Path) -> None:
    """Statistics of the generic captions take a minute to collect: one folder for all hosts."""
    cache = TEST_DATA / "text_cache"
    cache.mkdir(parents=True, exist_ok=True)
    (base / "user").mkdir(exist_ok=True)
    (base / "user" / "lacuna").symlink_to(cache)


@pytest.fixture(scope="session")
def server(
    checkout: Checkout, checkpoint_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    base = tmp_path_factory.mktemp(checkout.name)
    share_text_cache(base)
    host = Server(checkout, base, checkpoints={CHECKPOINT_NAME: checkpoint_file})
    host.start()
    yield host
    host.stop()


def add_log(item: pytest.Item, report: pytest.TestReport) -> None:
    """A failure is told together with what ComfyUI wrote."""
    for host in getattr(item, "funcargs", {}).values():
        if report.failed and isinstance(host, Server):
            report.sections.append((f"log of {host.checkout.name}", host.log_tail()))
