# SPDX-License-Identifier: Apache-2.0
"""The ComfyUI host: MODEL, CLIP and progress bar as the interfaces that the native module calls.

The only file that imports ComfyUI's services. Everything runs under torch.inference_mode(), and
nothing here changes a weight in place: a MODEL is edited by `clone()` plus patches, which the host
merges and undoes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import SDXL, SDXLRefiner, Stable_Zero123, SVD_img2vid
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from server import PromptServer

from .errors import HostError
from .fingerprint import fingerprint

log = logging.getLogger(__name__)

Delta = tuple[str, torch.Tensor, torch.Tensor | None]

_FAMILIES = {"SD15": "SD1.x", "SD20": "SD2.x", "SDXL": "SDXL", "SDXLRefiner": "SDXL refiner"}
_CROSS_ATTENTION = re.compile(
    r"diffusion_model\.(?:input_blocks\.\d+|middle_block|output_blocks\.\d+)\.1"
    r"\.transformer_blocks\.\d+\.attn2\.to_([kv])\.weight"
)
_READ_AN_IMAGE = (SVD_img2vid, Stable_Zero123)  # instead of a text, in their cross-attention
_NOT_THE_TEXT_TRANSFORMER = ("text_projection", "logit_scale", "position_ids")
_PLAIN_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    *(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)),
}

# Hashing weights takes a second; a loaded model never changes its base weights.
_fingerprints: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


def _base_fingerprint(
    module: torch.nn.Module, base_weights: Callable[[], Iterable[torch.Tensor]]
) -> str:
    if module not in _fingerprints:
        _fingerprints[module] = fingerprint(base_weights())
    return _fingerprints[module]


def _is_plain(weight: torch.Tensor) -> bool:
    """Stored as ordinary numbers, not packed, quantised, or kept on no device."""
    ordinary = type(weight) in (torch.Tensor, torch.nn.Parameter) and not weight.is_meta
    return ordinary and weight.dtype in _PLAIN_DTYPES


def _converted(weight: torch.Tensor, convert: Callable[..., torch.Tensor]) -> torch.Tensor:
    # A real copy: the conversion and the patches that follow work in place.
    copy = comfy.model_management.cast_to_device(weight, weight.device, torch.float32, copy=True)
    return convert(copy, inplace=True)


def _describe(value: object) -> str:
    """A stable text for what a patch holds; TypeError for code and all else that has no value."""
    if isinstance(value, torch.Tensor):
        return fingerprint([value])
    if isinstance(value, WeightAdapterBase):
        return f"{type(value).__name__}{_describe(value.weights)}"
    if isinstance(value, tuple | list):
        return "(" + ",".join(_describe(item) for item in value) + ")"
    if isinstance(value, dict):
        return _describe(sorted(value.items()))
    if value is None or isinstance(value, str | int | float | bool):
        return repr(value)
    raise TypeError(type(value).__name__)


class ComfyTextEncoder:
    """A CLIP as the user connected it: with its LoRAs and its clip skip."""

    def __init__(self, clip: Any) -> None:
        self._clip = clip

    @cached_property
    def window(self) -> int:
        return len(next(iter(self._chunks("").values()))[0])

    @cached_property
    def width(self) -> int:
        return self.encode([""]).shape[-1]

    @cached_property
    def cache_directory(self) -> str:
        folder = os.path.join(folder_paths.get_user_directory(), "lacuna")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            log.warning("Lacuna keeps no text statistics on disk: %s", error)
            return ""
        return folder

    @cached_property
    def fingerprint(self) -> str:
        patcher = self._clip.patcher
        base = _base_fingerprint(patcher.model, self._base_weights)
        if self._clip.layer_idx is None and not patcher.patches:
            return base
        try:
            patches = sorted((key, _describe(value)) for key, value in patcher.patches.items())
        except TypeError as error:
            log.info("Text statistics are not cached: unknown patch on the CLIP (%s)", error)
            return ""
        state = hashlib.sha256(f"{self._clip.layer_idx} {patches}".encode()).hexdigest()
        return f"{base}-{state[:16]}"

    def _base_weights(self) -> list[torch.Tensor]:
        patches = self._clip.patcher.get_key_patches()
        return [
            _converted(*entry[0]) if _is_plain(entry[0][0]) else entry[0][0].dequantize()
            for key, entry in patches.items()
            if entry[0][0].is_floating_point()
            and not any(part in key for part in _NOT_THE_TEXT_TRANSFORMER)
        ]

    def _chunks(self, text: str) -> dict[str, list[list[tuple[Any, ...]]]]:
        if "embedding:" in text:
            raise HostError(
                f'"{text}" asks for a textual inversion embedding, and Lacuna reads plain words: '
                "say it in words."
            )
        return self._clip.tokenize(text, disable_weights=True)

    def _rows(self, text: str) -> list[list[int]]:
        chunks = self._chunks(text)
        # SDXL has two token lists; their positions agree.
        chosen = chunks["l"] if "l" in chunks else next(iter(chunks.values()))
        return [[int(entry[0]) for entry in chunk] for chunk in chosen]

    def tokenize(self, text: str) -> list[int]:
        start, end = self._rows("")[0][:2]
        content = [token for row in self._rows(text) for token in row[1 : row.index(end, 1)]]
        return [start, *content, end]

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        if not prompts:
            return torch.zeros(0, self.window, self.width)
        # The host encodes the 77-token chunks of a prompt as independent rows: a batch for us.
        batch: dict[str, list[Any]] = {}
        for prompt in prompts:
            for name, chunks in self._chunks(prompt).items():
                if len(chunks) > 1:
                    log.warning("A prompt is cut to the text encoder's window: %s", prompt)
                batch.setdefault(name, []).append(chunks[0])
        encoded = self._clip.encode_from_tokens(batch)
        expected = len(prompts) * self.window
        if encoded.dim() != 3 or encoded.shape[0] != 1 or encoded.shape[1] != expected:
            kind = type(self._clip.cond_stage_model).__name__
            raise HostError(
                f"Text encoder {kind} is not supported: connect the CLIP of an SD1.x, SD2.x or "
                "SDXL checkpoint."
            )
        return encoded.reshape(len(prompts), self.window, encoded.shape[-1]).float()


class ComfyDenoiser:
    """A MODEL; `with_…` return a new one that shares its base weights."""

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self._snapshot: tuple[Any, dict[str, list[Any]]] = (None, {})

    @property
    def family(self) -> str:
        name = type(self.patcher.model.model_config).__name__
        return _FAMILIES.get(name, name)

    @cached_property
    def _names(self) -> list[str]:
        model = self.patcher.model
        if not isinstance(model.diffusion_model, UNetModel) or isinstance(model, _READ_AN_IMAGE):
            return []
        return [name for name in model.state_dict() if _CROSS_ATTENTION.fullmatch(name)]

    def cross_attention(self) -> list[tuple[str, str, str]]:
        return [
            (name, self._lora_names.get(name, _kohya(name)), "key" if ".to_k." in name else "value")
            for name in self._names
        ]

    @cached_property
    def _lora_names(self) -> dict[str, str]:
        """SD1.x and SD2.x LoRAs use diffusers' block names, SDXL ones those of the checkpoint."""
        model = self.patcher.model
        if isinstance(model, SDXL | SDXLRefiner):
            return {}
        names = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
        return {f"diffusion_model.{ldm}": _kohya(diffusers) for diffusers, ldm in names.items()}

    @cached_property
    def patchable(self) -> bool:
        return all(_is_plain(self._patches(name)[0][0]) for name in self._names)

    @cached_property
    def fingerprint(self) -> str:
        def base_weights() -> list[torch.Tensor]:
            stored = [(name, self._patches(name)[0]) for name in self._names]
            return [_converted(*w) if _is_plain(w[0]) else self._probe(name) for name, w in stored]

        return _base_fingerprint(self.patcher.model, base_weights)

    def _patches(self, name: str) -> list[Any]:
        """[(pristine weight, conversion to numbers), patch, ...], loaded or not."""
        # Collecting them walks through the whole model, so that it is done once per load state.
        state = (self.patcher.patches_uuid, self.patcher.model.current_weight_patches_uuid)
        if self._snapshot[0] != state:
            self._snapshot = (state, self.patcher.get_key_patches("diffusion_model."))
        return self._snapshot[1][name]

    def effective_weight(self, name: str) -> torch.Tensor:
        entry = self._patches(name)
        if not _is_plain(entry[0][0]) or self.patcher.injections:
            return self._probe(name)
        return comfy.lora.calculate_weight(entry[1:], _converted(*entry[0]), name)

    def _probe(self, name: str) -> torch.Tensor:
        """What the layer does to an identity: right for any storage format or injected change."""
        comfy.model_management.load_models_gpu([self.patcher])
        module = comfy.utils.get_attr(self.patcher.model, name.removesuffix(".weight"))
        width = self.patcher.model.model_config.unet_config["context_dim"]
        return module(torch.eye(width, device=self.patcher.load_device)).float().T.contiguous()

    def with_weight_deltas(self, deltas: Sequence[Delta], strength: float) -> ComfyDenoiser:
        patcher = self.patcher.clone()
        if strength == 0.0:  # no patch at all, so that the images stay the same to the last bit
            return ComfyDenoiser(patcher)
        patches: dict[str, Any] = {}
        for name, up, down in deltas:
            if down is None:
                patches[name] = ("diff", (up.detach().cpu(),))
            else:
                low_rank = (up.detach().cpu(), down.detach().cpu(), None, None, None, None)
                patches[name] = LoRAAdapter({name}, low_rank)
        missing = patches.keys() - set(patcher.add_patches(patches, strength))
        if missing:  # the host drops unknown keys without a word
            raise HostError(f"The model has no weight named {min(missing)}; nothing was changed.")
        return ComfyDenoiser(patcher)

    def with_context_map(
        self, key_delta: torch.Tensor | None, value_delta: torch.Tensor | None, strength: float
    ) -> ComfyDenoiser:
        patcher = self.patcher.clone()
        if strength != 0.0:
            patcher.set_model_attn2_patch(_context_patch(key_delta, value_delta, strength))
        return ComfyDenoiser(patcher)


