# SPDX-License-Identifier: Apache-2.0
"""Real ComfyUI hosts for the tests; without a checkout the tests are skipped."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from comfy_server import REPOSITORY
from host_fixtures import add_log, checkout, checkpoint_file, report_header, server

__all__ = ["checkout", "checkpoint_file", "server"]

collect_ignore = ["in_process", "probe_pack", "stubs"]


def pytest_report_header() -> list[str]:
    return report_header()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    add_log(item, outcome.get_result())


@pytest.fixture(scope="session")
def shim() -> ModuleType:
    """python_shim under another name than the wheel's, so that both can be there."""
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
