# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI on this machine: find it, start it on a fresh folder, talk to it over HTTP."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).with_name("stubs")
PROBE_PACK = Path(__file__).with_name("probe_pack")
START_SECONDS = 120
STOP_SECONDS = 10

Graph = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Checkout:
    folder: Path
    version: str

    @property
    def name(self) -> str:
        return f"comfyui-{self.version}"


class NoCheckout(Exception):
    """COMFYUI_DIR names a folder that is no ComfyUI."""


def _checkout(folder: Path) -> Checkout | None:
    file = folder / "comfyui_version.py"
    if not file.is_file() or not (folder / "main.py").is_file():
        return None
    match = re.search(r'__version__ = "([^"]+)"', file.read_text("utf-8"))
    return Checkout(folder, match[1]) if match else None


def find_checkouts() -> list[Checkout]:
    """COMFYUI_DIR or ~/ComfyUI, and a second version where COMFYUI_DIR_NEW names one."""
    found = []
    usual = Path("~/ComfyUI").expanduser()
    for variable, default in (("COMFYUI_DIR", usual), ("COMFYUI_DIR_NEW", None)):
        named = os.environ.get(variable) or default
        if named is None:
            continue
        folder = Path(named).expanduser()
        checkout = _checkout(folder.resolve())
        if checkout:
            found.append(checkout)
        elif folder != usual:  # `make` names the usual folder, too
            raise NoCheckout(f"{variable}={folder} is not a ComfyUI checkout")
    return found


def first_checkout() -> Checkout:
    """For tools, which can do nothing without one."""
    checkouts = find_checkouts()
    if not checkouts:
        raise SystemExit("there is no ComfyUI: set COMFYUI_DIR to a checkout.")
    return checkouts[0]


def host_python() -> str:
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


@functools.cache
def _needs_stubs() -> bool:
    probe = [host_python(), "-c", "import torchvision, torchaudio"]
    return subprocess.run(probe, capture_output=True, check=False).returncode != 0


def host_environment(device: str = "cpu", **extra: str) -> dict[str, str]:
    """One thread, no downloads, and no GPU unless asked for: the same numbers on every run."""
    environment = {
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **extra,
    }
    if _needs_stubs():
        paths = [str(STUBS), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Rejected(Exception):
    """ComfyUI answered HTTP 400: the prompt was not queued."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer)[:2000])
        self.answer = answer

    def sentences(self) -> list[str]:
        errors = self.answer["node_errors"].values()
        return [item["details"] for error in errors for item in error["errors"]]


@dataclasses.dataclass
class Run:
    """A finished prompt as /history tells it."""

    history: dict[str, Any]
    seconds: float

    @property
    def status(self) -> str:
        return self.history["status"]["status_str"]

    @property
    def outputs(self) -> dict[str, Any]:
        return self.history["outputs"]

    def message(self, kind: str) -> dict[str, Any] | None:
        return next((m[1] for m in self.history["status"]["messages"] if m[0] == kind), None)

    @property
    def cached(self) -> set[str]:
        return set((self.message("execution_cached") or {"nodes": []})["nodes"])

    @property
    def error(self) -> str:
        return (self.message("execution_error") or {"exception_message": ""})["exception_message"]


class Server:
    """A started host.

    `base` is its --base-directory, `pack_name` our folder below custom_nodes; `probe` adds the
    tests' own nodes, `arguments` stand behind those of every host.
    """

    def __init__(
        self,
        checkout: Checkout,
        base: Path,
        *,
        pack: Path = REPOSITORY,
        checkpoints: dict[str, Path] | None = None,
        front_end: Path | None = None,
        device: str = "cpu",
        probe: bool = True,
        pack_name: str = "lacuna",
        arguments: Sequence[str] = (),
    ) -> None:
        self.checkout = checkout
        self.base = base
        self.device = device
        self._arguments = arguments
        self.port = _free_port()
        self.log_file = base / "host.log"
        folders = ("models/checkpoints", "models/loras", "custom_nodes", "input", "output", "user")
        for folder in folders:
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / pack_name).symlink_to(pack)
        if probe:
            (base / "custom_nodes" / "lacuna_test_probe").symlink_to(PROBE_PACK)
        for name, file in (checkpoints or {}).items():
            (base / "models" / "checkpoints" / name).symlink_to(file)
        if front_end is None:
            front_end = base / "front_end"
            front_end.mkdir()
            (front_end / "index.html").write_text("<!doctype html><title>tests</title>")
        self._front_end = front_end
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def input(self) -> Path:
        return self.base / "input"

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> Server:
        command = [
            host_python(), "main.py", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.base), "--front-end-root", str(self._front_end),
            "--disable-api-nodes", "--disable-auto-launch", "--dont-print-server",
            "--preview-method", "none", "--database-url", "sqlite:///:memory:",
            *(["--cpu"] if self.device == "cpu" else []), *self._arguments,
        ]  # fmt: skip
        environment = host_environment(self.device)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.checkout.folder, env=environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at start:\n{self.log_tail()}")
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.25)
        self.stop()
        raise RuntimeError(f"ComfyUI did not answer in {START_SECONDS} s:\n{self.log_tail()}")

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_file.read_text("utf-8", "replace"))

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url(path), timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url(path), data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 400:
                raise Rejected(json.loads(error.read())) from None
            raise
        return json.loads(text) if text else None

    def queue(self, graph: Graph) -> str:
        return self.post("/prompt", {"prompt": graph})["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 300) -> Run:
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return Run(history[prompt_id], time.monotonic() - start)
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} did not end in {seconds} s:\n{self.log_tail()}")

    def run(self, graph: Graph, seconds: float = 300) -> Run:
        """Queue, wait, and insist on success."""
        run = self.wait(self.queue(graph), seconds)
        assert run.status == "success", f"{run.error}\n{self.log_tail()}"
        return run

    def is_running(self, prompt_id: str) -> bool:
        return any(item[1] == prompt_id for item in self.get("/queue")["queue_running"])


def copy_pack(target: Path) -> Path:
    """The pack as a user would have it, without any binary."""
    target.mkdir(parents=True)
    shutil.copy(REPOSITORY / "__init__.py", target)
    ignored = shutil.ignore_patterns("_lacuna_t*", "__pycache__")
    shutil.copytree(REPOSITORY / "python_shim", target / "python_shim", ignore=ignored)
    return target