def _kohya(name: str) -> str:
    module = name.removeprefix("diffusion_model.").removesuffix(".weight")
    return "lora_unet_" + module.replace(".", "_")


def _context_patch(
    key_delta: torch.Tensor | None, value_delta: torch.Tensor | None, strength: float
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A plain function: the host may deep-copy a patch object, and moves one that has a `.to`."""
    deltas = [
        None if delta is None else (strength * delta.detach().float()).cpu()
        for delta in (key_delta, value_delta)
    ]
    on_device: dict[torch.device, list[torch.Tensor | None]] = {}
    # All layers of a step get the same two tensors: map them once.
    last: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def mapped(embedding: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        if delta is None:
            return embedding
        wide = embedding.float()
        return (wide + wide @ delta.T).to(embedding.dtype)

    def patch(
        n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, _options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        known = last.get(context.device)
        if known is None or known[0] is not context or known[1] is not value:
            key_map, value_map = on_device.setdefault(
                context.device, [None if d is None else d.to(context.device) for d in deltas]
            )
            known = (context, value, mapped(context, key_map), mapped(value, value_map))
            last[context.device] = known
        return n, known[2], known[3]

    return patch


def output_directory() -> str:
    return folder_paths.get_output_directory()


def show_text(node_id: str, text: str) -> None:
    """Write below the node; `ui.text` alone is not drawn on a pack's nodes."""
    PromptServer.instance.send_progress_text(text, node_id)


class ComfyProgress:
    """The node's progress bar, and the user's Cancel button."""

    _INTERVAL = 0.1

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown = 0.0

    def report(self, done: int, total: int) -> None:
        self.check()  # the bar itself looks for an interrupt only now and then
        now = time.monotonic()
        if done < total and now - self._shown < self._INTERVAL:
            return
        self._shown = now
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
