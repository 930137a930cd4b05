# SPDX-License-Identifier: Apache-2.0
"""Renaming of full-size SD1.x weights; no weights are needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

from diffusers import AutoencoderKL, UNet2DConditionModel

from python_shim import sd1_checkpoint, sd1_names

SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15).state_dict()


def test_known_names(sd15):
    names = sd1_names.unet_to_ldm(sd15)
    assert len(names) == len(set(names.values())) == 686
    known = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.resnets.1.conv1.weight": "input_blocks.2.0.in_layers.2.weight",
        "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.3.0.op.bias",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight":
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.3.resnets.1.time_emb_proj.bias": "input_blocks.11.0.emb_layers.1.bias",
        "mid_block.resnets.1.norm2.weight": "middle_block.2.out_layers.0.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "up_blocks.3.attentions.2.proj_out.weight": "output_blocks.11.1.proj_out.weight",
        "time_embedding.linear_2.weight": "time_embed.2.weight",
        "conv_out.bias": "out.2.bias",
    }  # fmt: skip
    assert {key: names[key] for key in known} == known


def test_there_and_back(sd15):
    names = sd1_names.unet_to_ldm(sd15)
    back = sd1_names.unet_to_diffusers(names.values())
    assert all(back[ldm] == diffusers for diffusers, ldm in names.items())


def test_diffusers_own_converter_agrees(sd15):
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    names = sd1_names.unet_to_ldm(sd15)
    numbered = {
        "model.diffusion_model." + ldm: torch.tensor(i) for i, ldm in enumerate(names.values())
    }
    converted = single_file.convert_ldm_unet_checkpoint(numbered, {"layers_per_block": 2})
    assert {key: int(value) for key, value in converted.items()} == {
        key: i for i, key in enumerate(names)
    }


def test_the_configuration_comes_from_the_shapes(sd15):
    config = sd1_checkpoint.unet_config(sd15, Path("model.safetensors"))
    assert {key: config[key] for key in SD15} == SD15
    with torch.device("meta"):
        rebuilt = UNet2DConditionModel(**config).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in sd15.items()}


def ldm_vae_shapes() -> dict[str, tuple[int, ...]]:
    """A stock SD VAE decoder, as its single-file checkpoints name it."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def residual(name: str, channels_in: int, channels_out: int) -> None:
        layer(f"{name}.norm1", channels_in)
        layer(f"{name}.conv1", channels_out, channels_in, 3, 3)
        layer(f"{name}.norm2", channels_out)
        layer(f"{name}.conv2", channels_out, channels_out, 3, 3)
        if channels_in != channels_out:
            layer(f"{name}.nin_shortcut", channels_out, channels_in, 1, 1)

    layer("post_quant_conv", 4, 4, 1, 1)
    layer("decoder.conv_in", 512, 4, 3, 3)
    residual("decoder.mid.block_1", 512, 512)
    residual("decoder.mid.block_2", 512, 512)
    layer("decoder.mid.attn_1.norm", 512)
    for part in ("q", "k", "v", "proj_out"):
        layer(f"decoder.mid.attn_1.{part}", 512, 512, 1, 1)
    channels = 512
    for level, width in ((3, 512), (2, 512), (1, 256), (0, 128)):
        for block in range(3):
            residual(f"decoder.up.{level}.block.{block}", channels, width)
            channels = width
        if level:
            layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    layer("decoder.norm_out", 128)
    layer("decoder.conv_out", 3, 128, 3, 3)
    layer("encoder.conv_in", 128, 3, 3, 3)
    channels = 128
    for level, width in enumerate((128, 256, 512, 512)):
        for block in range(2):
            residual(f"encoder.down.{level}.block.{block}", channels, width)
            channels = width
        if level < 3:
            layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    residual("encoder.mid.block_1", 512, 512)
    residual("encoder.mid.block_2", 512, 512)
    layer("encoder.mid.attn_1.norm", 512)
    for part in ("q", "k", "v", "proj_out"):
        layer(f"encoder.mid.attn_1.{part}", 512, 512, 1, 1)
    layer("encoder.norm_out", 512)
    layer("encoder.conv_out", 8, 512, 3, 3)
    layer("quant_conv", 8, 8, 1, 1)
    return shapes


@pytest.fixture(scope="module")
def vae_weights():
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in ldm_vae_shapes().items():
        scale = torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 0.1
        weights[key] = scale * torch.randn(shape, generator=generator)
        if len(shape) == 1 and key.endswith("weight"):
            weights[key] += 1.0
    return weights


def test_a_stock_vae_works_as_diffusers_own_conversion(vae_weights):
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    prefixed = {"first_stage_model." + key: value.clone() for key, value in vae_weights.items()}
    converted = single_file.convert_ldm_vae_checkpoint(prefixed, dict(vae.config))
    vae.load_state_dict(converted)
    ours = sd1_checkpoint._build_stock_vae(
        dict(vae_weights), Path("model.safetensors"), 1.0, torch.device("cpu")
    )
    latent = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    image = torch.rand(1, 3, 32, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for result, expected in (
            (ours.decode(latent), vae.decode(latent).sample),
            (ours.encode(image), vae.encode(image).latent_dist.mean),
        ):
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
