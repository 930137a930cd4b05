# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: the demo checkpoint is expanded and loaded once per session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))


@pytest.fixture(scope="session")
def expand() -> ModuleType:
    """tools/demo_model/expand.py as a module."""
    path = REPOSITORY / "tools" / "demo_model" / "expand.py"
    spec = importlib.util.spec_from_file_location("lacuna_expand_demo_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def demo_checkpoint(expand: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return expand.write_checkpoint(tmp_path_factory.mktemp("demo_model"))


@pytest.fixture(scope="session")
def demo(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """(denoiser, text encoder, image decoder) of the demo model."""
    pytest.importorskip("diffusers", reason="needs diffusers")
    from python_shim.diffusers_host import DiffusersHost

    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    host = DiffusersHost(demo_checkpoint, output_directory=cache, cache_directory=cache)
    return host.load_checkpoint("lacuna_demo.safetensors")
