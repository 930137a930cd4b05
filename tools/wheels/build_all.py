# SPDX-License-Identifier: Apache-2.0
"""Build the native module for every torch minor, try each under its own torch, and pack one wheel.

python tools/wheels/build_all.py --out dist [--minors 2.13 2.14] [--index URL]

Every minor gets an environment of its own below --work, removed afterwards: a few GB of disk and
several minutes of one CPU core each. --index names where torch comes from; for small downloads use
https://download.pytorch.org/whl/cpu: the module is the same for CPU and GPU builds of torch. An
environment that is there already, --work/torch-<version>, gets what it lacks, and is kept. A torch
that cannot be installed is left out, which ends in an error that names it, after the other minors.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

from merge import merge, torch_minors

log = logging.getLogger("lacuna.wheels")

REPOSITORY = Path(__file__).resolve().parents[2]
OLDEST = (2, 7)  # what ComfyUI supports
BUILD_TOOLS = ("scikit-build-core>=0.11", "cmake>=3.21", "ninja", "numpy")
# Loads the module through the loader, and uses it.
CHECK = """
import json, torch
from lacuna_erasure import loader
native = loader.load()
assert native.torch_version == torch.__version__.split("+")[0], native.torch_version
text = native.NodePack().run("LacunaConceptSet", {"concepts": "cat -> dog"})[1]
assert json.loads(text)["concepts"][0]["target"] == "cat"
"""
# Under a torch that the installed wheel has no module for.
REFUSED = """
from lacuna_erasure import loader
try:
    loader.load()
except loader.NativeUnavailable as error:
    assert "is missing" in str(error) and "build_module.py" in str(error), error
else:
    raise SystemExit("a module for another torch was loaded")
"""


def newest_of_each_minor(versions: Iterable[str]) -> dict[str, str]:
    """Minor -> its newest release, oldest minor first; without pre-releases and what is too old."""
    newest: dict[tuple[int, int], int] = {}
    for version in versions:
        if match := re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:\+\w+)?", version.strip()):
            major, minor, patch = map(int, match.groups())
            if (major, minor) >= OLDEST:
                newest[major, minor] = max(patch, newest.get((major, minor), 0))
    return {f"{a}.{b}": f"{a}.{b}.{newest[a, b]}" for a, b in sorted(newest)}


def listed_versions(text: str) -> list[str]:
    """Versions in what `pip index versions torch` prints."""
    match = re.search(r"^Available versions: (.*)$", text, re.M)
    return [version.strip() for version in match[1].split(",")] if match else []


def _run(*command: str | Path, cwd: Path = REPOSITORY) -> str:
    log.info("%s", " ".join(map(str, command)))
    return subprocess.run(command, cwd=cwd, check=True, text=True, stdout=subprocess.PIPE).stdout


def _index(url: str | None) -> list[str]:
    return ["--index-url", url] if url else []


def _python(environment: Path) -> Path:
    folder = "Scripts" if sys.platform == "win32" else "bin"
    return environment / folder / "python"


def _environment(folder: Path, version: str, index: str | None) -> None:
    python = _python(folder)
    if not python.exists():
        venv.create(folder, with_pip=True)
        _run(python, "-m", "pip", "install", "--quiet", f"torch=={version}", *_index(index))
    _run(python, "-m", "pip", "install", "--quiet", *BUILD_TOOLS)


def _built(environment: Path, minor: str) -> Path:
    """A wheel for this environment's torch, tried under it."""
    folder = environment / "wheel"
    python = _python(environment)
    _run(python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", ".", "-w", folder)
    (wheel,) = folder.glob("lacuna_erasure-*.whl")
    if torch_minors(wheel) != [minor]:
        raise SystemExit(f"{wheel} has modules for {torch_minors(wheel)} instead of {minor}.")
    _try(environment, wheel, CHECK)
    return wheel


def _try(environment: Path, wheel: Path, script: str) -> None:
    python = _python(environment)
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    _run(python, "-c", script, cwd=environment)  # not the repository: it has a module of its own


def build_all(minors: dict[str, str], work: Path, out: Path, index: str | None) -> Path:
    wheels: dict[str, Path] = {}
    left_out: list[str] = []
    for minor, version in minors.items():
        environment = work / f"torch-{version}"
        kept_environment = environment.exists()
        try:
            _environment(environment, version, index)
        except subprocess.CalledProcessError:
            log.warning("torch %s cannot be installed here: no module for %s", version, minor)
            left_out.append(version)
            if not kept_environment:
                shutil.rmtree(environment)
            continue
        kept = work / minor / (wheel := _built(environment, minor)).name
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(wheel, kept)
        if wheels:  # the minor before: its module must not be opened here
            _try(environment, next(reversed(wheels.values())), REFUSED)
        wheels[minor] = kept
        if not kept_environment:
            shutil.rmtree(environment)
    if not wheels:
        raise SystemExit(
            "No torch could be installed, so there is no wheel: see what pip says above."
        )
    merged = merge(list(wheels.values()), out)
    log.info("%s: torch %s", merged, ", ".join(torch_minors(merged)))
    if left_out:
        raise SystemExit(f"{merged} lacks torch {', '.join(left_out)}: pip could not install it.")
    return merged


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "wheels")
    parser.add_argument("--minors", nargs="*", help="e.g. 2.13 2.14; default: all there are")
    parser.add_argument("--index", help="package index for torch")
    chosen = parser.parse_args(arguments)
    listing = _run(sys.executable, "-m", "pip", "index", "versions", "torch", *_index(chosen.index))
    minors = newest_of_each_minor(listed_versions(listing))
    if chosen.minors:
        missing = sorted(set(chosen.minors) - minors.keys())
        if missing:
            parser.error(f"no torch {', '.join(missing)} for this Python: there are {[*minors]}")
        minors = {minor: minors[minor] for minor in chosen.minors}
    chosen.work.mkdir(parents=True, exist_ok=True)
    build_all(minors, chosen.work, chosen.out, chosen.index)


if __name__ == "__main__":
    main()
