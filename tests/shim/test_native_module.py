# SPDX-License-Identifier: Apache-2.0
"""The binding between Python hosts and the native core."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_host import FakeDenoiser, FakeImageDecoder, FakeProgress, FakeTextEncoder

from python_shim import loader

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def native():
    return loader.load()


@pytest.fixture
def pack(native):
    return native.NodePack()


def concepts(pack, text: str = "cat -> fog", **widgets: Any):
    values = {"concepts": text, "general_prior": "none", "templates": 4, **widgets}
    return pack.run("LacunaConceptSet", values)[0]


def refine(pack, model=None, clip=None, progress=None, **widgets: Any) -> list:
    inputs = {
        "model": model or FakeDenoiser(),
        "clip": clip or FakeTextEncoder(),
        "concepts": concepts(pack),
        **widgets,
    }
    return pack.run("LacunaAttentionRefine", inputs, progress)


def test_versions_agree(native) -> None:
    pyproject = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    assert native.__version__ == re.search(r'^version = "(.*)"', pyproject, re.M)[1]
    assert native.torch_version == torch.__version__.split("+")[0]


def test_the_committed_schemas_are_those_of_the_binary(pack) -> None:
    committed = (REPOSITORY / "python_shim" / "node_schemas.json").read_text("utf-8")
    assert committed == pack.schemas(), "run `make schemas`"


def test_a_replaced_file_is_noticed(native, tmp_path: Path) -> None:
    pack = native.NodePack(str(tmp_path))

    def state(constants: dict) -> str:
        return pack.outside_state("LacunaLoadBundle", constants)

    assert state({"file": "a.safetensors"}) == "absent"
    (tmp_path / "a.safetensors").write_bytes(b"1")
    first = state({"file": "a.safetensors"})
    (tmp_path / "a.safetensors").write_bytes(b"22")
    assert state({"file": "a.safetensors"}) not in ("absent", first)
    assert state({}) == ""  # a link: not known yet
    with pytest.raises(native.LacunaError, match="leaves the output folder"):
        state({"file": "../a.safetensors"})


def test_values_cross_both_ways(pack) -> None:
    model = FakeDenoiser()
    before = {name: weight.clone() for name, weight in model.weights.items()}
    erased, refinement, lora, report = refine(pack, model)
    assert type(refinement).__name__ == "Refinement"
    assert "cat -> fog" in report
    assert all(torch.equal(model.weights[name], before[name]) for name in before)
    for name, weight in before.items():
        change = erased.weights[name] - weight
        prefix = "lora_unet_" + name.replace(".", "_")
        product = (
            lora[f"{prefix}.lora_up.weight"].float() @ lora[f"{prefix}.lora_down.weight"].float()
        )
        # Rank 64 exceeds the width here, so only half precision separates the two.
        assert torch.allclose(product, change, atol=5e-3 * change.abs().max())


def test_a_linked_object_of_a_wrong_kind_is_named(pack, native) -> None:
    with pytest.raises(native.LacunaError, match="concepts"):
        refine(pack, concepts="text")
    with pytest.raises(native.LacunaError, match="unknown input 'surprise'"):
        pack.run("LacunaConceptSet", {"surprise": 1})
    with pytest.raises(native.LacunaError, match="unknown node type"):
        pack.run("Nope", {})
    assert issubclass(native.LacunaError, ValueError)


class Interrupt(BaseException):
    """Newer hosts derive their interrupt from BaseException."""


class Stop:
    """Progress of a host whose user presses Cancel at the n-th call."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.left = after
        self.error = error

    def report(self, done: int, total: int) -> None:
        self.check()

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize(
    "error", [Interrupt("stop"), torch.OutOfMemoryError("full"), KeyError("x")]
)
def test_exceptions_of_the_host_come_out_as_the_same_object(pack, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    clip = FakeTextEncoder()
    clip.on_encode = fail
    models = [FakeDenoiser(), FakeDenoiser()]
    models[0].effective_weight = fail
    models[1].with_weight_deltas = fail
    attempts: list[Callable[[], object]] = [lambda: refine(pack, clip=clip)]
    attempts += [lambda model=model: refine(pack, model) for model in models]
    attempts += [lambda n=n: refine(pack, progress=Stop(n, error)) for n in (1, 2, 5)]
    for attempt in attempts:
        with pytest.raises(type(error)) as caught:
            attempt()
        assert caught.value is error


OUT_OF_MEMORY = """
import sys
import torch

sys.path[:0] = sys.argv[1:3]
torch.ops.load_library(sys.argv[3])
from test_native_module import refine
from python_shim import loader

try:
    refine(loader.load().NodePack())
except torch.OutOfMemoryError as error:
    print("out of memory:", error)
"""


def test_out_of_memory_below_the_module_is_torchs_own_exception() -> None:
    """Only with the pybind11 inside torch; hosts free memory or retry when they see this type."""
    probe = next((REPOSITORY / "build" / "tests" / "shim").glob("*lacuna_oom_probe.*"), None)
    if probe is None:
        pytest.skip("needs the test libraries: make build")
    folders = [REPOSITORY, REPOSITORY / "tests" / "shim"]
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, *folders, probe],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("out of memory: device memory is full (on purpose)"), done.stderr


