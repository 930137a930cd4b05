# SPDX-License-Identifier: Apache-2.0
"""Find the native module built for the running torch and Python, and load no other one."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import platform
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent


class NativeUnavailable(RuntimeError):
    """No native module fits this torch and Python; the message is one sentence for people."""


def _torch_minor() -> tuple[str, str]:
    major, minor = torch.__version__.split(".")[:2]
    return major, minor


def _folders() -> list[Path]:
    """This folder first, then that of an installed `lacuna` distribution, which is not imported."""
    folders = [HERE]
    try:
        spec = importlib.util.find_spec("lacuna")
    except (ImportError, ValueError):
        spec = None
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location).resolve()
        if folder not in folders:
            folders.append(folder)
    return folders


def _shipped() -> str:
    builds = set()
    for file in (file for folder in _folders() for file in folder.glob("_lacuna_t*")):
        match = re.fullmatch(
            r"_lacuna_t(\d)(\d+)\.(?:cpython-|cp)(\d)(\d+).*\.(?:so|pyd)", file.name
        )
        if match:
            builds.add(f"torch {match[1]}.{match[2]} on Python {match[3]}.{match[4]}")
    return ", ".join(sorted(builds)) or "no build at all"


def _explain(problem: str) -> str:
    python = ".".join(str(part) for part in sys.version_info[:2])
    source = HERE.parent if (HERE.parent / "CMakeLists.txt").is_file() else "a checkout of Lacuna"
    return (
        f"Lacuna's native module {problem}: this is torch {torch.__version__}, Python {python}, "
        f"{platform.system()} {platform.machine()}, and the folder holds {_shipped()}; "
        f"to build one that fits, run `pip install --no-build-isolation .` in {source} and restart."
    )


@functools.cache
def _load() -> ModuleType | str:
    name = "_lacuna_t{}{}".format(*_torch_minor())
    if name in sys.modules:
        return sys.modules[name]
    # Names are compared before a file is opened: a module for another torch can crash the process.
    file_name = name + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
    file = next((f for folder in _folders() if (f := folder / file_name).is_file()), None)
    if file is None:
        return _explain("is missing")
    loader = importlib.machinery.ExtensionFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        return _explain(f"{file.name} could not be loaded ({error})")
    sys.modules[name] = module
    return module


def load() -> ModuleType:
    """The native module, loaded once per process."""
    result = _load()
    if isinstance(result, str):
        raise NativeUnavailable(result)
    return result
