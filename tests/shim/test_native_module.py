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
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_host import FakeDenoiser, FakeImageDecoder, FakeProgress, FakeTextEncoder
from PIL import Image

from python_shim import loader
from python_shim.detector import SafeDetector
from python_shim.errors import HostError

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


@pytest.mark.parametrize(
    "typed",
    [
        "猫" * 600,
        "猫" * 1_000_000,
        "owl -> " + "é" * 600,
        "{“format”: 1}",
        '{"format": "' + "猫" * 1000 + '"}',
        '{"format": "lacuna.concepts/1", "' + "猫" * 1000 + '": 1}',
        '{"format": "lacuna.concepts/1", "concepts": [{"target": "a", "kind": "'
        + "猫" * 1000
        + '"}]}',
        "猫\n猫",
        "<lora:" + "猫" * 600 + ":1>",
        "a\0b -> " + "\x01" * 600,
    ],
)
def test_what_is_wrong_with_a_text_is_told_in_a_sentence(native, pack, typed: str) -> None:
    """No message holds half a character (that was a UnicodeDecodeError) or fills the screen."""
    for field in ("concepts", "preserve"):
        values = {"concepts": "fine", "kind": "object", "default_anchor": "", "preserve": ""}
        values |= {"general_prior": "none", "templates": 4, field: typed}
        with pytest.raises(native.LacunaError) as error:
            pack.validate("LacunaConceptSet", values)
        assert len(str(error.value)) < 1300


def test_what_is_wrong_with_a_workflow_is_told_in_a_sentence(native, tmp_path: Path) -> None:
    quotes = '{"1": {“ "../xLacunaSave"class_type": "LacunaSaveLoRA", "inputs": {}}}'
    long = '{"1": {"class_type": "' + "猫" * 100_000 + '"}}'
    host = SimpleNamespace(output_directory=str(tmp_path))
    for text in (quotes, long, '{"' + "猫" * 100_000 + '": 1}', '{"1": "' + "猫" * 100_000):
        with pytest.raises(native.LacunaError) as error:
            native.NodePack.run_workflow(text, host)
        assert len(str(error.value)) < 1300


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


