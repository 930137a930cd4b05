# SPDX-License-Identifier: Apache-2.0
"""The command line, with a stand-in for the native module; the last tests run the real one."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from python_shim import cli, loader
from python_shim.errors import HostError

REPOSITORY = Path(__file__).resolve().parents[2]
NODES = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "m.safetensors"}},
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["1", 0],
            "seed": 1,
            "cfg": 4.0,
            "sampler_name": "euler",
            "tiled": False,
        },
        "_meta": {"title": "Before"},
    },
    "4": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "After"}},
}


@pytest.fixture
def workflow():
    return json.loads(json.dumps(NODES))


@pytest.fixture
def workflow_file(tmp_path, workflow):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(workflow))
    return path


@pytest.fixture
def native(monkeypatch):
    """Records what the runner is given; `act` is what it then does."""
    fake = SimpleNamespace(__version__="9.8.7", calls=[], act=lambda host, progress: {})

    class NodePack:
        def run_workflow(self, text, host, progress):
            fake.calls.append(json.loads(text))
            return fake.act(host, progress)

    fake.NodePack = NodePack
    monkeypatch.setattr(loader, "load", lambda: fake)
    return fake


@pytest.fixture
def run(workflow_file, tmp_path, native, capsys):
    pytest.importorskip("diffusers", reason="needs diffusers")
    checkpoint = tmp_path / "m.safetensors"
    checkpoint.write_bytes(b"")

    def run(*arguments: str, file: Path = workflow_file):
        folders = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
        code = cli.main(["run", str(file), *folders, *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


# --------------------------------------------------------------------------- workflow files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"nodes": [], "links": [], "version": 0.4}',
            r"save format; export .* File > Export \(API\)",
        ),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a workflow in ComfyUI's API format"),
        ("{}", "not a workflow in ComfyUI's API format"),
        ('{"1": {"inputs": {}}}', "not a workflow in ComfyUI's API format"),
        ('"text"', "not a workflow in ComfyUI's API format"),
    ],
)
def test_files_that_are_no_workflow(tmp_path, text, message):
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(HostError, match=message):
        cli.read_workflow(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(HostError, match=r"no workflow file .*nothing\.json"):
        cli.read_workflow(tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HostError, match="not a text file"):
        cli.read_workflow(tmp_path / "binary.json")


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("3.seed=18446744073709551615", 18446744073709551615),
        ("3.seed=-4", -4),
        ("3.cfg=7", 7.0),
        ("Before.cfg=2.5", 2.5),
        ("3.sampler_name=dpmpp_2m", "dpmpp_2m"),
        ("3.sampler_name=a=b\\nc", "a=b\nc"),
        ("3.tiled=True", True),
        ("CheckpointLoaderSimple.ckpt_name=7", "7"),
    ],
)
def test_settings(workflow, setting, value):
    cli.apply_setting(workflow, setting)
    node = "1" if setting.startswith("Check") else "3"
    key = setting.split("=")[0].split(".")[1]
    assert workflow[node]["inputs"][key] == value
    assert type(workflow[node]["inputs"][key]) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("3.seed", "NODE.INPUT=VALUE"),
        ("seed=3", "NODE.INPUT=VALUE"),
        ("=3", "NODE.INPUT=VALUE"),
        ("9.seed=3", r'No node is called "9".*1 \(CheckpointLoaderSimple\)'),
        ("KSampler.seed=3", r'Several nodes are called "KSampler"'),
        ("3.sed=3", r'no input "sed".*model, seed, cfg'),
        ("3.model=x", "linked to another node"),
        ("3.seed=many", 'needs a number, not "many"'),
        ("3.tiled=1", "needs true or false"),
    ],
)
def test_settings_that_are_refused(workflow, setting, message):
    with pytest.raises(HostError, match=message):
        cli.apply_setting(workflow, setting)
    assert workflow == NODES


# --------------------------------------------------------------------------- running


def test_a_run_prints_what_was_written(run, native, tmp_path):
    native.act = lambda host, progress: {
        "8": {"images": ["/out/a.png", "/out/b.png"], "text": ["residual 0.1"], "files": []},
        "9": {"files": ["/out/lora.safetensors"], "text": ["residual 0.1"]},
    }
    code, out, err = run("--set", "3.seed=5")
    assert code == 0 and err == ""
    assert out.splitlines() == ["residual 0.1", "/out/a.png", "/out/b.png", "/out/lora.safetensors"]
    assert native.calls[0]["3"]["inputs"]["seed"] == 5
    assert (tmp_path / "out").is_dir()


def test_the_host_gets_the_folders(run, native, tmp_path):
    seen = {}
    native.act = lambda host, progress: seen.update(vars(host)) or {}
    assert run("--lora-dir", str(tmp_path))[0] == 0
    assert seen["output_directory"] == str(tmp_path / "out")
    assert seen["_lora_directory"] == tmp_path


def test_errors_are_one_sentence(run, native, tmp_path):
    lacuna_error = type("LacunaError", (ValueError,), {})

    def fail(error):
        def act(host, progress):
            raise error

        native.act = act
        code, out, err = run()
        assert code == 1 and out == "" and "Traceback" not in err
        return err.strip()

    assert fail(lacuna_error("Node 3: too many steps.")) == "Node 3: too many steps."
    assert fail(HostError("No.")) == "No."
    assert fail(FileNotFoundError(2, "No such file", "x.png")) == "x.png: No such file."
    assert fail(RuntimeError("odd")).startswith(
        "Unexpected RuntimeError: odd (run again with --debug"
    )
    code, _, err = run(file=tmp_path / "none.json")
    assert code == 1 and err.startswith("There is no workflow file")


def test_debug_shows_the_traceback(run, native):
    def act(host, progress):
        raise HostError("No.")

    native.act = act
    with pytest.raises(HostError):
        run("--debug")


def test_ctrl_c(run, native):
    def act(host, progress):
        raise KeyboardInterrupt

    native.act = act
    code, out, err = run()
    assert (code, out, err) == (130, "", "Interrupted.\n")


def test_missing_cuda_and_checkpoint(run, native, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in run("--device", "cuda")[2]
    code, _, err = run("--checkpoint", str(tmp_path / "none.safetensors"))
    assert code == 1 and "There is no checkpoint" in err
    assert not native.calls


def test_native_module_missing(run, monkeypatch):
    def load():
        raise loader.NativeUnavailable("Build it.")

    monkeypatch.setattr(loader, "load", load)
    assert run()[::2] == (1, "Build it.\n")


def test_version(native, capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("lacuna 9.8.7 (torch 2")


# --------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_stays_on_one_line():
    stream = Terminal()
    progress = cli.ProgressLine(stream)
    for done in range(101):
        progress.report(done, 100)
    progress.clear()
    text = stream.getvalue()
    assert "\n" not in text and "\r100/100 (100 %)" in text
    assert text.count("\r") < 20, "it is throttled"
    assert text.endswith("\r")


def test_the_line_also_says_what_goes_on(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = cli.ProgressLine(stream)
    progress.status("church: step 1 of 50")
    assert stream.getvalue() == "\rchurch: step 1 of 50"
    progress.status("church: step 2 of 50")
    assert "step 2" not in stream.getvalue(), "it is throttled"
    progress.status("church: " + 100 * "x")
    progress.report(100, 100)
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("100/100 (100 %)  church: xxx") and len(last) == 39
    progress.preview(torch.rand(8, 8, 3))
    progress.clear()
    assert stream.getvalue().endswith("\r" + 39 * " " + "\r")


def test_progress_in_a_log_file_is_rare():
    stream = io.StringIO()
    progress = cli.ProgressLine(stream)
    for done in range(101):
        progress.report(done, 100)
    progress.clear()
    assert stream.getvalue() == ""
    progress._shown_at -= 11
    progress.report(7, 0)
    assert stream.getvalue() == "7/0 (700 %)\n"


# --------------------------------------------------------------------------- the real thing


def native_available() -> bool:
    try:
        loader.load()
    except loader.NativeUnavailable:
        return False
    return True


real = pytest.mark.skipif(not native_available(), reason="the native module is not built")


def real_workflow(steps: int, sampler: str = "euler") -> dict:
    def node(class_type: str, **inputs: object) -> dict:
        return {"class_type": class_type, "inputs": inputs}

    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="x"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a photo of a cat"),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node(
            "KSampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["4", 0],
            seed=7, steps=steps, cfg=4.0, sampler_name=sampler, scheduler="normal", denoise=1.0,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="cat"),
    }  # fmt: skip


@pytest.fixture
def command(demo_checkpoint, tmp_path):
    """Arguments that run a workflow on the demo model."""

    def command(workflow: dict) -> list[str]:
        file = tmp_path / "real.json"
        file.write_text(json.dumps(workflow))
        folders = ["--checkpoint", str(demo_checkpoint), "--output", str(tmp_path / "out")]
        return ["run", str(file), *folders]

    return command


@real
def test_a_real_run_writes_the_picture(demo, command, capsys):
    from PIL import Image

    assert cli.main([*command(real_workflow(6)), "--set", "5.steps=4"]) == 0
    output = capsys.readouterr()
    with Image.open(output.out.strip()) as image:
        written = torch.tensor(bytearray(image.convert("RGB").tobytes()))
    model, clip, decoder = demo
    latent = model.sample(
        7, 4, 4.0, "euler", "normal", clip.encode(["a photo of a cat"]), clip.encode([""]),
        torch.zeros(1, 4, 8, 8), 1.0, lambda done, total: None,
    )  # fmt: skip
    expected = decoder.decode(latent)[0].flatten() * 255
    assert (written.float() - expected).abs().max() < 1.0


@real
def test_a_real_error_is_one_sentence(command, capsys):
    assert cli.main(command(real_workflow(4, sampler="uni_pc"))) == 1
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    assert "uni_pc" in output.err and "dpmpp_2m" in output.err


@pytest.fixture
def evaluation(demo_checkpoint, tmp_path, monkeypatch):
    """Arguments of a very short evaluation of the demo model against itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = tmp_path / "words.txt"
    words.write_text("dog -> star | puppy\n", encoding="utf-8")
    small = {"prompts": 1, "images": 1, "steps": 1, "width": 64, "height": 64, "neighbours": "wolf"}
    widgets = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    paths = ["--checkpoint", str(demo_checkpoint), "--edited", str(demo_checkpoint)]
    files = ["--concepts", str(words), "--output", str(tmp_path / "out")]
    return ["evaluate", *paths, *files, *widgets]


