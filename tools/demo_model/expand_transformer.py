# SPDX-License-Identifier: Apache-2.0
"""Expand the small weights of the demo transformer to a checkpoint in the layout of SD3.

python tools/demo_model/expand_transformer.py --out DIR
    lacuna_demo_transformer.safetensors, about 275 MB; text encoder and VAE are the demo model's
python tools/demo_model/expand_transformer.py --out DIR --diffusers
    also the folder lacuna_demo_transformer_diffusers/
python tools/demo_model/expand_transformer.py --out DIR --random
    lacuna_random_transformer.safetensors: the transformer is noise (needs diffusers)
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from expand import (
    ASSETS,
    OPTIONAL_PART,
    PARTS,
    REPOSITORY,
    TAESD_DECODER,
    TAESD_ENCODER,
    UNET_PREFIX,
    VAE_PREFIX,
    DemoModelError,
    Weights,
    already_there,
    demo_weights,
    half,
    lively_weights,
    read_weights,
    save_weights,
    source_hash,
    tiny_vae,
    write_configs,
    write_text_encoder,
)

log = logging.getLogger("lacuna.demo_model")

COMPACT = REPOSITORY / "assets" / "demo_transformer" / "transformer.safetensors"
WIDTH = 768  # of the text encoder
TEXT_PREFIX = "text_encoders.clip_l.transformer."

BLOCKS, COPIES = 4, 4  # of the transformer; of each latent channel
CONTEXT, POOLED = 4096, 2048  # columns of SD3's two text entries: CLIP-L fills the first 768
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609  # what SD3's programs do to latents
SHIFT = 3.0

# diffusers names -> name in SD3's file
OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = (
    ("norm1.linear", "x_block.adaLN_modulation.1"),
    ("norm1_context.linear", "context_block.adaLN_modulation.1"),
    ("attn.to_q", "attn.to_k", "attn.to_v", "x_block.attn.qkv"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "context_block.attn.qkv"),
    ("attn.norm_q", "x_block.attn.ln_q"),
    ("attn.norm_k", "x_block.attn.ln_k"),
    ("attn.norm_added_q", "context_block.attn.ln_q"),
    ("attn.norm_added_k", "context_block.attn.ln_k"),
    ("attn.to_out.0", "x_block.attn.proj"),
    ("attn.to_add_out", "context_block.attn.proj"),
    ("ff.net.0.proj", "x_block.mlp.fc1"),
    ("ff.net.2", "x_block.mlp.fc2"),
    ("ff_context.net.0.proj", "context_block.mlp.fc1"),
    ("ff_context.net.2", "context_block.mlp.fc2"),
)
# the last block does not write to the text
NOT_LAST = ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
# (scale, shift) in diffusers, (shift, scale) in SD3's file
SWAPPED = ("norm_out.linear", f"transformer_blocks.{BLOCKS - 1}.norm1_context.linear")
COLUMNS = {
    "context_embedder.weight": CONTEXT,
    "time_text_embed.text_embedder.linear_1.weight": POOLED,
}


def padded(compact: Weights) -> Weights:
    """The weights with zero columns for the text encoders that are not there."""
    return compact | {
        key: torch.nn.functional.pad(compact[key], (0, columns - compact[key].shape[1]))
        for key, columns in COLUMNS.items()
    }


def sd3_names(weights: Weights) -> Weights:
    """Weights with diffusers' names under the names, and in the shapes, of SD3's file."""
    left = dict(weights)
    out = {"pos_embed": left.pop("pos_embed.pos_embed")}

    def move(names: Sequence[str], sd3_name: str) -> None:
        for field in ("weight",) if ".norm_" in names[0] else ("weight", "bias"):
            values = [left.pop(f"{name}.{field}") for name in names]
            if names[0] in SWAPPED:
                values = values[0].chunk(2)[::-1]
            out[f"{sd3_name}.{field}"] = torch.cat(values)

    for name, sd3_name in OUTER.items():
        move([name], sd3_name)
    for i in range(BLOCKS):
        for *names, sd3_name in BLOCK:
            if i < BLOCKS - 1 or names[0] not in NOT_LAST:
                move(
                    [f"transformer_blocks.{i}.{name}" for name in names],
                    f"joint_blocks.{i}.{sd3_name}",
                )
    if left:
        raise KeyError(min(left))
    return out


def read_compact(file: Path) -> Weights:
    """The trained transformer under diffusers' names."""
    if not file.is_file():
        raise DemoModelError(
            f"the demo transformer's weights are not at {file}; train them (see "
            "assets/demo_transformer/README.md), or use --random for noise of the same shape."
        )
    return read_weights(file)[0]


def random_compact(seed: int) -> Weights:
    """Noise in the transformer's shape."""
    from networks import make_transformer

    weights = make_transformer().state_dict()
    position = weights.pop("pos_embed.pos_embed")
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    return lively_weights(shapes, generator, gain=0.7) | {"pos_embed.pos_embed": position}


