# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files and arguments of the command line: a sentence each, never a crash."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

pytest.importorskip("diffusers", reason="needs diffusers")

from python_shim import cli, detector, lora_file, sd1_checkpoint, sd1_names
from python_shim.diffusers_host import DiffusersHost
from python_shim.errors import HostError

SEED = int(os.environ.get("LACUNA_TEST_SEED", "20261128"))
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
NAME = "lora_unet_" + LAYER.removesuffix(".weight").replace(".", "_")
UNET = sd1_names.UNET_PREFIX
TEXT = sd1_names.TEXT_PREFIXES[0]
VAE = sd1_names.VAE_PREFIX


def complaint(function: Callable[[], object]) -> str | None:
    """The sentence with which something is refused; any other exception fails the test."""
    try:
        function()
    except HostError as error:
        sentence = str(error)
        assert 10 < len(sentence) < 1600 and "\n" not in sentence, sentence
        return sentence
    return None


# --------------------------------------------------------------------------- safetensors


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str, shape: list[int], size: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


def read_lora(content: bytes, folder: Path) -> list:
    file = folder / "x.safetensors"
    file.write_bytes(content)
    return lora_file.read_lora(file, {LAYER: "a.weight"}, {"diffusion_model.a.weight": SHAPE})


SHAPE = torch.Size([320, 768])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors({"a": tensor("F32", [0, 2**63], 0)}), "damaged"),
        (safetensors({"a": tensor("F32", [2**40, 2**40, 0], 0)}), "damaged"),
        (safetensors({f"{NAME}.diff": tensor("F4", [4], 2)}, b"\0\0"), "packed .*float4"),
        (safetensors({f"{NAME}.diff": tensor("I8", [4], 4)}, bytes(4)), "packed torch.int8"),
        (safetensors({f"{NAME}.diff": tensor("C64", [1], 8)}, bytes(8)), "packed torch.complex64"),
        (safetensors(b"[" * 100_000), "damaged"),
        (safetensors(b"{" + b'"a":' * 50_000), "damaged"),
        (b"", "damaged"),
    ],
)
def test_safetensors_that_hold_no_lora(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(HostError, match=message):
        read_lora(content, tmp_path)


def test_a_lora_of_rank_0(tmp_path: Path) -> None:
    tensors = {"lora_up.weight": torch.zeros(320, 0), "lora_down.weight": torch.zeros(0, 768),
               "alpha": torch.tensor(1.0)}  # fmt: skip
    with pytest.raises(HostError, match="rank 0"):
        read_lora(save({f"{NAME}.{key}": value for key, value in tensors.items()}), tmp_path)


def test_mutated_loras_are_read_or_refused(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    good = save({
        f"{NAME}.lora_up.weight": torch.ones(320, 1, dtype=torch.float16),
        f"{NAME}.lora_down.weight": torch.ones(1, 768, dtype=torch.float16),
        f"{NAME}.alpha": torch.tensor(1.0),
    })  # fmt: skip
    assert len(read_lora(good, tmp_path)) == 1
    header = struct.unpack("<Q", good[:8])[0]
    words = [
        b"F16",
        b"F32",
        b"F4",
        b"F8_E4M3",
        b"F8_E8M0",
        b"BOOL",
        b"I64",
        b"U8",
        b"C64",
        b"[]",
        b"[0,",
        b"[-1,",
        b"99999999999999999999,",
        b"null",
        b'"',
        b"\xff",
        b"320",
        b"768",
    ]
    refused = 0
    for _ in range(400):
        changed = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(8 + header)
            if chance.random() < 0.5:
                changed[at] = chance.randrange(256)
            else:
                word = chance.choice(words)
                changed[at : at + len(word)] = word
        if chance.random() < 0.1:
            del changed[chance.randrange(len(changed)) :]
        refused += complaint(lambda: read_lora(bytes(changed), tmp_path)) is not None  # noqa: B023
    assert refused > 200


# --------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def weights(expand) -> dict[str, torch.Tensor]:
    """A checkpoint of zeros that take no memory, down to the VAE, which is missing."""

    def zeros(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(()).expand(shape)

    text = {f"encoder.layers.0.{k.split('.', 3)[3]}": s for k, s in expand.text_shapes().items()
            if k.startswith("encoder.layers.0.")}  # fmt: skip
    text |= {
        "embeddings.token_embedding.weight": (49408, 768),
        "final_layer_norm.weight": (768,),
        "embeddings.position_embedding.weight": (77, 768),
        "final_layer_norm.bias": (768,),
    }
    shapes = {UNET + key: shape for key, shape in expand.unet_shapes().items()}
    shapes |= {TEXT + key: shape for key, shape in text.items()}
    return {key: zeros(shape) for key, shape in shapes.items()}


@pytest.fixture
def load(weights, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], object]:
    def load(changes: dict[str, torch.Tensor | None]) -> object:
        tensors = {k: v for k, v in (weights | changes).items() if v is not None}
        monkeypatch.setattr(sd1_checkpoint, "read_safetensors", lambda path: tensors)
        return sd1_checkpoint._load_single_file(Path("x.safetensors"), torch.device("cpu"))

    return load


def test_checkpoints_that_are_complete_but_for_one_tensor(load, weights) -> None:
    assert "has no VAE" in complaint(lambda: load({}))
    chance = random.Random(SEED)
    odd = [
        None,
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(7),
        torch.zeros(1, 0, 1, 1),
        torch.tensor(float("nan")),
        torch.zeros(2**40, 0),
        torch.zeros(3, 2, 1),
        torch.zeros(1, dtype=torch.int8),
        torch.zeros((), dtype=torch.complex64),
    ]
    asked = [
        UNET + "input_blocks.0.0.weight",
        UNET + "input_blocks.1.0.in_layers.2.weight",
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        UNET + "middle_block.1.norm.weight",
        TEXT + "embeddings.token_embedding.weight",
        TEXT + "embeddings.position_embedding.weight",
        TEXT + "encoder.layers.0.mlp.fc1.weight",
    ]  # whose shapes the loader looks at
    others = chance.sample(sorted(weights), 4)
    for key in asked:
        for value in odd if key in asked else chance.sample(odd, 2):
            sentence = complaint(lambda: load({key: value}))  # noqa: B023
            assert sentence and "has no VAE" not in sentence, (key, value)
    for key in others:
        assert "has no VAE" not in complaint(lambda: load({key: chance.choice(odd)}))  # noqa: B023


@pytest.mark.parametrize(
    "key",
    [
        UNET + "input_blocks.0.0.op.weight",
        UNET + "input_blocks.999999999.0.x",
        UNET + f"input_blocks.{'9' * 5000}.0.op.x",
        UNET + "input_blocks.99.0.op.x",
        TEXT + "encoder.layers.\N{SUPERSCRIPT TWO}.x",
        TEXT + f"encoder.layers.{'9' * 5000}.x",
        TEXT + "encoder.layers.",
        VAE + "taesd_decoder.\N{SUPERSCRIPT TWO}.x",
        VAE + f"taesd_decoder.{'9' * 5000}.x",
        VAE + f"decoder.up.{'9' * 5000}.block.0.x",
        VAE + "decoder.mid.attn_1.",
    ],
)
def test_names_that_no_model_has(load, key: str) -> None:
    assert "has no VAE" not in complaint(lambda: load({key: torch.zeros(1)}))[:200]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vae_scale", torch.tensor(float("nan"))),
        ("vae_scale", torch.zeros(2)),
        ("vae_shift", torch.tensor(float("inf"))),
        ("vae_shift", torch.tensor(1j)),
    ],
)
def test_scales_of_the_vae(load, key: str, value: torch.Tensor) -> None:
    tensors = {VAE + "taesd_decoder.1.weight": torch.zeros(1), VAE + key: value}
    assert key in complaint(lambda: load(tensors))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e-320", "0", "true", '"1"', "null", "[]",
                                   "1" + 400 * "0"])  # fmt: skip