def test_pictures_are_what_they_were(native, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    image = torch.randint(0, 256, (9, 13, 3)) / 255
    native.save_png(image, str(file))
    with Image.open(file) as opened:
        read = torch.from_numpy(np.asarray(opened.convert("RGB")).copy())
    assert torch.equal(read / 255, image)
    native.save_png(torch.full((2, 2, 3), 1.5), str(file))  # clamped, not wrapped
    with Image.open(file) as opened:
        assert opened.getextrema() == ((255, 255),) * 3
    with pytest.raises(native.LacunaError, match="NUL character"):
        native.save_png(torch.zeros(2, 2, 3), str(file) + "\0")
    with Image.open(file) as opened:
        assert opened.getextrema() == ((255, 255),) * 3


def test_names_of_files_are_filled_in(native, tmp_path: Path) -> None:
    pack = native.NodePack(str(tmp_path))
    values = {"lora": {"a": torch.zeros(1)}, "filename_prefix": "%KSampler.seed%_%year%_%A.b%"}
    report = pack.run("LacunaSaveLoRA", values, None, {"KSampler.seed": "5"})[0]
    assert report.endswith(f"/5_{time.localtime().tm_year}_%A.b%_00001_.safetensors")
    for prefix, problem in {"": "prefix is empty", "a\0": "NUL", "x" * 300: "too long"}.items():
        with pytest.raises(native.LacunaError, match=problem):
            pack.validate("LacunaSaveLoRA", {"filename_prefix": prefix})


def test_two_threads_run_one_node_at_once(pack) -> None:
    """Callbacks need the GIL that the other thread holds; nobody may wait for the other."""
    clip = FakeTextEncoder()
    clip.on_encode = lambda: time.sleep(0.001)
    words = ["cat -> fog", "dog -> fog\nship -> fog"]
    sets = [concepts(pack, text) for text in words]
    alone = [refine(pack, concepts=item)[2] for item in sets]
    wrong: list[str] = []

    def run(index: int) -> None:
        for _ in range(4):
            lora = refine(pack, clip=clip, concepts=sets[index])[2]
            if any(not torch.equal(lora[key], value) for key, value in alone[index].items()):
                wrong.append(words[index])

    threads = [threading.Thread(target=run, args=(i % 2,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


def test_values_cross_both_ways(pack) -> None:
    model = FakeDenoiser()
    before = {name: weight.clone() for name, weight in model.weights.items()}
    clip = FakeTextEncoder()
    erased, refinement, lora, report, same_clip = refine(pack, model, clip)
    assert same_clip is clip
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
    models[1].with_weight_maps = fail
    attempts: list[Callable[[], object]] = [lambda: refine(pack, clip=clip)]
    attempts += [lambda model=model: refine(pack, model) for model in models]
    attempts += [lambda n=n: refine(pack, progress=Stop(n, error)) for n in (1, 2, 4)]
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
from python_shim.detector import SafeDetector
from python_shim.errors import HostError

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


def test_no_picture_is_decoded() -> None:
    """Old copies of stb_image crash on some files; nothing of ours reads a picture in C++."""
    assert not (REPOSITORY / "third_party" / "stb" / "stb_image.h").exists()
    for file in sources("native", "nodes", "plugin"):
        assert "<stb_image.h>" not in file.read_text("utf-8"), file
    # Nor is a copy of the system's looked for.
    for cmake in (REPOSITORY / "CMakeLists.txt", REPOSITORY / "native" / "CMakeLists.txt"):
        assert not re.search(r"find_\w+\([^)]*stb", cmake.read_text("utf-8"), re.I), cmake


def test_only_the_comfyui_modules_import_comfyui() -> None:
    users = {
        file.name
        for file in sources("python_shim")
        if re.search(
            r"^\s*(import|from) (comfy|folder_paths|nodes)\b", file.read_text("utf-8"), re.M
        )
    }
    subjects = ("edits", "host", "model", "text", "weights")
    assert users <= {f"comfyui_{subject}.py" for subject in subjects}


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
    sheet, report, *scores, verdict, harder = evaluate(pack, erased)
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3
    assert json.loads(report)["verdict"] == verdict.split("\n")
    assert len(scores) == 5 and all(0 <= score <= 1 for score in scores)
    assert "<h1>Evaluate Erasure</h1>" in native.evaluation_html(report, [b"png"])
    assert evaluate(pack, erased)[1] == report
    assert json.loads(harder)["format"] == "lacuna.concepts/1"
    assert "Nothing was erased" in evaluate(pack, FakeDenoiser())[-2]


class Cancelled(BaseException):
    pass


def judged(pack, detector: object, **widgets: Any) -> dict:
    return json.loads(evaluate(pack, FakeDenoiser(), detector=SafeDetector(detector), **widgets)[1])


def test_a_python_detector_judges_the_pictures(pack) -> None:
    asked = []

    class Judge:
        name = "judge"
        version = 3

        def score(self, images: torch.Tensor, names: list[str]) -> list[list[float | None]]:
            asked.extend(names)
            assert images.shape == (2, 8, 8, 3) and images.dtype == torch.float32
            assert images.min() >= 0 and images.max() <= 1
            return [[None if name == "dog" else 0.7 for name in names]] * len(images)

    report = judged(pack, Judge())
    assert report["protocol"]["detector"] == {"name": "judge", "version": "3", "threshold": 0.5}
    erased, neighbour = (
        next(pair for pair in report["pairs"] if pair["list"] == name)
        for name in ("erased", "neighbours")
    )
    assert erased["score_after"] == pytest.approx(0.7) and erased["seen_after"]
    assert neighbour["score_after"] is None and "dog" in asked
    assert not judged(pack, Judge(), detector_threshold=0.8)["pairs"][0]["seen_after"]


@pytest.mark.parametrize(
    ("detector", "problem"),
    [
        (lambda images, names: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda images, names: [[0.5]], "scores of shape [1, 1], not [2, 1]"),
        (lambda images, names: "yes", "TypeError"),
        (lambda images, names: torch.full((2, 1), 7.0), "does not lie between 0 and 1"),
    ],
)
def test_what_a_detector_does_wrong_is_reported_for_each_picture(pack, detector, problem) -> None:
    report = judged(pack, detector)
    errors = [pair.get("detector_error", "") for pair in report["pairs"] if pair["phrase"]]
    assert errors and all(problem in error for error in errors)
    assert report["lists"][0]["detector_errors"] == 1


def test_cancelling_inside_a_detector_is_no_error_of_its(pack) -> None:
    def cancel(images: torch.Tensor, names: list[str]) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        judged(pack, cancel)
    with pytest.raises(KeyError):  # the host says which exceptions are its own
        evaluate(pack, FakeDenoiser(), detector=SafeDetector(lambda i, n: {}[0], (KeyError,)))


@pytest.mark.parametrize("nothing", [7, dict, object()])
def test_what_is_no_detector_is_refused(nothing: object) -> None:
    with pytest.raises(HostError, match="needs a method score"):
        SafeDetector(nothing)


def test_a_prompt_file_is_read_from_the_input_folder(native, tmp_path: Path) -> None:
    pack = native.NodePack("output", str(tmp_path))
    file = tmp_path / "set.txt"
    file.write_text("a feline\n# comment\nwhiskers\n", encoding="utf-8")
    report = json.loads(evaluate(pack, FakeDenoiser(), prompt_file="set.txt")[1])
    assert report["counts"]["prompt file"][1] == 2
    state = pack.outside_state("LacunaEvaluateErasure", {"prompt_file": "set.txt"})
    file.write_bytes(b"caf\xe9\n")
    assert pack.outside_state("LacunaEvaluateErasure", {"prompt_file": "set.txt"}) != state
    for name, problem in {
        "set.txt": "line 1, is not in UTF-8",
        "none.txt": "there is no prompt file",
        "../x.txt": "leaves the input folder",
        "set.doc": "a .txt or a .csv",
    }.items():
        with pytest.raises(native.LacunaError, match=problem):
            pack.validate("LacunaEvaluateErasure", {"prompt_file": name})


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
