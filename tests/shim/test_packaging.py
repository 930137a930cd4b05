# SPDX-License-Identifier: Apache-2.0
"""What users get: the registry's archive, and one wheel with a module for each torch minor."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools" / "wheels"))

import build_all
import merge

TEXT = {".py", ".js", ".md", ".json", ".toml", ".txt", ""}
PICTURES = {".jpg"}
FORBIDDEN = re.compile(
    r"\b(eval|exec|__import__)\(|\b(subprocess|pickle|marshal|urllib|requests|socket|ctypes)\b"
    r"|os\.(system|popen|exec|spawn)|torch\.load\b|https?://"
)
NEEDED = ("__init__.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "requirements.txt",
          "python_shim/comfyui_nodes.py", "python_shim/node_schemas.json")  # fmt: skip


def _git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def archive() -> list[str]:
    """Names of what `comfy node publish` packs: tracked files without those of .comfyignore."""
    ignored = set(_git("--cached", "--ignored", "--exclude-from", ".comfyignore"))
    return [name for name in _git() if name not in ignored]


def test_the_archive_is_whole(archive: list[str]) -> None:
    assert set(NEEDED) <= set(archive)
    for folder in ("web/docs", "workflows", "subgraphs", "presets", "locales"):
        files = [f for f in (REPOSITORY / folder).rglob("*") if f.suffix in TEXT | PICTURES]
        tracked = {name for name in archive if name.startswith(f"{folder}/")}
        assert tracked == {f.relative_to(REPOSITORY).as_posix() for f in files if f.is_file()}
    size = sum((REPOSITORY / name).stat().st_size for name in archive)
    assert size < 5_000_000


def test_the_archive_holds_no_binaries_and_no_development(archive: list[str]) -> None:
    odd = {name for name in archive if Path(name).suffix not in TEXT | PICTURES}
    assert odd <= {".comfyignore"}
    developed = re.compile(r"(tests|tools|native|nodes|plugin|benchmarks|third_party|\.ci)/")
    assert not [name for name in archive if developed.match(name)]
    for name in archive:
        if Path(name).suffix in TEXT:
            (REPOSITORY / name).read_text("utf-8")  # text indeed


def test_the_archive_holds_nothing_that_the_scanner_refuses(archive: list[str]) -> None:
    scripts = [name for name in archive if name.endswith((".py", ".js", ".mjs", ".sh"))]
    assert all(name.endswith(".py") or name == "web/saved_graphs.js" for name in scripts)
    found = {
        f"{name}:{number}: {line.strip()}"
        for name in scripts
        for number, line in enumerate((REPOSITORY / name).read_text("utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    }
    assert not found


def test_modules_of_the_archive_import_only_what_is_in_it(archive: list[str]) -> None:
    present = {Path(name).stem for name in archive if re.fullmatch(r"python_shim/\w+\.py", name)}
    for name in present:
        tree = ast.parse((REPOSITORY / "python_shim" / f"{name}.py").read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                wanted = [node.module] if node.module else [item.name for item in node.names]
                assert set(wanted) <= present, (name, wanted)


def test_no_dependencies_are_asked_for(archive: list[str]) -> None:
    lines = (REPOSITORY / "requirements.txt").read_text("utf-8").splitlines()
    assert all(line.startswith("#") for line in lines if line.strip())


def _what_pip_would_install(*arguments: str) -> list[str]:
    """Names of the packages that `pip install` would add here; to fetch anything is an error."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index",
               "--report", "-", *arguments]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]]


def test_installing_changes_no_other_package() -> None:
    """`pip freeze` of a ComfyUI is as before: the registry's way adds nothing, pip only ours."""
    assert _what_pip_would_install("-r", "requirements.txt") == []
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("pip needs scikit-build-core to tell what the package asks for")
    assert _what_pip_would_install("--no-build-isolation", ".") == ["lacuna-erasure"]


# Addresses and accounts of others, which exist. Ours go here with the first release.
ADDRESSES = re.compile(
    r"https?://(127\.0\.0\.1|localhost|creativecommons\.org/licenses/"
    r"|download\.pytorch\.org/whl/cpu|registry\.npmjs\.org/|(www\.)?example\.(com|org))"
)
ACCOUNTS = {"actions", "ilammy", "comfyanonymous"}
PUBLISHER = None


