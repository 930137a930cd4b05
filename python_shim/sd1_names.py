# SPDX-License-Identifier: Apache-2.0
"""Names of SD1.x weights: single-file ("LDM") <-> diffusers, for any number of levels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESIDUAL_BACK = {new: old for old, new in _RESIDUAL.items()}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _indices(keys: Iterable[str], pattern: str) -> list[int]:
    """What `pattern` finds: two digits at most, for loops run up to it, and no model has more."""
    return sorted({int(match[1]) for key in keys if (match := re.match(pattern, key))})


def ldm_layout(keys: Iterable[str]) -> tuple[int, int]:
    """(levels, residual blocks per level) of a UNet in LDM names."""
    keys = list(keys)
    blocks = _indices(keys, r"input_blocks\.(\d{1,2})\.")
    downsamplers = _indices(keys, r"input_blocks\.(\d{1,2})\.0\.op\.")
    if not blocks:
        return 0, 0
    layers = (downsamplers[0] if downsamplers else blocks[-1] + 1) - 1
    return len(downsamplers) + 1, max(layers, 0)


def diffusers_layout(keys: Iterable[str]) -> tuple[int, int]:
    """(levels, residual blocks per level) of a UNet in diffusers names."""
    keys = list(keys)
    return len(_indices(keys, r"down_blocks\.(\d{1,2})\.")), len(
        _indices(keys, r"down_blocks\.0\.resnets\.(\d{1,2})\.")
    )


def _block_pairs(levels: int, layers: int) -> Iterator[tuple[str, str]]:
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    yield "input_blocks.0.0", "conv_in"
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            yield f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}"
            yield f"input_blocks.{first + layer}.1", f"down_blocks.{level}.attentions.{layer}"
        yield f"input_blocks.{first + layers}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    for level in range(levels):
        for layer in range(layers + 1):
            block = level * (layers + 1) + layer
            yield f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}"
            yield f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{layer}"
        # the upsampler follows the attention, or the residual block where the level has none
        yield f"output_blocks.{block}.1.conv", f"up_blocks.{level}.upsamplers.0.conv"
        yield f"output_blocks.{block}.2.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def _rename(key: str, blocks: dict[str, str], residual: dict[str, str]) -> str:
    """`key` with its block renamed; left alone when unknown, for the strict check to name."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        block = blocks.get(".".join(parts[:length]))
        if block is None:
            continue
        inner, _, field = ".".join(parts[length:]).rpartition(".")
        return ".".join(part for part in (block, residual.get(inner, inner), field) if part)
    return key


def unet_to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """LDM name -> diffusers name."""
    keys = list(keys)
    blocks = dict(_block_pairs(*ldm_layout(keys)))
    return {key: _rename(key, blocks, _RESIDUAL) for key in keys}


def unet_to_ldm(keys: Iterable[str]) -> dict[str, str]:
    """Diffusers name -> LDM name."""
    keys = list(keys)
    with_attention = {key.split(".attentions.")[0] for key in keys if ".attentions." in key}
    blocks: dict[str, str] = {}
    for ldm, diffusers in _block_pairs(*diffusers_layout(keys)):
        level = diffusers.split(".upsamplers.")[0]
        if ldm.endswith(".1.conv" if level in with_attention else ".2.conv"):
            continue
        blocks[diffusers] = ldm
    return {key: _rename(key, blocks, _RESIDUAL_BACK) for key in keys}


def vae_to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Names of a stock VAE, LDM or older diffusers ones -> current diffusers."""
    keys = list(keys)
    levels = len(_indices(keys, r"decoder\.up\.(\d{1,2})\."))
    half = r"^(encoder|decoder)"
    renamed = {}
    for key in keys:
        new = re.sub(
            half + r"\.mid\.block_(\d)",
            lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}",
            key,
        )
        new = re.sub(
            half + r"\.mid\.attn_1\.(\w+)",
            lambda m: f"{m[1]}.mid_block.attentions.0.{_VAE_ATTENTION.get(m[2], m[2])}",
            new,
        )
        new = re.sub(
            half + r"(\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}{m[2]}.{_OLD_VAE_ATTENTION[m[3]]}.",
            new,
        )
        # LDM counts up-blocks from the image, diffusers from the latent
        new = re.sub(
            r"^decoder\.up\.(\d{1,2})\.block",
            lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets",
            new,
        )
        new = re.sub(
            r"^decoder\.up\.(\d{1,2})\.upsample",
            lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0",
            new,
        )
        new = re.sub(r"^encoder\.down\.(\d{1,2})\.block", r"encoder.down_blocks.\1.resnets", new)
        new = re.sub(
            r"^encoder\.down\.(\d{1,2})\.downsample", r"encoder.down_blocks.\1.downsamplers.0", new
        )
        new = re.sub(half + r"\.norm_out\.", r"\1.conv_norm_out.", new)
        renamed[key] = new.replace(".nin_shortcut.", ".conv_shortcut.")
    return renamed


def tiny_decoder_to_diffusers(key: str) -> str:
    """TAESD's decoder position -> AutoencoderTiny's, which does not count the clamp at 0."""
    position, _, rest = key.partition(".")
    return (
        f"decoder.layers.{int(position) - 1}.{rest}"
        if re.fullmatch(r"[0-9]{1,2}", position)
        else f"decoder.layers.{key}"
    )