def test_scaling_factors(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"scaling_factor": {value}}}')
    config = sd1_checkpoint._config(tmp_path, "config.json")
    with pytest.raises(HostError, match=r"scaling_factor .* a number other than 0"):
        sd1_checkpoint._number(config, "scaling_factor", 1.0, tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"9" * 5000, b"", b"[]"])
def test_configurations(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert complaint(lambda: sd1_checkpoint._config(tmp_path, "config.json"))


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [
        (b"{}", b""),
        (b'{"<|startoftext|>": 1, "<|endoftext|>": "x"}', b""),
        (b'{"<|startoftext|>": 0, "<|endoftext|>": 49408}', b""),
        (b'{"<|startoftext|>": 0, "<|endoftext|>": -1}', b""),
        (b'{"<|startoftext|>": 0, "<|endoftext|>": 1}', b"\xff"),
        (b'{"<|startoftext|>": 0, "<|endoftext|>": 1}', b"a b c"),
    ],
)
def test_tokenizer_files(tmp_path: Path, vocabulary: bytes, merges: bytes) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_bytes(vocabulary)
    (folder / "merges.txt").write_bytes(merges)
    assert complaint(lambda: sd1_checkpoint._folder_tokenizer(tmp_path, 49408))


# --------------------------------------------------------------------------- arguments