@real
def test_an_evaluation_writes_one_page_of_html(evaluation, tmp_path, capsys):
    assert cli.main(evaluation) == 0
    assert "Nothing was erased" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["counts"]["erased"][1] == 1
    assert [pair["latent_change"] for pair in report["pairs"]] == [0.0] * len(report["pairs"])
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Nothing was erased" in page and "data:image/png;base64,iVBOR" in page
    assert not list((tmp_path / "out").glob("*.part"))


DEMO_DETECTOR = f"{REPOSITORY / 'tools' / 'demo_model' / 'evaluator.py'}:DemoDetector"


@real
def test_an_evaluation_with_a_detector_and_a_prompt_file(evaluation, tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,prompt\n1,a sleeping puppy\n2,woof\n", encoding="utf-8")
    assert cli.main([*evaluation, "--detector", DEMO_DETECTOR, "--prompt-file", str(prompts)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["protocol"]["detector"]["name"] == "Lacuna demo evaluator"
    assert report["counts"]["prompt file"][1] == 2
    erased = [pair for pair in report["pairs"] if pair["list"] == "erased"]
    assert erased and all(0 <= pair["score_after"] <= 1 for pair in erased)
    harder = json.loads((tmp_path / "out" / "harder_concepts.json").read_text("utf-8"))
    assert harder["concepts"][0]["target"] == "dog"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (["--concepts", "nowhere.txt"], "no file nowhere.txt"),
        (["--width", "100"], "multiples of"),
        (["--strength", "2"], "--strength scales the LoRA"),
        (["--strength", "1"], "--strength scales the LoRA"),
        (["--detector", "nowhere.py:Judge"], "no detector file nowhere.py"),
        (["--detector", "judge"], "write FILE.py:name"),
        (["--detector", "json:nothing"], "has nothing called nothing"),
        (["--detector", "no_such_module:x"], "cannot be loaded"),
        (["--prompt-file", "nowhere.csv"], "no prompt file"),
    ],
)
@real
def test_a_bad_evaluation_is_one_sentence(evaluation, tmp_path, capsys, setting, sentence):
    assert cli.main([*evaluation, *setting]) == 1
    output = capsys.readouterr()
    assert output.out == "" and sentence in output.err and len(output.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def _read_until_closed(terminal: int, seconds: float) -> bytes:
    """A process that writes to a terminal nobody reads from is stuck once the buffer is full."""
    read, deadline = b"", time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                read += os.read(terminal, 1000)
    except OSError:  # the other end is gone
        pass
    return read


@real
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and terminals")
def test_ctrl_c_stops_a_real_run_within_two_seconds(command):
    import pty

    terminal, stderr = pty.openpty()  # progress appears at once on a terminal
    process = subprocess.Popen(
        [sys.executable, "-m", "python_shim", *command(real_workflow(10_000))],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=stderr,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell's background job has Ctrl-C switched off, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(stderr)
    seen = b""
    try:
        while b"/10000" not in seen:
            seen += os.read(terminal, 1000)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        rest = _read_until_closed(terminal, seconds=30)
        process.wait(timeout=30)
        assert time.monotonic() - started < 2.0
        assert process.returncode == 130
        assert b"Interrupted." in rest
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
