# SPDX-License-Identifier: Apache-2.0
"""Read a LoRA file (kohya naming, or the names that ComfyUI saves) for an SD1.x UNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .errors import HostError
from .sd1_checkpoint import is_finite, read_safetensors, to_float

# A change of one weight matrix: (name, up [out, r], down [r, in]) or (name, difference, None)
Delta = tuple[str, torch.Tensor, torch.Tensor | None]

_SUFFIXES = (".lora_up.weight", ".lora_down.weight", ".alpha", ".diff")
_TEXT_PREFIXES = ("lora_te", "text_encoder.", "clip_l.")


def module_names(unet_names: Mapping[str, str]) -> dict[str, str]:
    """Every name under which LoRA files know a UNet module -> the host's weight name."""
    names: dict[str, str] = {}
    for diffusers, ldm in unet_names.items():
        if not diffusers.endswith(".weight"):
            continue
        weight = f"diffusion_model.{ldm}"
        for path in (diffusers, ldm):
            names["lora_unet_" + path.removesuffix(".weight").replace(".", "_")] = weight
        names[weight.removesuffix(".weight")] = weight
    return names


def read_lora(
    path: Path, unet_names: Mapping[str, str], shapes: Mapping[str, torch.Size]
) -> list[Delta]:
    tensors = read_safetensors(path)
    text_keys = [key for key in tensors if key.startswith(_TEXT_PREFIXES)]
    if text_keys:
        raise HostError(
            f"{path.name} also changes the text encoder ({text_keys[0]}), and the headless host "
            "applies LoRAs to the UNet only; use it in ComfyUI, or save it without that part."
        )
    known = module_names(unet_names)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    unmatched = []
    for key, value in tensors.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        weight = known.get(key.removesuffix(suffix)) if suffix else None
        if weight is None:
            unmatched.append(key)
        else:
            if value.numel() == 0:
                raise HostError(
                    f"{path.name}: {key} is empty, a LoRA of rank 0; train or save it again."
                )
            modules.setdefault(weight, {})[suffix] = to_float(value, key, path)
    if unmatched:
        more = f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else ""
        raise HostError(
            f"{path.name} does not fit this SD1.x model: no place for "
            f"{', '.join(sorted(unmatched)[:5])}{more}."
        )
    if not modules:
        raise HostError(f"{path.name} holds no LoRA weights.")
    deltas = [delta for name, parts in modules.items() for delta in _deltas(path, name, parts)]
    for name, up, down in deltas:
        _check(path, name, up, down, shapes[name])
    return deltas


def _deltas(path: Path, name: str, parts: dict[str, torch.Tensor]) -> list[Delta]:
    out: list[Delta] = []
    up, down = parts.get(".lora_up.weight"), parts.get(".lora_down.weight")
    if (up is None) != (down is None):
        raise HostError(f"{path.name} is incomplete: {name} has only one of lora_up and lora_down.")
    if up is not None and down is not None:
        if (
            min(up.dim(), down.dim()) < 2
            or up.shape[1] != down.shape[0]
            or up.flatten(1).shape[1] != up.shape[1]
        ):
            raise HostError(
                f"{path.name}: lora_up {list(up.shape)} and lora_down {list(down.shape)} "
                f"of {name} do not fit together."
            )
        rank = down.shape[0]
        alpha = parts.get(".alpha")
        if alpha is not None and alpha.numel() != 1:
            raise HostError(f"{path.name}: alpha of {name} should be one number.")
        scale = float(alpha) / rank if alpha is not None else 1.0
        out.append((name, up.flatten(1) * scale, down.flatten(1)))
    elif ".alpha" in parts and ".diff" not in parts:
        raise HostError(f"{path.name} is incomplete: {name} has an alpha but no weights.")
    if ".diff" in parts:
        out.append((name, parts[".diff"], None))
    return out


def _check(
    path: Path, name: str, up: torch.Tensor, down: torch.Tensor | None, shape: torch.Size
) -> None:
    rows, columns = shape[0], shape.numel() // shape[0]
    fits = up.shape == shape if down is None else (up.shape[0], down.shape[1]) == (rows, columns)
    if not fits:
        raise HostError(
            f"{path.name} was made for another model: {name} has the shape {list(shape)} here."
        )
    if not all(is_finite(part) for part in (up, down) if part is not None):
        raise HostError(f"{path.name} holds NaN or infinite numbers ({name}); the file is broken.")
