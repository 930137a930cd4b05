# SPDX-License-Identifier: Apache-2.0
"""Real ComfyUI hosts for the tests; without a checkout the tests are skipped."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from comfy_server import REPOSITORY, Checkout, NoCheckout, Server, find_checkouts

collect_ignore = ["in_process", "probe_pack", "stubs"]

CHECKPOINT_NAME = "lacuna_demo.safetensors"

try:
    CHECKOUTS, PROBLEM = find_checkouts(), ""
except NoCheckout as error:
    CHECKOUTS, PROBLEM = [], str(error)


def pytest_report_header() -> list[str]:
    return [f"ComfyUI {item.version}: {item.folder}" for item in CHECKOUTS] + (
        [PROBLEM] if PROBLEM else []
    )


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
    folder = REPOSITORY / "build" / "test_data"
    file = folder / CHECKPOINT_NAME
    script = REPOSITORY / "tools" / "demo_model" / "expand.py"
    sources = [script, *(REPOSITORY / "assets" / "demo_model").iterdir()]
    newest = max(source.stat().st_mtime for source in sources)
    if not file.is_file() or file.stat().st_mtime < newest:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, script, "--out", folder], check=True)
    return file


@pytest.fixture(scope="session")
def text_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the generic captions take a minute to collect: all hosts share them."""
    return tmp_path_factory.mktemp("text_cache")


@pytest.fixture(scope="session")
def server(
    checkout: Checkout,
    checkpoint_file: Path,
    text_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    base = tmp_path_factory.mktemp(checkout.name)
    host = Server(checkout, base, checkpoints={CHECKPOINT_NAME: checkpoint_file})
    (base / "user" / "lacuna").symlink_to(text_cache)
    host.start()
    yield host
    host.stop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    host = getattr(item, "funcargs", {}).get("server")
    if report.failed and host is not None:
        report.sections.append((f"log of {host.checkout.name}", host.log_tail()))


@pytest.fixture(scope="session")
def shim() -> ModuleType:
    """python_shim under the name that the wheel gives it."""
    folder = REPOSITORY / "python_shim"
    spec = importlib.util.spec_from_file_location(
        "lacuna_shim", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["lacuna_shim"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def schemas() -> list[dict]:
    file = REPOSITORY / "python_shim" / "node_schemas.json"
    return json.loads(file.read_text("utf-8"))
