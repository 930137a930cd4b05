# SPDX-License-Identifier: Apache-2.0
"""Read an SD1.x checkpoint, a single file or a diffusers folder, into ready modules.

Nothing is ever downloaded: every module is built from the shapes found in the file.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from . import clip_bpe, sd1_names
from .errors import HostError, brief, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPTextModel

log = logging.getLogger(__name__)

CONTEXT_WIDTH = 768
WINDOW = 77  # positions of the text encoder
LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8
LATENT_SCALE = 0.18215  # what SD1.x latents are multiplied by before the UNet sees them
WHAT_WORKS = "the headless host runs SD1.x models (single .safetensors file or diffusers folder)"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class VAE:
    """Between host latents [1,4,h,w] and images [1,3,H,W] in -1..1."""

    decode: Callable[[torch.Tensor], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SD1Checkpoint:
    unet: torch.nn.Module
    unet_names: dict[str, str]  # diffusers parameter name -> LDM name without prefix
    text_model: CLIPTextModel
    text_weights: Weights  # every parameter of the text transformer, for the fingerprint
    tokenizer: Tokenizer
    vae: VAE


def load(path: Path, device: torch.device) -> SD1Checkpoint:
    if path.is_dir():
        return _load_folder(path, device)
    return _load_single_file(path, device)


# --------------------------------------------------------------------------- reading


def read_safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise HostError(f"There is no file {path}.")
    if path.suffix.lower() != ".safetensors":
        raise HostError(
            f"{path.name} is not a .safetensors file, and other formats can run code or are not "
            "readable here; save the model as .safetensors first."
        )
    try:
        return load_file(path)
    except MemoryError:
        raise
    except Exception as error:  # torch has many names for a shape or type that cannot be
        raise HostError(
            f"{path.name} cannot be read as safetensors: it is damaged or was cut short "
            f"({brief(error)}); download it again."
        ) from error


def to_float(value: torch.Tensor, key: str, path: Path) -> torch.Tensor:
    """float32; refuses packed types, which are no numbers before a scale is applied."""
    if value.is_floating_point():
        try:
            return value.to(torch.float32)
        except (NotImplementedError, RuntimeError):  # float4 and what comes next
            pass
    raise HostError(
        f"{path.name}: {key} is stored as packed {value.dtype} numbers; "
        "use an unquantised file (float16, bfloat16 or float32)."
    )


def is_finite(values: torch.Tensor) -> bool:
    """Extremes carry NaN and infinity along, and cost a twentieth of torch.isfinite."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _floats(tensors: Mapping[str, torch.Tensor], part: str, path: Path) -> Weights:
    """float32 copies; refuses packed integers, NaN and infinity."""
    out: Weights = {}
    for key, value in tensors.items():
        out[key] = to_float(value, f"{key} of the {part}", path)
        if not is_finite(out[key]):
            raise HostError(
                f"{path.name}: the {part} holds NaN or infinite weights ({key}), so that every "
                "image would be black; the file is broken, download or merge it again."
            )
    return out


