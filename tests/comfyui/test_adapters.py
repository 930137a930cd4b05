# SPDX-License-Identifier: Apache-2.0
"""Runs in_process/check_adapters.py with each ComfyUI: one process can import only one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from comfy_server import Checkout, host_environment, host_python
from host_fixtures import share_text_cache

FOLDER = Path(__file__).with_name("in_process")


def test_adapters_in_process(checkout: Checkout, checkpoint_file: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("transformer_reference.py")
    subprocess.run([sys.executable, script, tmp_path], check=True)
    share_text_cache(tmp_path)
    environment = host_environment(
        COMFYUI_DIR=str(checkout.folder),
        LACUNA_TEST_CHECKPOINT=str(checkpoint_file),
        LACUNA_TEST_TRANSFORMER=str(tmp_path),
        LACUNA_TEST_USER=str(tmp_path / "user"),
    )
    command = [
        host_python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", ".",
        "-o", "python_files=check_*.py", ".",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
