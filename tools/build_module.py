# SPDX-License-Identifier: Apache-2.0
"""Build the native module for the Python that runs this script, and put it where Lacuna looks.

    python tools/build_module.py [--into FOLDER]

Needs a C++20 compiler and nothing else: cmake and ninja come from the package index into a folder
that is removed afterwards, so that the environment of a ComfyUI stays as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SHIM = REPOSITORY / "python_shim"  # where CMake puts the module of a checkout
WINDOWS = os.name == "nt"
# On Windows, CMake finds Visual Studio by itself, and needs no ninja.
TOOLS = ("cmake>=3.21",) if WINDOWS else ("cmake>=3.21", "ninja")


class CannotBuild(Exception):
    """One sentence for people."""


def _check() -> None:
    """What is missing is told before anything is downloaded."""
    python = ".".join(map(str, sys.version_info[:3]))
    if importlib.util.find_spec("torch") is None:
        raise CannotBuild(f"{sys.executable} has no torch: run this with the Python of ComfyUI.")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        how = (
            f"copy the folders include and libs of an installed Python {python} beside python.exe"
            if WINDOWS
            else "install them (Debian and Ubuntu: sudo apt install python3-dev)"
        )
        raise CannotBuild(f"{sys.executable} has no C headers: {how}, and try again.")
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    if not WINDOWS and not any(name and shutil.which(name.split()[0]) for name in compilers):
        how = "xcode-select --install" if platform.system() == "Darwin" else "sudo apt install g++"
        raise CannotBuild(f"There is no C++ compiler here: install one ({how}), and try again.")


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def _download_tools(folder: Path) -> None:
    settings = os.environ | {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--python", sys.executable]
    else:
        return
    command += ["--quiet", "--no-compile", "--target", str(folder), *TOOLS]
    subprocess.run(command, check=False, env=settings)


def _tool(name: str, folder: Path) -> str:
    """The downloaded program, else the system's."""
    file = f"{name}.exe" if WINDOWS else name
    found = [path for path in folder.rglob(file) if path.is_file() and path.parent.name == "bin"]
    # Beside cmake's program lies a Python script of its name, which the deeper folder has not.
    path = max(found, key=lambda path: len(path.parts), default=None) or shutil.which(name)
    if path is None:
        raise CannotBuild(
            f"{name} is not here and could not be downloaded (see above): install it, or connect "
            "to the internet, and try again."
        )
    return str(path)


def build(target: Path) -> Path:
    """The module's file in `target`."""
    _check()
    if not target.is_dir():
        raise CannotBuild(f"There is no folder {target}.")
    with tempfile.TemporaryDirectory(prefix="lacuna-build-") as name:
        tools, folder = Path(name, "tools"), Path(name, "build")
        _download_tools(tools)
        cmake = _tool("cmake", tools)
        options = ["-DLACUNA_TESTS=OFF", "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_BUILD_TYPE=Release",
                   f"-DPython_EXECUTABLE={Path(sys.executable).as_posix()}"]  # fmt: skip
        if not WINDOWS:
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja', tools)}"]
        _run(cmake, "-S", REPOSITORY, "-B", folder, *options)
        _run(cmake, "--build", folder, "--config", "Release", "--target", "lacuna_module",
             "--parallel", str(os.cpu_count() or 1))  # fmt: skip
        module = next(
            file
            for file in (folder / "plugin").rglob("_lacuna_t*")
            if file.suffix in (".so", ".pyd")
        )
        placed = target / module.name
        if target.resolve() != SHIM:
            part = placed.with_suffix(".new")
            shutil.copy(module, part)
            os.replace(part, placed)
    return placed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--into", type=Path, default=SHIM, metavar="FOLDER",
        help="the folder of Lacuna's loader.py; without it, that of this checkout",
    )  # fmt: skip
    target = parser.parse_args(arguments).into
    try:
        placed = build(target)
    except CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:
        print(
            "Lacuna's native module could not be built: see the first error above. It needs a "
            "C++20 compiler: gcc 11, clang 14, Visual Studio 2022 or newer.",
            file=sys.stderr,
        )
        return 1
    print(f"{placed} is ready; restart ComfyUI.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
