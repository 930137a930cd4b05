# SPDX-License-Identifier: Apache-2.0
"""Find the native module built for the running torch and Python, and load no other one."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import platform
import re
import shlex
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

# What the module asks of the hosts here; the same number stands in plugin/python_host.h.
HOST_INTERFACE = 4
HERE = Path(__file__).resolve().parent


class NativeUnavailable(RuntimeError):
    """No native module fits this torch and Python; the message is one sentence for people."""


def _torch_minor() -> tuple[str, str]:
    major, minor = torch.__version__.split(".")[:2]
    return major, minor


def _folders() -> list[Path]:
    """This folder first, then that of an installed distribution, which is not imported.

    One under the name `lacuna` is another project's package, or a version of ours from before.
    """
    folders = [HERE]
    try:
        spec = importlib.util.find_spec("lacuna_erasure")
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


def _quoted(path: str | Path, windows: bool = os.name == "nt") -> str:
    """As an argument in a shell of this system."""
    text = str(path)
    if not windows:
        return shlex.quote(text)
    return text if re.fullmatch(r"[\w.:\\/~+-]+", text) else f'"{text}"'


def _build_command() -> str:
    """One line for any shell that builds a module for this Python; see the script it runs."""
    python = _quoted(sys.executable or "python")
    script = HERE.parent / "tools" / "build_module.py"
    if script.is_file():
        command, place = f"{python} {_quoted(script)}", ""
    else:  # installed, or an archive without sources
        script = Path("tools", "build_module.py")
        command, place = f"{python} {script} --into {_quoted(HERE)}", " in a checkout of Lacuna"
    # A quoted program is only a text there.
    powershell = " (in PowerShell, put & and a space before it)" if python[0] == '"' else ""
    return f"`{command}`{place}{powershell}"


def _explain(problem: str) -> str:
    python = ".".join(str(part) for part in sys.version_info[:2])
    return (
        f"Lacuna's native module {problem}: this is torch {torch.__version__}, Python {python}, "
        f"{platform.system()} {platform.machine()}, and the folder holds {_shipped()}; "
        f"to build one that fits, run {_build_command()} and restart."
    )


@functools.cache
def _load() -> ModuleType | str:
    name = "_lacuna_t{}{}".format(*_torch_minor())
    # Names are compared before a file is opened: a module for another torch can crash the process.
    file_name = name + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
    file = next((f for folder in _folders() if (f := folder / file_name).is_file()), None)
    if file is None:
        return _explain("is missing")
    if name in sys.modules:  # two of them cannot live in one process
        loaded = Path(sys.modules[name].__file__)
        if loaded.resolve() == file.resolve():
            return sys.modules[name]
        return (
            f"Lacuna's native module {file} cannot be used beside that of another copy of Lacuna, "
            f"{loaded}: remove one of the two and restart."
        )
    loader = importlib.machinery.ExtensionFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        return _explain(f"{file.name} could not be loaded ({error})")
    if getattr(module, "host_interface", None) != HOST_INTERFACE:
        return _explain(f"{file.name} was built from another version of these files")
    sys.modules[name] = module
    return module


def load() -> ModuleType:
    """The native module, loaded once per process."""
    result = _load()
    if isinstance(result, str):
        raise NativeUnavailable(result)
    return result
