# SPDX-License-Identifier: Apache-2.0
"""One wheel out of several that differ only in the torch minor their native module is built for.

A wheel's name cannot say which torch it fits, so a user gets all modules and the loader picks one.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

MODULE = re.compile(r"lacuna_erasure/_lacuna_t(\d)(\d+)\.(?:cpython-|cp)\w[\w.-]*\.(?:so|pyd)")


class WheelsDiffer(ValueError):
    """The wheels are not builds of the same sources for the same Python and platform."""


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _record(files: dict[str, bytes], record: str) -> bytes:
    """RECORD of the wheel format: name, digest and size of every other file."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        writer.writerow((name, f"sha256={digest}", len(data)))
    writer.writerow((record, "", ""))
    return table.getvalue().encode()


def torch_minors(wheel: Path) -> list[str]:
    """Minors a wheel has modules for, e.g. ["2.13", "2.14"]."""
    with zipfile.ZipFile(wheel) as archive:
        found = [match for name in archive.namelist() if (match := MODULE.fullmatch(name))]
    return [f"{a}.{b}" for a, b in sorted((int(match[1]), int(match[2])) for match in found)]


def merge(wheels: Sequence[Path], folder: Path) -> Path:
    """Write the wheel that holds the modules of all `wheels` to `folder`, under their common name.

    Raises WheelsDiffer when names or anything but the modules differ, or two have the same module.
    """
    if len({wheel.name for wheel in wheels}) != 1:
        raise WheelsDiffer(f"Wheels of one name are needed, not {[w.name for w in wheels]}.")
    merged: dict[str, bytes] = {}
    for wheel in wheels:
        files = _contents(wheel)
        record = next(name for name in files if name.endswith(".dist-info/RECORD"))
        del files[record]
        modules = {name for name in files if MODULE.fullmatch(name)}
        if len(modules) != 1:
            raise WheelsDiffer(f"{wheel} holds {len(modules)} native modules instead of one.")
        if modules & merged.keys():
            raise WheelsDiffer(f"{wheel} repeats {modules.pop()}.")
        common = {name for name in merged if not MODULE.fullmatch(name)}
        other = sorted(
            name
            for name in (files.keys() - modules) | common
            if merged and files.get(name) != merged.get(name)
        )
        if other:
            raise WheelsDiffer(f"{wheel} was built from other sources: {', '.join(other)} differ.")
        merged |= files
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / wheels[0].name
    part = target.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**merged, record: _record(merged, record)}.items():
            archive.writestr(name, data)
    os.replace(part, target)
    return target
