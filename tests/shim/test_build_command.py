# SPDX-License-Identifier: Apache-2.0
"""A missing native module: the command that the sentence gives works alone, and as it is given."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from python_shim import loader

SOURCES = ("CMakeLists.txt", "pyproject.toml", "cmake", "native", "nodes", "plugin", "python_shim",
           "third_party", "tools/build_module.py")  # fmt: skip
BUILD_TOOLS = ("cmake", "ninja", "scikit_build_core")
LOAD = """
from python_shim import loader
try:
    print(loader.load().__version__)
except loader.NativeUnavailable as error:
    print(error)
"""
# Everything of the real thing but the minutes: our sources become empty objects, and what is
# linked of them is the module that was built before. CMake's own checks reach the real compiler.
COMPILER = """#!/bin/sh
for part in "$@"; do
  [ "$last" = -o ] && out=$part
  [ "$last" = -MF ] && printf '%s:\\n' "$out" > "$part"
  last=$part
done
case $out in
  *lacuna_*.dir/*.o) exec {real} -x c++ -c /dev/null -o "$out" ;;
  *_lacuna_t*) exec cp '{module}' "$out" ;;
esac
exec {real} "$@"
"""


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A checkout without a module, in a folder with a space."""
    folder = tmp_path / "custom nodes" / "lacuna"
    ignored = shutil.ignore_patterns("_lacuna_t*", "__pycache__")
    for name in SOURCES:
        source, target = REPOSITORY / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Of an environment like this one, but without build tools."""
    folder = tmp_path / "its own python"
    venv.create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().replace("-", "_").startswith(BUILD_TOOLS):
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def _loaded(python: Path, pack: Path) -> str:
    command = [python, "-c", LOAD]
    return subprocess.run(command, cwd=pack, check=True, text=True, stdout=subprocess.PIPE).stdout


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for the compiler is a shell script")
def test_the_command_of_the_sentence_builds_the_module(
    pack: Path, python: Path, tmp_path: Path
) -> None:
    try:
        module = loader.load()
    except loader.NativeUnavailable:
        pytest.skip("the native module is not built")
    compiler = tmp_path / "c++"
    real = shutil.which("c++")
    compiler.write_text(COMPILER.format(real=real, module=module.__file__))
    compiler.chmod(0o755)
    site = sorted(python.parents[1].glob("lib/python*/site-packages/*"))

    command = re.search("run `(.+?)`", _loaded(python, pack))[1]
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"CXX": str(compiler), "CCACHE_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.endswith(" is ready; restart ComfyUI.\n")
    assert _loaded(python, pack).strip() == module.__version__
    assert sorted(python.parents[1].glob("lib/python*/site-packages/*")) == site


def test_the_command_names_this_python_and_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "HERE", tmp_path / "lacuna erasure")
    monkeypatch.setattr(loader.sys, "executable", "/opt/it's here/python")
    assert loader._build_command() == (
        f"""`'/opt/it'"'"'s here/python' tools/build_module.py --into '{loader.HERE}'`"""
        " in a checkout of Lacuna"
    )
    assert loader._quoted(r"C:\ComfyUI\python_embeded\python.exe", windows=True) == (
        r"C:\ComfyUI\python_embeded\python.exe"
    )
    assert loader._quoted(r"C:\My Apps\python.exe", windows=True) == r'"C:\My Apps\python.exe"'


@pytest.fixture
def build_module():
    path = REPOSITORY / "tools" / "build_module.py"
    spec = importlib.util.spec_from_file_location("lacuna_build_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_missing_is_told_before_anything_is_downloaded(
    build_module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(build_module, "_download_tools", lambda folder: pytest.fail("too late"))
    assert build_module.main(["--into", str(tmp_path / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    monkeypatch.setattr(build_module.shutil, "which", lambda name: None)
    if os.name != "nt":
        assert build_module.main([]) == 1
        assert "no C++ compiler" in capsys.readouterr().err
    monkeypatch.setattr(build_module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert build_module.main([]) == 1
    assert "no C headers" in capsys.readouterr().err
    monkeypatch.setattr(build_module.importlib.util, "find_spec", lambda name: None)
    assert build_module.main([]) == 1
    assert "no torch" in capsys.readouterr().err


def _distribution(site: Path, name: str) -> Path:
    """An installed package with something that must not be opened, named as our module."""
    minor = "".join(torch.__version__.split(".")[:2])
    file = site / name / f"_lacuna_t{minor}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    file.parent.mkdir(parents=True)
    (file.parent / "__init__.py").touch()
    file.write_bytes(b"not a module")
    return file


def test_an_installation_under_the_old_name_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`lacuna` on the package index is another project's."""
    monkeypatch.setattr(loader, "HERE", tmp_path / "pack")
    monkeypatch.syspath_prepend(tmp_path / "site")
    _distribution(tmp_path / "site", "lacuna")
    assert loader._folders() == [loader.HERE]
    assert "no build at all" in loader._load.__wrapped__()
    ours = _distribution(tmp_path / "site", "lacuna_erasure")
    importlib.invalidate_caches()
    assert loader._folders() == [loader.HERE, ours.parent]
    assert not {"lacuna", "lacuna_erasure"} & sys.modules.keys()


def test_the_module_of_another_copy_is_not_taken_for_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = _distribution(tmp_path, "pack")
    monkeypatch.setattr(loader, "HERE", file.parent)
    name = file.name.split(".")[0]
    older = type(sys)(name)
    older.__file__ = str(tmp_path / "older" / file.name)
    monkeypatch.setitem(sys.modules, name, older)
    sentence = loader._load.__wrapped__()
    assert older.__file__ in sentence and "remove one of the two" in sentence
    older.__file__ = str(file)
    assert loader._load.__wrapped__() is older
