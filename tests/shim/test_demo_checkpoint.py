# SPDX-License-Identifier: Apache-2.0
"""The expanded demo checkpoint is a stock SD1.x file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "assets" / "demo_model"
TEXT = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def tensors(demo_checkpoint):
    return load_file(demo_checkpoint)


def test_shape_of_the_file(tensors, demo_checkpoint):
    parts = {}
    for key in tensors:
        parts[key.split(".")[0]] = parts.get(key.split(".")[0], 0) + 1
    assert parts == {"model": 168, "cond_stage_model": 196, "first_stage_model": 136}
    scalars = {"first_stage_model.vae_scale", "first_stage_model.vae_shift"}
    assert all(v.dtype == torch.float16 for k, v in tensors.items() if k not in scalars)
    assert all(torch.isfinite(torch.stack(torch.aminmax(v))).all() for v in tensors.values())
    assert tensors["model.diffusion_model.input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    assert demo_checkpoint.stat().st_size < 310e6
    with safe_open(demo_checkpoint, framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "Lacuna demo model"


def test_trained_weights_arrive_unchanged(tensors):
    unet = load_file(ASSETS / "unet.safetensors")
    pairs = {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight":
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "up_blocks.0.resnets.1.conv_shortcut.bias": "output_blocks.1.0.skip_connection.bias",
        "down_blocks.0.resnets.0.time_emb_proj.weight": "input_blocks.1.0.emb_layers.1.weight",
        "conv_norm_out.weight": "out.0.weight",
    }  # fmt: skip
    for diffusers, ldm in pairs.items():
        assert torch.equal(unet[diffusers], tensors["model.diffusion_model." + ldm])
    decoder = load_file(ASSETS / "vae_decoder.safetensors")
    for key, value in decoder.items():
        assert torch.equal(value, tensors[f"first_stage_model.taesd_decoder.{key}"])


def test_text_encoder_has_twelve_layers_of_which_ten_do_nothing(tensors):
    for layer in range(12):
        for end in ("self_attn.out_proj", "mlp.fc2"):
            weight = tensors[f"{TEXT}encoder.layers.{layer}.{end}.weight"]
            bias = tensors[f"{TEXT}encoder.layers.{layer}.{end}.bias"]
            assert (weight.any() or bias.any()) == (layer < 2)


def test_token_rows(tensors):
    text = load_file(ASSETS / "text_encoder.safetensors")
    rows = tensors[TEXT + "embeddings.token_embedding.weight"]
    assert rows.shape == (49408, 768)
    assert torch.equal(rows[text["token_ids"]], text["token_rows"])
    used = torch.zeros(49408, dtype=torch.bool)
    used[text["token_ids"]] = True
    assert not rows[~used].any()


def test_every_name_can_be_written_with_trained_tokens():
    """The README's claim that the model knows its names."""
    sys.path.insert(0, str(REPOSITORY))
    from python_shim.clip_bpe import make_tokenizer

    tokenizer = make_tokenizer()
    known = set(load_file(ASSETS / "text_encoder.safetensors")["token_ids"].tolist())
    names = json.loads((ASSETS / "names.json").read_text(encoding="utf-8"))
    assert len(names["objects"]) == 47 and len(names["flags"]) == 160
    synonyms = [word for words in names["synonyms"].values() for word in words]
    for name in (*names["objects"], *synonyms, *names["flags"]):
        assert set(tokenizer.encode(name).ids) <= known, name


def test_latents_are_scaled_back(tensors):
    with safe_open(ASSETS / "vae_decoder.safetensors", framework="pt") as file:
        latent_std = float(file.metadata()["latent_std"])
    scale = float(tensors["first_stage_model.vae_scale"])
    assert scale == pytest.approx(0.18215 * latent_std)
    assert float(tensors["first_stage_model.vae_shift"]) == 0.0


def test_an_up_to_date_file_is_kept_and_a_broken_one_replaced(expand, demo_checkpoint):
    before = demo_checkpoint.stat().st_mtime_ns
    assert expand.write_checkpoint(demo_checkpoint.parent) == demo_checkpoint
    assert demo_checkpoint.stat().st_mtime_ns == before
    assert not list(demo_checkpoint.parent.glob("*.part"))
    other = demo_checkpoint.parent / "broken"
    other.mkdir()
    (other / demo_checkpoint.name).write_bytes(demo_checkpoint.open("rb").read(100_000))
    expand.write_checkpoint(other)
    assert (other / demo_checkpoint.name).stat().st_size == demo_checkpoint.stat().st_size


def test_random_weights(expand, tensors):
    weights = expand.random_weights(seed=3)
    shapes = {key: value.shape for key, value in expand.single_file(weights).items()}
    assert shapes == {key: value.shape for key, value in tensors.items()}
    generator = torch.Generator().manual_seed(3)
    again = expand.lively_weights(expand.unet_shapes(), generator, gain=0.7)
    key = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(weights["unet_ldm"][key], again[key])
    trained = tensors["model.diffusion_model." + key].float()
    assert (weights["unet_ldm"][key] - trained).abs().max() > 0.01


def test_missing_assets_are_one_sentence(expand, tmp_path):
    with pytest.raises(expand.DemoModelError, match=r"unet\.safetensors.*--random"):
        expand.write_checkpoint(tmp_path, assets=tmp_path)
    assert not list(tmp_path.iterdir())


def test_command_line(expand, demo_checkpoint, tmp_path, caplog, capsys):
    with caplog.at_level("INFO"):
        assert expand.main(["--out", str(demo_checkpoint.parent)]) == 0
    assert f"{demo_checkpoint} is up to date" in caplog.text
    with pytest.raises(SystemExit):
        expand.main(["--out", str(tmp_path), "--random", "--diffusers"])
    assert "trained weights only" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