def vae_of_copies(weights: dict[str, Any]) -> tuple[Weights, Weights]:
    """TAESD's decoder and encoder for latents that hold every channel COPIES times.

    The decoder reads the mean of the copies; the encoder writes its channels that often.
    """
    decoder, encoder = dict(weights["decoder"]), dict(weights["encoder"])
    first = f"{TAESD_DECODER['first']}.weight"
    decoder[first] = decoder[first].repeat(1, COPIES, 1, 1) / COPIES
    for field in ("weight", "bias"):
        last = f"{TAESD_ENCODER['last']}.{field}"
        encoder[last] = torch.cat([encoder[last]] * COPIES)
    return decoder, encoder


def single_file(compact: Weights, weights: dict[str, Any]) -> Weights:
    """All tensors of an SD3 checkpoint with one text encoder, float16."""
    try:
        transformer = sd3_names(padded(compact))
    except KeyError as error:
        raise DemoModelError(
            f"the demo transformer's weights are damaged: check {error.args[0]}."
        ) from error
    decoder, encoder = vae_of_copies(weights)
    out = {UNET_PREFIX + key: value for key, value in transformer.items()}
    out |= {f"{TEXT_PREFIX}text_model.{key}": value for key, value in weights["text"].items()}
    # SD3 does not use it; without one ComfyUI would complain
    out[f"{TEXT_PREFIX}text_projection.weight"] = torch.eye(WIDTH)
    out |= {f"{VAE_PREFIX}taesd_decoder.{key}": value for key, value in decoder.items()}
    out |= {f"{VAE_PREFIX}taesd_encoder.{key}": value for key, value in encoder.items()}
    out = half(out)
    out[VAE_PREFIX + "vae_scale"] = torch.tensor(LATENT_SCALE * weights["latent_std"])
    out[VAE_PREFIX + "vae_shift"] = torch.tensor(LATENT_SHIFT)
    return out


def write_checkpoint(
    out: Path, random: bool = False, seed: int = 0, compact: Path = COMPACT, assets: Path = ASSETS
) -> Path:
    """Write the single-file checkpoint (unless an identical one is there) and return its path."""
    parts = [assets / f"{name}.safetensors" for name in (*PARTS[1:], OPTIONAL_PART)]
    scripts = [Path(__file__), Path(__file__).with_name("expand.py")]
    name, salt = "lacuna_demo_transformer", "demo"
    if random:
        name, salt = "lacuna_random_transformer", f"random {seed}"
    weights = random_compact(seed) if random else read_compact(compact)
    sources = [*scripts, *(part for part in parts if part.is_file())]
    path = out / f"{name}.safetensors"
    source = source_hash(sources if random else [*sources, compact], salt)
    if already_there(path, source):
        log.info("%s is up to date", path)
        return path
    title = "Lacuna demo transformer" + (f", random (seed {seed})" if random else "")
    save_weights(
        single_file(weights, demo_weights(assets, unet=False)),
        path,
        {"lacuna.source": source, "modelspec.title": title},
    )
    log.info("wrote %s: %s, %.0f MB", path, title, path.stat().st_size / 1e6)
    return path


def write_diffusers_folder(out: Path, compact: Path = COMPACT, assets: Path = ASSETS) -> Path:
    """Write the model as a folder for diffusers' StableDiffusion3Pipeline.

    Two of the pipeline's three text encoders are missing: give it prompt_embeds (77 rows, 768 of
    4096 columns filled) and pooled_prompt_embeds (768 of 2048).
    """
    transformer = padded(read_compact(compact))
    weights = demo_weights(assets, unet=False)
    decoder, encoder = vae_of_copies(weights)
    folder = out / "lacuna_demo_transformer_diffusers"
    save_weights(
        half(transformer), folder / "transformer" / "diffusion_pytorch_model.safetensors", {}
    )
    vae = tiny_vae(decoder, encoder)
    save_weights(half(vae), folder / "vae" / "diffusion_pytorch_model.safetensors", {})
    write_text_encoder(folder, weights["text"], projection=True)
    missing = ("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")
    configs: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline",
            "_diffusers_version": "0.35.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderTiny"],
            **{name: [None, None] for name in missing},
        },
        "transformer/config.json": {
            "_class_name": "SD3Transformer2DModel",
            "attention_head_dim": 64,
            "caption_projection_dim": 256,
            "in_channels": 4 * COPIES,
            "joint_attention_dim": CONTEXT,
            "num_attention_heads": 4,
            "num_layers": BLOCKS,
            "out_channels": 4 * COPIES,
            "patch_size": 2,
            "pooled_projection_dim": POOLED,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            "sample_size": 8,
        },
        # diffusers divides latents by scaling_factor before it decodes them
        "vae/config.json": {
            "_class_name": "AutoencoderTiny",
            "latent_channels": 4 * COPIES,
            "scaling_factor": 1.0 / weights["latent_std"],
            "shift_factor": 0.0,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": SHIFT,
        },
    }
    write_configs(folder, configs)
    log.info("wrote %s", folder)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--diffusers", action="store_true", help="also write a diffusers-style folder"
    )
    parser.add_argument("--random", action="store_true", help="a transformer of noise")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--compact", type=Path, default=COMPACT, metavar="FILE",
                        help="weights to expand (default: the repository's)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.diffusers and options.random:
        parser.error("--diffusers writes the trained weights only; leave out --random")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_checkpoint(options.out, options.random, options.seed, options.compact)
        if options.diffusers:
            write_diffusers_folder(options.out, options.compact)
    except (DemoModelError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