def test_a_host_that_answers_nonsense_is_told_so(pack, native) -> None:
    clip = FakeTextEncoder()
    clip.encode = lambda prompts: [1, 2, 3]
    with pytest.raises(native.LacunaError, match="'encode'"):
        refine(pack, clip=clip)


def test_inference_mode_of_the_host_is_left_as_it_was(pack) -> None:
    with torch.inference_mode():
        outside = refine(pack)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    inside = refine(pack)
    for name, weight in inside[0].weights.items():
        assert torch.allclose(weight, outside[0].weights[name])
        assert not weight.requires_grad


def test_other_threads_run_while_the_core_computes(pack) -> None:
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    longest = 0.0

    class Watch:
        """The time between two calls is spent in C++."""

        last = time.perf_counter()
        seen = 0

        def report(self, done: int, total: int) -> None:
            self.check()

        def check(self) -> None:
            nonlocal longest
            longest = max(longest, time.perf_counter() - self.last)
            Watch.last, Watch.seen = time.perf_counter(), ticks

    refine(pack, FakeDenoiser(1024), FakeTextEncoder(1024), Watch())
    final = ticks - Watch.seen
    spent = time.perf_counter() - Watch.last
    done.set()
    thread.join()
    assert max(longest, spent) > 0.05
    assert ticks > 20 or final > 5


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_module_carries_no_torch_and_no_cuda(native) -> None:
    dynamic = subprocess.run(
        ["readelf", "-d", native.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    # before torch: some CUDA builds of torch export a broken std::filesystem
    assert needed[0].startswith("libstdc++")
    assert not [name for name in needed if "cuda" in name]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def sources(*folders: str) -> list[Path]:
    return [
        file
        for folder in folders
        for pattern in ("*.h", "*.cpp", "*.py")
        for file in (REPOSITORY / folder).rglob(pattern)
        if "node_modules" not in file.parts
    ]


def test_layers_include_only_what_lies_below() -> None:
    for file in sources("native", "nodes"):
        text = file.read_text("utf-8")
        assert "pybind" not in text and "Python.h" not in text, file
        if "native" in file.parts:
            assert '#include "nodes/' not in text, file
    for file in sources("native", "nodes", "plugin", "benchmarks", "tests"):
        if file.suffix != ".py":
            assert not re.search(r"<torch/(torch|extension|all)\.h>", file.read_text("utf-8")), file


def test_only_one_module_imports_comfyui() -> None:
    users = {
        file.name
        for file in sources("python_shim")
        if re.search(
            r"^\s*(import|from) (comfy|folder_paths|nodes)\b", file.read_text("utf-8"), re.M
        )
    }
    assert users <= {"comfyui_host.py"}


def evaluate(pack, erased: FakeDenoiser, **widgets: Any) -> list:
    inputs = {
        "base_model": FakeDenoiser(),
        "erased_model": erased,
        "clip": FakeTextEncoder(),
        "vae": FakeImageDecoder(),
        "concepts": concepts(pack),
    }
    small = {"prompts": 1, "images": 1, "steps": 1, "width": 64, "height": 64, "neighbours": "dog"}
    return pack.run("LacunaEvaluateErasure", inputs | small | widgets, FakeProgress())


def test_an_evaluation_reaches_python_as_picture_text_and_numbers(native, pack) -> None:
    edit = [(name, 0.5 * weight, None) for name, weight in FakeDenoiser().weights.items()]
    erased = FakeDenoiser().with_weight_deltas(edit, 1.0)
    sheet, report, *scores, verdict = evaluate(pack, erased)
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3
    assert json.loads(report)["verdict"] == verdict.split("\n")
    assert len(scores) == 5 and all(0 <= score <= 1 for score in scores)
    assert "<h1>Evaluate Erasure</h1>" in native.evaluation_html(report, [b"png"])
    assert evaluate(pack, erased)[1] == report
    assert "Nothing was erased" in evaluate(pack, FakeDenoiser())[-1]


def test_every_source_names_its_licence() -> None:
    folders = ("native", "nodes", "plugin", "python_shim", "tests", "tools", "benchmarks")
    for file in sources(*folders):
        head = file.read_text("utf-8")[:200]
        assert "SPDX-License-Identifier: Apache-2.0" in head, file


def test_schemas_are_plain_json(pack) -> None:
    ids = [node["id"] for node in json.loads(pack.schemas())]
    assert ids == [
        "LacunaConceptSet",
        "LacunaAttentionRefine",
        "LacunaLoRAErase",
        "LacunaLoRAFuse",
        "LacunaEvaluateErasure",
        "LacunaSaveLoRA",
        "LacunaSaveBundle",
        "LacunaLoadBundle",
    ]
