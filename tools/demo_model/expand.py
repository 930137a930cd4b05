# SPDX-License-Identifier: Apache-2.0
"""Expand the small demo weights to a checkpoint that every SD1.x program can open.

python tools/demo_model/expand.py --out DIR              lacuna_demo.safetensors, about 303 MB
python tools/demo_model/expand.py --out DIR --diffusers  also the folder lacuna_demo_diffusers/
python tools/demo_model/expand.py --out DIR --random     lacuna_random.safetensors: only noise
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from safetensors import safe_open
from safetensors.torch import save_file

log = logging.getLogger("lacuna.demo_model")

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "assets" / "demo_model"
BPE_FILE = REPOSITORY / "python_shim" / "data" / "bpe_simple_vocab_16e6.txt.gz"
PARTS, OPTIONAL_PART = ("unet", "text_encoder", "vae_decoder"), "vae_encoder"

CHANNELS, CONTEXT, TIME, LATENT = 320, 768, 1280, 4
LAYERS, HIDDEN, VOCABULARY, WINDOW = 12, 3072, 49408, 77
SD1_LATENT_SCALE = 0.18215

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
VAE_PREFIX = "first_stage_model."

# The UNet has one level with one residual block, so that the whole renaming is this list.
UNET_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESIDUAL_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Positions inside the TAESD encoder and decoder; everything else there has no weights.
TAESD_ENCODER = {
    "first": 0,
    "blocks": (1, 3, 4, 5, 7, 8, 9, 11, 12, 13),
    "strided": (2, 6, 10),
    "last": 14,
}
TAESD_DECODER = {
    "first": 1,
    "blocks": (3, 4, 5, 8, 9, 10, 13, 14, 15, 18),
    "strided": (7, 12, 17),
    "last": 19,
}

Weights = dict[str, torch.Tensor]


class DemoModelError(RuntimeError):
    """A sentence for the person at the keyboard."""


def ldm_unet_key(key: str) -> str:
    """The single-file name of a diffusers UNet key of the one-level demo model."""
    for block, ldm_block in UNET_BLOCKS.items():
        if key.startswith(block + "."):
            rest = key[len(block) + 1 :]
            if ".resnets." in block:
                part, _, field = rest.rpartition(".")
                rest = f"{RESIDUAL_PARTS[part]}.{field}"
            return f"{ldm_block}.{rest}"
    raise DemoModelError(
        f"the UNet weights hold {key}, which does not belong to the demo model's shape."
    )


# --------------------------------------------------------------------------- shapes (for --random)


def _affine(name: str, weight: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def unet_shapes() -> dict[str, tuple[int, ...]]:
    c = CHANNELS

    def residual(name: str, channels_in: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from _affine(f"{name}.in_layers.0", (channels_in,))
        yield from _affine(f"{name}.in_layers.2", (c, channels_in, 3, 3))
        yield from _affine(f"{name}.emb_layers.1", (c, TIME))
        yield from _affine(f"{name}.out_layers.0", (c,))
        yield from _affine(f"{name}.out_layers.3", (c, c, 3, 3))
        if channels_in != c:
            yield from _affine(f"{name}.skip_connection", (c, channels_in, 1, 1))

    def transformer(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from _affine(f"{name}.norm", (c,))
        yield from _affine(f"{name}.proj_in", (c, c, 1, 1))
        yield from _affine(f"{name}.proj_out", (c, c, 1, 1))
        block = f"{name}.transformer_blocks.0"
        for attention, context in (("attn1", c), ("attn2", CONTEXT)):
            yield f"{block}.{attention}.to_q.weight", (c, c)
            yield f"{block}.{attention}.to_k.weight", (c, context)
            yield f"{block}.{attention}.to_v.weight", (c, context)
            yield from _affine(f"{block}.{attention}.to_out.0", (c, c))
        for norm in ("norm1", "norm2", "norm3"):
            yield from _affine(f"{block}.{norm}", (c,))
        yield from _affine(f"{block}.ff.net.0.proj", (8 * c, c))
        yield from _affine(f"{block}.ff.net.2", (c, 4 * c))

    def everything() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from _affine("time_embed.0", (TIME, c))
        yield from _affine("time_embed.2", (TIME, TIME))
        yield from _affine("input_blocks.0.0", (c, LATENT, 3, 3))
        yield from residual("input_blocks.1.0", c)
        yield from transformer("input_blocks.1.1")
        yield from residual("middle_block.0", c)
        yield from transformer("middle_block.1")
        yield from residual("middle_block.2", c)
        for i in range(2):
            yield from residual(f"output_blocks.{i}.0", 2 * c)
            yield from transformer(f"output_blocks.{i}.1")
        yield from _affine("out.0", (c,))
        yield from _affine("out.2", (LATENT, c, 3, 3))

    return dict(everything())


def text_layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    name = f"encoder.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in ("layer_norm1", "layer_norm2"):
        shapes.update(_affine(f"{name}.{norm}", (CONTEXT,)))
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes.update(_affine(f"{name}.self_attn.{projection}", (CONTEXT, CONTEXT)))
    shapes.update(_affine(f"{name}.mlp.fc1", (HIDDEN, CONTEXT)))
    shapes.update(_affine(f"{name}.mlp.fc2", (CONTEXT, HIDDEN)))
    return shapes


def text_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (VOCABULARY, CONTEXT),
        "embeddings.position_embedding.weight": (WINDOW, CONTEXT),
    }
    for layer in range(LAYERS):
        shapes.update(text_layer_shapes(layer))
    shapes.update(_affine("final_layer_norm", (CONTEXT,)))
    return shapes


def taesd_shapes(layout: dict, channels_in: int, channels_out: int) -> dict[str, tuple[int, ...]]:
    shapes = dict(_affine(str(layout["first"]), (64, channels_in, 3, 3)))
    for block in layout["blocks"]:
        for conv in (0, 2, 4):
            shapes.update(_affine(f"{block}.conv.{conv}", (64, 64, 3, 3)))
    for conv in layout["strided"]:
        shapes[f"{conv}.weight"] = (64, 64, 3, 3)
    shapes.update(_affine(str(layout["last"]), (channels_out, 64, 3, 3)))
    return shapes


# --------------------------------------------------------------------------- weights


def read_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _is_norm(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 and key.endswith(".weight")


def lively_weights(
    shapes: dict[str, tuple[int, ...]], generator: torch.Generator, gain: float
) -> Weights:
    """He-style noise: finite and lively activations at every depth."""
    weights: Weights = {}
    for key, shape in shapes.items():
        if _is_norm(key, shape):
            weights[key] = torch.ones(shape)
        elif len(shape) == 1:
            weights[key] = torch.zeros(shape)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            weights[key] = torch.randn(shape, generator=generator) * (gain / fan_in**0.5)
    return weights


def _identity_layer(layer: int) -> Weights:
    """A transformer layer that adds nothing to its input: its output projections are zero."""
    return {
        key: torch.ones(shape) if _is_norm(key, shape) else torch.zeros(shape)
        for key, shape in text_layer_shapes(layer).items()
    }


def demo_weights(assets: Path = ASSETS, unet: bool = True) -> dict[str, Weights | float]:
    """The trained parts: diffusers UNet, 12-layer text encoder, TAESD decoder and encoder."""
    files = [assets / f"{name}.safetensors" for name in (PARTS if unet else PARTS[1:])]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DemoModelError(
            f"the demo weights {', '.join(missing)} are not in {assets}; restore the folder from "
            "the repository, or use --random for a checkpoint of noise with the same shapes."
        )
    *unet_file, text_file, decoder_file = files
    (text, _), (decoder, decoder_info) = read_weights(text_file), read_weights(decoder_file)
    ids, rows = text.pop("token_ids"), text.pop("token_rows")
    embedding = torch.zeros(VOCABULARY, CONTEXT)
    embedding[ids] = rows.float()
    text["embeddings.token_embedding.weight"] = embedding
    for layer in range(LAYERS):
        if f"encoder.layers.{layer}.mlp.fc1.weight" not in text:
            text.update(_identity_layer(layer))
    return {
        "unet": read_weights(unet_file[0])[0] if unet else {},
        "text": text,
        "decoder": decoder,
        "encoder": _encoder(assets),
        "latent_std": float(decoder_info["latent_std"]),
    }


def _encoder(assets: Path) -> Weights:
    """The trained encoder; zeros where there is none, because ComfyUI expects its keys."""
    file = assets / f"{OPTIONAL_PART}.safetensors"
    if file.is_file():
        return read_weights(file)[0]
    shapes = taesd_shapes(TAESD_ENCODER, 3, LATENT)
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


def random_weights(seed: int) -> dict[str, Weights | float]:
    generator = torch.Generator().manual_seed(seed)
    unet = lively_weights(unet_shapes(), generator, gain=0.7)
    unet["out.2.weight"] *= 0.2  # a modest noise prediction: latents stay in a natural range
    text = lively_weights(text_shapes(), generator, gain=0.5)
    text["embeddings.token_embedding.weight"] = 0.5 * torch.randn(
        VOCABULARY, CONTEXT, generator=generator
    )
    decoder = lively_weights(taesd_shapes(TAESD_DECODER, LATENT, 3), generator, gain=1.0)
    decoder[f"{TAESD_DECODER['last']}.bias"] += 0.5
    encoder = lively_weights(taesd_shapes(TAESD_ENCODER, 3, LATENT), generator, gain=1.0)
    return {
        "unet_ldm": unet,
        "text": text,
        "decoder": decoder,
        "encoder": encoder,
        "latent_std": 1.0,
    }


def single_file(weights: dict) -> Weights:
    """All tensors of a stock SD1.x checkpoint, float16."""
    unet = weights.get("unet_ldm") or {
        ldm_unet_key(key): value for key, value in weights["unet"].items()
    }
    encoder = weights["encoder"]
    expected = {
        "UNet": (unet, unet_shapes()),
        "text encoder": (weights["text"], text_shapes()),
        "VAE decoder": (weights["decoder"], taesd_shapes(TAESD_DECODER, LATENT, 3)),
        "VAE encoder": (encoder, taesd_shapes(TAESD_ENCODER, 3, LATENT)),
    }
    for part, (tensors, shapes) in expected.items():
        wrong = {
            key
            for key in shapes.keys() | tensors.keys()
            if key not in tensors or tuple(tensors[key].shape) != shapes.get(key)
        }
        if wrong:
            raise DemoModelError(
                f"the {part} of the demo model is damaged: check {', '.join(sorted(wrong)[:3])}."
            )
    out = {UNET_PREFIX + key: value for key, value in unet.items()}
    out |= {TEXT_PREFIX + key: value for key, value in weights["text"].items()}
    out |= {f"{VAE_PREFIX}taesd_decoder.{key}": value for key, value in weights["decoder"].items()}
    out |= {f"{VAE_PREFIX}taesd_encoder.{key}": value for key, value in encoder.items()}
    out = {key: value.to(torch.float16).contiguous() for key, value in out.items()}
    # Hosts hand over latents divided by 0.18215: undo that, and restore the trained scale.
    out[VAE_PREFIX + "vae_scale"] = torch.tensor(SD1_LATENT_SCALE * weights["latent_std"])
    out[VAE_PREFIX + "vae_shift"] = torch.tensor(0.0)
    return out


# --------------------------------------------------------------------------- files


def source_hash(paths: list[Path], salt: str) -> str:
    """What a written file came from, to tell whether it is up to date."""
    digest = hashlib.sha256(salt.encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def already_there(path: Path, source: str) -> bool:
    """Whether `path` was written from this source."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("lacuna.source") == source
    except Exception:  # absent, cut short or something else entirely: write it anew
        return False


