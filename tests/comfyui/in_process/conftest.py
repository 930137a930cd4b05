# SPDX-License-Identifier: Apache-2.0
"""Runs inside one ComfyUI's Python environment without a server; started by test_adapters.py."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SHIM = Path(__file__).resolve().parents[3] / "python_shim"
sys.path.insert(0, os.environ["COMFYUI_DIR"])

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import folder_paths  # noqa: E402
import utils.install_util  # noqa: E402, F401  (later ComfyUI's comfy/utils.py hides it)

folder_paths.set_user_directory(os.environ["LACUNA_TEST_USER"])

import comfy.sd  # noqa: E402
import torch  # noqa: E402


def _import_shim() -> None:
    spec = importlib.util.spec_from_file_location(
        "lacuna_shim", SHIM / "__init__.py", submodule_search_locations=[str(SHIM)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["lacuna_shim"] = module
    spec.loader.exec_module(module)


_import_shim()


@pytest.fixture(scope="session")
def host() -> ModuleType:
    import lacuna_shim.comfyui_host

    return lacuna_shim.comfyui_host


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    """As in a node."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def checkpoint() -> tuple[Any, Any, Any]:
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(os.environ["LACUNA_TEST_CHECKPOINT"])[:3]