def _select(tensors: Mapping[str, torch.Tensor], prefix: str) -> Weights:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _first_few(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _build(
    factory: Callable[[], torch.nn.Module], weights: Weights, part: str, path: Path
) -> torch.nn.Module:
    """The module with exactly these weights; its own initialisation is skipped."""
    try:
        with torch.device("meta"):
            module = factory()
    except Exception as error:  # channels that no layer can have
        raise HostError(
            f"{path.name}: the {part} has shapes that no SD1.x {part} has ({brief(error)})."
        ) from error
    expected = module.state_dict()
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or unexpected:
        complaints = [
            f"{what} {_first_few(keys)}"
            for what, keys in (("lacks", missing), ("has unknown", unexpected))
            if keys
        ]
        raise HostError(
            f"{path.name}: the {part} is not a complete SD1.x {part}: "
            f"it {' and '.join(complaints)}."
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise HostError(
                f"{path.name}: {key} of the {part} has the shape {list(value.shape)}, "
                f"but SD1.x needs {list(expected[key].shape)}."
            )
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval().requires_grad_(False)


# --------------------------------------------------------------------------- families


def _refuse_other_families(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    unet = sd1_names.UNET_PREFIX

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in tensors)

    def refuse(found: str) -> None:
        raise HostError(f"{path.name} is {found}; {WHAT_WORKS}.")

    if has("lora_unet_", "lora_te", "lycoris_"):
        raise HostError(
            f"{path.name} is a LoRA, not a checkpoint; load it with a LoRA loader node "
            "and --lora-dir."
        )
    if has(unet + "joint_blocks.", "joint_blocks."):
        refuse("an SD3 model")
    if has(unet + "double_blocks.", "double_blocks.", "transformer.double_blocks."):
        refuse("a Flux model")
    if has("conditioner.embedders.", unet + "label_emb."):
        refuse("an SDXL model")
    if has("cond_stage_model.model."):
        refuse("an SD2.x model")
    if has("input_blocks.", "down_blocks."):
        refuse("a bare UNet without text encoder and VAE")
    if not has(unet + "input_blocks."):
        refuse("no Stable Diffusion checkpoint that Lacuna knows")
    _refuse_wrong_unet(
        in_channels=_channels_in(tensors.get(unet + "input_blocks.0.0.weight")),
        context=_context_width(tensors),
        path=path,
    )
    if "v_pred" in tensors:
        refuse("an SD1.x model with velocity prediction, which is not supported")


def _channels_in(weight: torch.Tensor | None) -> int | None:
    return None if weight is None or weight.dim() != 4 else weight.shape[1]


def _context_width(tensors: Mapping[str, torch.Tensor]) -> int | None:
    keys = (v for k, v in tensors.items() if k.endswith("attn2.to_k.weight") and v.dim() > 0)
    return next((key.shape[-1] for key in keys), None)


def _refuse_wrong_unet(in_channels: int | None, context: int | None, path: Path) -> None:
    families = {
        1024: "an SD2.x model",
        2048: "an SDXL model",
        None: "a model without text cross-attention",
    }
    if context != CONTEXT_WIDTH:
        found = families.get(context, f"a model with text embeddings of width {context}")
        raise HostError(f"{path.name} is {found}; {WHAT_WORKS}.")
    if in_channels is not None and in_channels != LATENT_CHANNELS:
        found = (
            "an inpainting model"
            if in_channels == 9
            else f"a model with {in_channels} input channels"
        )
        raise HostError(f"{path.name} is {found}; {WHAT_WORKS}, made for text to image.")


# --------------------------------------------------------------------------- parts


def unet_config(weights: Mapping[str, torch.Tensor], path: Path) -> dict:
    """UNet2DConditionModel arguments that fit these weights (diffusers names)."""
    levels, layers = sd1_names.diffusers_layout(weights)
    channels = []
    for level in range(levels):
        conv = weights.get(f"down_blocks.{level}.resnets.0.conv1.weight")
        if conv is None or conv.dim() == 0:
            raise HostError(
                f"{path.name}: the UNet's level {level} has no residual block; "
                "the file is incomplete."
            )
        channels.append(conv.shape[0])
    if not channels or not layers:
        raise HostError(f"{path.name}: no UNet blocks were found; {WHAT_WORKS}.")

    def with_attention(block: str) -> bool:
        return f"{block}.attentions.0.norm.weight" in weights

    if not with_attention("mid_block"):
        raise HostError(
            f"{path.name}: the UNet's middle block has no attention, which no SD1.x model lacks."
        )
    down = [
        "CrossAttnDownBlock2D" if with_attention(f"down_blocks.{i}") else "DownBlock2D"
        for i in range(levels)
    ]
    up = [
        "CrossAttnUpBlock2D" if with_attention(f"up_blocks.{i}") else "UpBlock2D"
        for i in range(levels)
    ]
    return {
        "sample_size": 64,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": CONTEXT_WIDTH,
        "attention_head_dim": 8,  # diffusers' historic name for the number of heads
    }


def _build_unet(weights: Weights, path: Path) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    weights = _floats(weights, "UNet", path)
    config = unet_config(weights, path)
    return _build(lambda: UNet2DConditionModel(**config), weights, "UNet", path)


def _build_text_model(weights: Weights, path: Path) -> tuple[CLIPTextModel, Weights]:
    from transformers import CLIPTextConfig, CLIPTextModel

    ignored = ("embeddings.position_ids", "text_projection", "logit_scale")
    weights = {k.removeprefix("text_model."): v for k, v in weights.items()}
    weights = _floats(
        {k: v for k, v in weights.items() if not k.startswith(ignored)}, "text encoder", path
    )
    layers = len({key.split(".")[2] for key in weights if key.startswith("encoder.layers.")})
    embedding = weights.get("embeddings.token_embedding.weight")
    positions = weights.get("embeddings.position_embedding.weight")
    inner = weights.get("encoder.layers.0.mlp.fc1.weight")
    if any(part is None or part.dim() != 2 for part in (embedding, positions, inner)):
        raise HostError(
            f"{path.name}: the CLIP text encoder is missing or incomplete; "
            "use a full SD1.x checkpoint."
        )
    if embedding.shape[1] != CONTEXT_WIDTH:
        raise HostError(
            f"{path.name}: the text encoder is {embedding.shape[1]} wide, SD1.x needs "
            f"{CONTEXT_WIDTH}; {WHAT_WORKS}."
        )
    all_weights = weights
    weights, layers = _without_identity_layers(weights, layers)
    config = CLIPTextConfig(
        vocab_size=embedding.shape[0],
        hidden_size=CONTEXT_WIDTH,
        intermediate_size=inner.shape[0],
        num_hidden_layers=layers,
        num_attention_heads=CONTEXT_WIDTH // 64,
        max_position_embeddings=positions.shape[0],
        hidden_act="quick_gelu",
        bos_token_id=clip_bpe.START_ID,
        eos_token_id=clip_bpe.END_ID,
        pad_token_id=clip_bpe.END_ID,
    )
    with torch.device("meta"):
        nested = any(key.startswith("text_model.") for key in CLIPTextModel(config).state_dict())
    if nested:  # transformers before 5 nests the transformer once more
        weights = {f"text_model.{key}": value for key, value in weights.items()}
    model = _build(lambda: CLIPTextModel(config), weights, "text encoder", path)
    for module in model.modules():  # the only buffer is computed, not stored
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(positions.shape[0]).unsqueeze(0)
    return model, all_weights


def _refuse_small_text_model(model: CLIPTextModel, path: Path) -> None:
    """Every prompt is padded with the last token of the vocabulary."""
    tokens, positions = model.config.vocab_size, model.config.max_position_embeddings
    if tokens < clip_bpe.VOCABULARY_SIZE or positions < WINDOW:
        raise HostError(
            f"{path.name}: the text encoder knows {tokens} tokens and {positions} positions, SD1.x "
            f"needs {clip_bpe.VOCABULARY_SIZE} and {WINDOW}; {WHAT_WORKS}."
        )


def _without_identity_layers(weights: Weights, layers: int) -> tuple[Weights, int]:
    """Drop layers whose output projections are all zero: they cost a layer and add nothing."""

    def is_identity(layer: int) -> bool:
        prefix = f"encoder.layers.{layer}."
        ends = [
            weights.get(f"{prefix}{name}.{field}")
            for name in ("self_attn.out_proj", "mlp.fc2")
            for field in ("weight", "bias")
        ]
        return all(end is not None and not bool(end.any()) for end in ends)

    kept = [layer for layer in range(layers) if not is_identity(layer)] or [0]
    number = {str(old): str(new) for new, old in enumerate(kept)}
    present = {str(layer) for layer in range(layers)}
    out: Weights = {}
    for key, value in weights.items():
        parts = key.split(".")
        if key.startswith("encoder.layers.") and parts[2] in present:
            if parts[2] not in number:
                continue
            parts[2] = number[parts[2]]
        out[".".join(parts)] = value
    return out, len(kept)


def _build_tiny_vae(
    weights: Weights, path: Path, scale: float, shift: float, device: torch.device
) -> VAE:
    from diffusers import AutoencoderTiny

    def half(name: str) -> torch.nn.Module:
        part = f"VAE {name}"
        wanted = _floats(_select(weights, f"{name}."), part, path)
        return _build(lambda: getattr(AutoencoderTiny(), name), wanted, part, path).to(device)

    decoder, encoder = half("decoder"), functools.cache(lambda: half("encoder"))
    return VAE(
        decode=lambda latent: decoder((latent - shift) * scale),
        encode=lambda image: encoder()(image) / scale + shift,
    )


def _build_stock_vae(weights: Weights, path: Path, scale: float, device: torch.device) -> VAE:
    from diffusers import AutoencoderKL

    names = sd1_names.vae_to_diffusers(weights)
    weights = {names[key]: value for key, value in weights.items()}
    for key, value in weights.items():  # 1x1 convolutions in LDM files, plain matrices in diffusers
        if ".attentions." in key and value.shape[2:] == (1, 1):
            weights[key] = value[:, :, 0, 0]

    def half(name: str, at_latents: str) -> torch.nn.ModuleDict:
        part = f"VAE {name}"
        wanted = {k: v for k, v in weights.items() if k.startswith((f"{name}.", f"{at_latents}."))}

        def modules() -> torch.nn.Module:
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=LATENT_CHANNELS,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
            return torch.nn.ModuleDict({part: getattr(vae, part) for part in (name, at_latents)})

        return _build(modules, _floats(wanted, part, path), part, path).to(device)

    decoder = half("decoder", "post_quant_conv")
    encoder = functools.cache(lambda: half("encoder", "quant_conv"))  # few workflows need it

    def encode(image: torch.Tensor) -> torch.Tensor:
        parts = encoder()
        mean, _log_variance = parts["quant_conv"](parts["encoder"](image)).chunk(2, dim=1)
        return mean / scale

    return VAE(
        decode=lambda latent: decoder["decoder"](decoder["post_quant_conv"](latent * scale)),
        encode=encode,
    )


# --------------------------------------------------------------------------- single file


def _scalar(weights: Weights, key: str, default: float, path: Path) -> float:
    value = weights.get(key)
    if value is None:
        return default
    number = to_float(value, key, path)
    if number.numel() != 1 or not is_finite(number):
        raise HostError(f"{path.name}: {key} of the VAE should be one finite number.")
    return number.item()


def _load_single_file(path: Path, device: torch.device) -> SD1Checkpoint:
    tensors = read_safetensors(path)
    _refuse_other_families(tensors, path)

    ldm = _select(tensors, sd1_names.UNET_PREFIX)
    names = sd1_names.unet_to_diffusers(ldm)
    unet = _build_unet({names[key]: value for key, value in ldm.items()}, path)

    text: Weights = {}
    for prefix in sd1_names.TEXT_PREFIXES:
        text = text or _select(tensors, prefix)
    text_model, text_weights = _build_text_model(text, path)
    _refuse_small_text_model(text_model, path)

    vae = _select(tensors, sd1_names.VAE_PREFIX)
    tiny = _select(vae, "taesd_decoder.")
    if tiny:
        scale, shift = _scalar(vae, "vae_scale", 1.0, path), _scalar(vae, "vae_shift", 0.0, path)
        tiny = {sd1_names.tiny_decoder_to_diffusers(key): value for key, value in tiny.items()}
        encoder = _select(vae, "taesd_encoder.")
        tiny |= {f"encoder.layers.{key}": value for key, value in encoder.items()}
        decoder = _build_tiny_vae(tiny, path, scale, shift, device)
    elif vae:
        decoder = _build_stock_vae(vae, path, 1.0, device)
    else:
        raise HostError(f"{path.name} has no VAE; use a checkpoint with the VAE baked in.")

    return SD1Checkpoint(
        unet=unet.to(device),
        unet_names={diffusers: ldm_name for ldm_name, diffusers in names.items()},
        text_model=text_model.to(device),
        text_weights=text_weights,
        tokenizer=clip_bpe.make_tokenizer(),
        vae=decoder,
    )


# --------------------------------------------------------------------------- diffusers folder


def _part_file(folder: Path, part: str, stem: str) -> Path:
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / part / name).is_file():
            return folder / part / name
    raise HostError(
        f"{folder} is no complete diffusers folder: {part}/{stem}.safetensors is missing."
    )


def _config(folder: Path, file: str) -> dict:
    path = folder / file
    if not path.is_file():
        return {}
    try:
        config = json.loads(read_text(path))
    except HostError:
        raise
    except (ValueError, RecursionError) as error:
        raise HostError(f"{path} cannot be read as JSON ({brief(error)}).") from error
    if not isinstance(config, dict):
        raise HostError(f"{path} should hold a JSON object.")
    return config


def _number(config: dict, key: str, default: float, folder: Path) -> float:
    value = config.get(key, default)
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if number == 0 or not math.isfinite(number) or not math.isfinite(1 / number):
        raise HostError(
            f"{folder}: {key} in a config.json should be a number other than 0, "
            f"not {brief(repr(value))}."
        )
    return number


def _folder_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """The folder's own vocabulary when it has one (fine-tunes add words), else the standard one.

    rows: how many tokens the text encoder knows.
    """
    vocabulary_file, merges_file = (
        folder / "tokenizer" / "vocab.json",
        folder / "tokenizer" / "merges.txt",
    )
    if not (vocabulary_file.is_file() and merges_file.is_file()):
        return clip_bpe.make_tokenizer()
    vocabulary = _config(folder, "tokenizer/vocab.json")
    lines = read_text(merges_file).splitlines()
    merges = [
        tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")
    ]
    try:
        tokenizer = clip_bpe.make_tokenizer(vocabulary, merges)
    except Exception as error:
        raise HostError(
            f"The tokenizer files in {folder / 'tokenizer'} are damaged ({brief(repr(error))})."
        ) from error
    if max(vocabulary.values()) >= rows:
        raise HostError(
            f"The vocabulary in {folder / 'tokenizer'} numbers its tokens up to "
            f"{max(vocabulary.values())}, but the text encoder knows {rows}: these files belong to "
            "different models."
        )
    return tokenizer


def _load_folder(folder: Path, device: torch.device) -> SD1Checkpoint:
    unet_file = _part_file(folder, "unet", "diffusion_pytorch_model")
    prediction = _config(folder, "scheduler/scheduler_config.json").get(
        "prediction_type", "epsilon"
    )
    if prediction != "epsilon":
        raise HostError(
            f"{folder.name} is a model with {brief(prediction)}; "
            f"{WHAT_WORKS} with noise prediction."
        )
    weights = read_safetensors(unet_file)
    _refuse_wrong_unet(
        _channels_in(weights.get("conv_in.weight")), _context_width(weights), unet_file
    )
    unet = _build_unet(weights, unet_file)

    text_file = _part_file(folder, "text_encoder", "model")
    text_model, text_weights = _build_text_model(read_safetensors(text_file), text_file)
    _refuse_small_text_model(text_model, text_file)

    vae_file = _part_file(folder, "vae", "diffusion_pytorch_model")
    vae = read_safetensors(vae_file)
    config = _config(folder, "vae/config.json")
    if any(key.startswith("decoder.layers.") for key in vae):
        scale = LATENT_SCALE / _number(config, "scaling_factor", 1.0, folder)
        decoder = _build_tiny_vae(vae, vae_file, scale, 0.0, device)
    else:
        scale = LATENT_SCALE / _number(config, "scaling_factor", LATENT_SCALE, folder)
        decoder = _build_stock_vae(vae, vae_file, scale, device)

    return SD1Checkpoint(
        unet=unet.to(device),
        unet_names=sd1_names.unet_to_ldm(weights),
        text_model=text_model.to(device),
        text_weights=text_weights,
        tokenizer=_folder_tokenizer(folder, text_model.config.vocab_size),
        vae=decoder,
    )