def save_weights(tensors: Weights, path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        temporary.chmod(0o644)  # safetensors makes private files
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(out: Path, random: bool = False, seed: int = 0, assets: Path = ASSETS) -> Path:
    """Write the single-file checkpoint (unless an identical one is there) and return its path."""
    this_script = Path(__file__)
    if random:
        path = out / "lacuna_random.safetensors"
        source = source_hash([this_script], f"random {seed}")
        title = f"Lacuna shapes with random weights (seed {seed})"
    else:
        path = out / "lacuna_demo.safetensors"
        parts = [assets / f"{name}.safetensors" for name in (*PARTS, OPTIONAL_PART)]
        source = source_hash([this_script, *(part for part in parts if part.is_file())], "demo")
        title = "Lacuna demo model"
    if already_there(path, source):
        log.info("%s is up to date", path)
        return path
    weights = random_weights(seed) if random else demo_weights(assets)
    save_weights(single_file(weights), path, {"lacuna.source": source, "modelspec.title": title})
    log.info("wrote %s: %s, %.0f MB", path, title, path.stat().st_size / 1e6)
    return path


def half(tensors: Weights, prefix: str = "") -> Weights:
    """The tensors in float16, their names behind the prefix."""
    return {prefix + key: value.to(torch.float16).contiguous() for key, value in tensors.items()}


def write_diffusers_folder(out: Path, assets: Path = ASSETS) -> Path:
    """Write the demo model as a folder that diffusers' StableDiffusionPipeline opens."""
    weights = demo_weights(assets)
    folder = out / "lacuna_demo_diffusers"

    save_weights(half(weights["unet"]), folder / "unet" / "diffusion_pytorch_model.safetensors", {})
    vae = tiny_vae(weights["decoder"], weights["encoder"])
    save_weights(half(vae), folder / "vae" / "diffusion_pytorch_model.safetensors", {})
    write_text_encoder(folder, weights["text"])
    configs = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.35.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderTiny"],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": 8,
            "block_out_channels": [CHANNELS],
            "cross_attention_dim": CONTEXT,
            "down_block_types": ["CrossAttnDownBlock2D"],
            "layers_per_block": 1,
            "sample_size": 8,
            "up_block_types": ["CrossAttnUpBlock2D"],
        },
        # diffusers divides latents by scaling_factor before it decodes them
        "vae/config.json": {
            "_class_name": "AutoencoderTiny",
            "scaling_factor": 1.0 / weights["latent_std"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "steps_offset": 1,
        },
    }
    write_configs(folder, configs)
    log.info("wrote %s", folder)
    return folder