def test_no_address_is_invented() -> None:
    found = set()
    for name in _git(":!third_party", ":!LICENSE", ":!*package-lock.json"):
        try:
            text = (REPOSITORY / name).read_text("utf-8")
        except UnicodeDecodeError:
            continue
        addresses = re.findall(r"https?://[\w-]+[\w.-]*[^\s\"'`)\]]*", text)
        addresses += re.findall(r"(?<![\w./-])(?:github|gitlab|huggingface)\.com?/\w\S*", text)
        addresses += re.findall(r"\b[\w.+-]+@[\w-]+\.(?:com|org|net|io|dev)\b", text)
        found |= {(name, address) for address in addresses if not ADDRESSES.match(address)}
        if name.startswith(".github/"):
            actions = re.findall(r"(?:uses|repository): *([\w.-]+)/", text)
            found |= {(name, account) for account in actions if account not in ACCOUNTS}
    assert not found


@pytest.fixture(scope="module")
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


def test_a_package_index_accepts_the_metadata(
    pyproject: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from validate_pyproject.api import Validator

    monkeypatch.setenv("VALIDATE_PYPROJECT_NO_NETWORK", "1")  # names come with trove-classifiers
    Validator()(json.loads(json.dumps(pyproject)))
    broken = json.loads(json.dumps(pyproject))
    broken["project"]["classifiers"].append("Environment :: GPU :: AMD ROCm")
    with pytest.raises(ValueError, match="classifiers"):
        Validator()(broken)


def test_the_registry_finds_what_it_reads(pyproject: dict) -> None:
    """comfy_config/config_parser.py of ComfyUI: a list with one unknown system counts as none."""
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    head = "Operating System :: "
    systems = [item.removeprefix(head) for item in project["classifiers"] if head in item]
    assert systems == ["MacOS", "Microsoft :: Windows", "POSIX :: Linux"]
    # None of these: the pack is offered for every accelerator.
    assert not [item for item in project["classifiers"] if item.startswith("Environment :: GPU")]
    assert (REPOSITORY / project["license"]["file"]).is_file()
    assert comfy["DisplayName"] == "Lacuna" and comfy["requires-comfyui"].startswith(">=")
    assert comfy.get("PublisherId") == PUBLISHER


def test_the_package_has_a_name_of_its_own(pyproject: dict) -> None:
    """`lacuna` is another project's, on the package index and as an import; the command stays."""
    assert pyproject["project"]["name"] == "lacuna-erasure"
    assert pyproject["project"]["scripts"] == {"lacuna": "lacuna_erasure.cli:main"}
    cmake = (REPOSITORY / "plugin" / "CMakeLists.txt").read_text("utf-8")
    assert set(re.findall(r"DESTINATION (\w+)", cmake)) == {"lacuna_erasure"}
    wrong = re.compile(
        r"pip (?:un)?install (?:-\S+ )*[\"']?lacuna(?!-erasure)\b|python3? -m lacuna(?!_erasure)\b"
    )
    for name in _git("*.py", "*.md", "*.json", "*.toml", "*.yml", "*.cpp", "*.h", "Makefile"):
        if name not in ("CHANGELOG.md", "tests/shim/test_packaging.py"):
            assert not wrong.search((REPOSITORY / name).read_text("utf-8")), name


def test_the_newest_release_of_each_minor_is_chosen() -> None:
    text = "torch (2.14.1)\nAvailable versions: 2.14.1, 2.14.0, 2.13.0, 2.7.1, 2.7.0, 2.6.0\n"
    versions = build_all.listed_versions(text)
    assert build_all.newest_of_each_minor(versions) == {
        "2.7": "2.7.1", "2.13": "2.13.0", "2.14": "2.14.1",
    }  # fmt: skip
    odd = ["2.15.0rc1", "2.13.0+cpu", "nonsense", "1.13.1"]
    assert build_all.newest_of_each_minor(odd) == {"2.13": "2.13.0"}
    assert build_all.listed_versions("ERROR: No matching distribution") == []


WHEEL = "lacuna_erasure-0.1.0-cp311-cp311-linux_x86_64.whl"


def _wheel(folder: Path, minor: str, **changes: bytes) -> Path:
    """A small wheel with a module for one torch minor, as scikit-build-core lays it out."""
    files = {
        "lacuna_erasure/__init__.py": b"VALUE = 1\n",
        f"lacuna_erasure/_lacuna_t{minor}.cpython-311-x86_64-linux-gnu.so": minor.encode(),
        "lacuna_erasure-0.1.0.dist-info/METADATA": b"Metadata-Version: 2.1\n"
        b"Name: lacuna-erasure\nVersion: 0.1.0\n",
        "lacuna_erasure-0.1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
        b"Tag: py3-none-any\n",
        "lacuna_erasure-0.1.0.dist-info/RECORD": b"",
    }
    files |= {name.replace("__", "/", 1): data for name, data in changes.items()}
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return folder / WHEEL


def test_wheels_of_several_minors_become_one_that_pip_installs(tmp_path: Path) -> None:
    wheels = [_wheel(tmp_path / minor, minor) for minor in ("27", "213", "214")]
    assert [merge.torch_minors(wheel) for wheel in wheels] == [["2.7"], ["2.13"], ["2.14"]]
    merged = merge.merge(wheels, tmp_path / "out")
    assert merged.name == WHEEL and merge.torch_minors(merged) == ["2.7", "2.13", "2.14"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == [WHEEL]  # no half file

    # pip checks names, digests and sizes of RECORD; the tag is one that any pip accepts.
    anywhere = merged.with_name("lacuna_erasure-0.1.0-py3-none-any.whl")
    merged.rename(anywhere)
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--target", str(target), str(anywhere)]  # fmt: skip
    subprocess.run(command, check=True)
    assert len(list((target / "lacuna_erasure").glob("_lacuna_t*"))) == 3


def test_wheels_of_other_sources_are_refused(tmp_path: Path) -> None:
    first = _wheel(tmp_path / "a", "213")
    with pytest.raises(merge.WheelsDiffer, match=r"other sources: lacuna_erasure/loader\.py"):
        merge.merge(
            [first, _wheel(tmp_path / "b", "214", **{"lacuna_erasure__loader.py": b"1"})], tmp_path
        )
    with pytest.raises(merge.WheelsDiffer, match=r"repeats lacuna_erasure/_lacuna_t213"):
        merge.merge([first, _wheel(tmp_path / "c", "213")], tmp_path)
    other = first.rename(tmp_path / "lacuna_erasure-0.2.0-cp311-cp311-linux_x86_64.whl")
    with pytest.raises(merge.WheelsDiffer, match="Wheels of one name"):
        merge.merge([other, _wheel(tmp_path / "d", "214")], tmp_path)


def test_a_torch_that_cannot_be_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def environment(folder: Path, version: str, index: str | None) -> None:
        folder.mkdir(exist_ok=True)
        if version == "2.15.0":
            raise subprocess.CalledProcessError(1, "pip")

    def built(folder: Path, minor: str) -> Path:
        wheel = folder / "lacuna_erasure-1-cp311-cp311-linux_x86_64.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"lacuna_erasure/_lacuna_t{minor.replace('.', '')}.cp311.so", "module")
            archive.writestr("lacuna_erasure-1.dist-info/RECORD", "")
        return wheel

    monkeypatch.setattr(build_all, "_environment", environment)
    monkeypatch.setattr(build_all, "_built", built)
    theirs = tmp_path / "torch-2.15.0"
    theirs.mkdir()
    with pytest.raises(SystemExit, match=r"lacks torch 2\.15\.0"):
        build_all.build_all({"2.14": "2.14.1", "2.15": "2.15.0"}, tmp_path, tmp_path / "out", None)
    assert theirs.is_dir() and not (tmp_path / "torch-2.14.1").exists()
    (wheel,) = (tmp_path / "out").iterdir()
    assert merge.torch_minors(wheel) == ["2.14"]
    with pytest.raises(SystemExit, match="No torch"):
        build_all.build_all({"2.15": "2.15.0"}, tmp_path, tmp_path / "none", None)