NODE = {"class_type": "KSampler", "inputs": {"seed": 1, "cfg": 4.0, "tiled": False, "sampler": "a",
        "model": ["1", 0]}, "_meta": {"title": "Draw"}}  # fmt: skip
ODD = [None, True, 0, -1, 1.5, "", "x", "\ud800", [], [[]], ["1", 0], {}, {"a": 1}, 10**400]
SETTINGS = ["Draw.seed=1", "3.seed=²", "3.seed=nan", f"3.cfg=1{'0' * 400}", "3.cfg=inf", "3.a=1",
            "3.model=1", "3.tiled=x", "KSampler.sampler=\ud800", "3.seed=" + "9" * 5000, "..=",
            "3.seed=-", "3.cfg=1e999", "3.cfg="]  # fmt: skip


def test_mutated_workflows_and_settings(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    file = tmp_path / "workflow.json"

    def mutated(value: object, depth: int = 0) -> object:
        if chance.random() < 0.08:
            return chance.choice(ODD)
        if isinstance(value, dict):
            return {key: mutated(item, depth + 1) for key, item in value.items()}
        return value

    def use(setting: str) -> None:
        workflow = cli.read_workflow(file)
        cli.apply_setting(workflow, setting)
        json.dumps(workflow, allow_nan=False)

    accepted = 0
    for _ in range(600):
        file.write_text(json.dumps(mutated({"1": NODE, "3": NODE})))
        setting = chance.choice(SETTINGS)
        accepted += complaint(lambda: use(setting)) is None  # noqa: B023
    assert accepted


def test_a_folder_and_names_that_are_no_files(tmp_path: Path) -> None:
    for read in (cli.read_workflow, cli.read_text):
        assert "is a folder" in complaint(lambda: read(tmp_path))  # noqa: B023
        assert "cannot be read" in complaint(lambda: read(tmp_path / ("x" * 5000)))  # noqa: B023
        assert "cannot be read" in complaint(lambda: read(Path("a\0b")))  # noqa: B023
    for name in ("x" * 5000, "a\0b", "~nobody_of_that_name/x"):
        assert "as a path" in complaint(lambda: DiffusersHost(name))  # noqa: B023
    host = DiffusersHost(tmp_path)
    for name in ("x" * 5000, "a\0b"):
        assert "as a path" in complaint(lambda: host._checkpoint_path(name))  # noqa: B023
    (tmp_path / "file").touch()
    for name in ("file", "file/below", "x" * 5000):
        assert complaint(lambda: cli._make_folder(tmp_path / name))  # noqa: B023


@pytest.mark.parametrize(
    "source",
    ["import sys; sys.exit('bye')", "raise RecursionError", "x = (", "raise ValueError('a\\nb')"],
)
def test_detectors_that_cannot_be_loaded(tmp_path: Path, source: str) -> None:
    file = tmp_path / "judge.py"
    file.write_text(source)
    assert "cannot be loaded" in complaint(lambda: detector.load_detector(f"{file}:Judge"))
    sys.modules.pop("lacuna_detector_judge", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", "1" * 30), ("width", "9" * 5000), ("cfg", "nan"), ("cfg", "1e999"),
     ("strength", "inf")],
)  # fmt: skip
def test_numbers_that_no_widget_takes(capsys, name: str, value: str) -> None:
    needed = ["evaluate", "--checkpoint", "a", "--lora", "b", "--concepts", "c"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*needed, f"--{name}", value])
    assert stopped.value.code == 2
    assert f"argument --{name}: invalid" in capsys.readouterr().err


def test_what_libraries_say_is_cut(tmp_path: Path) -> None:
    class Long(Exception):
        def __str__(self) -> str:
            return "first\nsecond\n" + "x" * 10_000

    sentence = cli._sentence(Long())
    assert "first second" in sentence and len(sentence) < 1000 and "\n" not in sentence
    assert "enough memory" in cli._sentence(MemoryError())
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**52)
    assert "enough memory" in cli._sentence(refused.value)