def write_configs(folder: Path, configs: dict[str, dict]) -> None:
    """Write JSON files by their paths in the folder."""
    for name, config in configs.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_text_encoder(folder: Path, text: Weights, projection: bool = False) -> None:
    """Write the subfolders text_encoder and tokenizer of a diffusers folder.

    `projection` adds one that changes nothing, for pipelines that ask for it.
    """
    tensors = half(text, "text_model.")
    if projection:
        tensors["text_projection.weight"] = torch.eye(CONTEXT, dtype=torch.float16)
    save_weights(tensors, folder / "text_encoder" / "model.safetensors", {})
    configs = {
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
            "model_type": "clip_text_model",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "hidden_act": "quick_gelu",
            "hidden_size": CONTEXT,
            "intermediate_size": HIDDEN,
            "max_position_embeddings": WINDOW,
            "num_attention_heads": 12,
            "num_hidden_layers": LAYERS,
            "pad_token_id": 49407,
            "projection_dim": CONTEXT,
            "vocab_size": VOCABULARY,
        },
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "model_max_length": WINDOW,
        },
    }
    write_configs(folder, configs)
    vocabulary, merges = _clip_bpe().vocabulary_and_merges()
    (folder / "tokenizer" / "vocab.json").write_text(
        json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tiny_vae(decoder: Weights, encoder: Weights) -> Weights:
    """TAESD's weights under the names of diffusers' AutoencoderTiny."""
    return {_tiny_key(key): value for key, value in decoder.items()} | {
        f"encoder.layers.{key}": value for key, value in encoder.items()
    }


def _tiny_key(key: str) -> str:
    """diffusers' AutoencoderTiny counts without the clamp that TAESD has at position 0."""
    position, _, rest = key.partition(".")
    return f"decoder.layers.{int(position) - 1}.{rest}"


def _clip_bpe() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY))
    try:
        from python_shim import clip_bpe
    finally:
        sys.path.remove(str(REPOSITORY))
    return clip_bpe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--diffusers", action="store_true", help="also write a diffusers-style folder"
    )
    parser.add_argument(
        "--random", action="store_true", help="random weights instead of the trained ones"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args(arguments)
    if options.diffusers and options.random:
        parser.error("--diffusers writes the trained weights only; leave out --random")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_checkpoint(options.out, options.random, options.seed)
        if options.diffusers:
            if options.random:
                raise DemoModelError(
                    "--diffusers writes the trained weights only; leave out --random."
                )
            write_diffusers_folder(options.out)
    except (DemoModelError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
