# SPDX-License-Identifier: Apache-2.0
"""The ComfyUI host: MODEL, CLIP and progress bar as the interfaces that the native module calls.

The only file that imports ComfyUI's services. Everything runs under torch.inference_mode() unless
the core trains, and nothing here changes a weight in place: a MODEL is edited by `clone()` plus
patches, which the host merges and undoes.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import folder_paths
import torch
from comfy.clip_model import CLIPEncoder
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import (
    SDXL,
    Lotus,
    SD_X4Upscaler,
    SDXLRefiner,
    Stable_Zero123,
    SVD_img2vid,
)
from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from PIL import Image
from server import PromptServer

from .autograd import (
    call_with_weights,
    gradients_wanted,
    keep_gradient,
    leave_inference_mode,
    usable_for_autograd,
)
from .detector import SafeDetector
from .errors import HostError
from .fingerprint import Identity, fingerprint, identify
from .text_gate import GateParts, NamedMap, TextGate, change_of, mapped_where
from .vocabulary import whole_words

log = logging.getLogger(__name__)

Delta = tuple[str, torch.Tensor, torch.Tensor | None]
# (weight, first column, columns; 0: all) that read x, and x <- x + strength * x @ (out @ inner).T;
# out alone when inner is None
TextMap = tuple[list[tuple[str, int, int]], torch.Tensor, torch.Tensor | None]
Tap = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]

_FAMILIES = {"SD15": "SD1.x", "SD20": "SD2.x", "SDXL": "SDXL", "SDXLRefiner": "SDXL refiner"}
_POOLED = "diffusion_model.label_emb.0.0.weight"
_CROSS_ATTENTION = re.compile(
    r"(diffusion_model\.(input|middle|output)_blocks?(?:\.(\d+))?\.1"
    r"\.transformer_blocks\.(\d+)\.attn2)\.to_([kv])\.weight"
)
_PIXELS_PER_LATENT = 8
_TRAINING_STEPS = 1000
_READ_AN_IMAGE = (SVD_img2vid, Stable_Zero123)  # instead of a text, in their cross-attention
# Draw nothing without a picture to begin with, so that there is nothing to train on or to judge.
_BEGIN_WITH_A_PICTURE = {
    SDXLRefiner: "an SDXL refiner, which only finishes what the base model has begun",
    SD_X4Upscaler: "an upscaler",
    Lotus: "an estimator of depth or normals",
}
_NOT_THE_TEXT_TRANSFORMER = ("text_projection", "logit_scale", "position_ids")
_PLAIN_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    *(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)),
}

# Hashing weights takes a second; a loaded model never changes its base weights.
_identities: weakref.WeakKeyDictionary[torch.nn.Module, Identity] = weakref.WeakKeyDictionary()


def _base_identity(
    module: torch.nn.Module, base_weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]
) -> Identity:
    if module not in _identities:
        _identities[module] = identify(base_weights())
    return _identities[module]


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


_ENCODE = "encode_token_weights"  # of a CLIP's model, which a patch of ours may stand in for


class _NamedPrompts:
    """Stands in for a text encoder's `encode_token_weights`: maps prompts that name a concept."""

    def __init__(self, encode: Callable[..., Any], said: Callable[..., list[str]], named: NamedMap):
        self.encode = encode
        self._said = said
        self._named = named

    def __call__(self, tokens: dict[str, Any]) -> tuple[Any, ...]:
        context, *rest = self.encode(tokens)
        return (self._named(context, self._said(tokens)), *rest)


def _without_maps(clip: Any) -> Any:
    encode = clip.patcher.object_patches.get(_ENCODE)
    if not isinstance(encode, _NamedPrompts):
        return clip
    while isinstance(encode, _NamedPrompts):
        encode = encode.encode
    plain = clip.clone()
    plain.patcher.add_object_patch(_ENCODE, encode)
    return plain


class ComfyTextEncoder:
    """A CLIP as the user connected it: with its LoRAs and its clip skip. Lacuna reads what it makes
    of prompts before any map of ours."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self._clip = _without_maps(clip)

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
        base = self._identity.fingerprint
        if self._clip.layer_idx is None and not patcher.patches:
            return base
        try:
            patches = sorted((key, _describe(value)) for key, value in patcher.patches.items())
        except TypeError as error:
            log.info("Text statistics are not cached: unknown patch on the CLIP (%s)", error)
            return ""
        state = hashlib.sha256(f"{self._clip.layer_idx} {patches}".encode()).hexdigest()
        return f"{base}-{state[:16]}"

    @property
    def weight_samples(self) -> dict[str, list[float]]:
        return self._identity.samples

    @property
    def _identity(self) -> Identity:
        return _base_identity(self._clip.patcher.model, self._base_weights)

    def _base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for key, entry in self._clip.patcher.get_key_patches().items():
            weight = entry[0][0]
            if not weight.is_floating_point() or any(
                part in key for part in _NOT_THE_TEXT_TRANSFORMER
            ):
                continue
            name = key.replace(".transformer.text_model.", ".")
            yield name, _converted(*entry[0]) if _is_plain(weight) else weight.dequantize()

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

    def vocabulary(self) -> list[str]:
        """Whole words of CLIP's vocabulary; SDXL's two tokenizers share it."""
        tokenizer = self._tokenizer
        encoders = self._clip.cond_stage_model.modules()
        encoder = next((each for each in encoders if isinstance(each, SDClipModel)), None)
        if tokenizer is None or encoder is None:
            return []
        embedding = encoder.transformer.get_input_embeddings()
        return whole_words(tokenizer.tokenizer.get_vocab(), embedding)

    @property
    def _tokenizer(self) -> SDTokenizer | None:
        """The first of CLIP's kind."""
        tokenizers = vars(self._clip.tokenizer).values()
        return next((each for each in tokenizers if isinstance(each, SDTokenizer)), None)

    def with_map(
        self,
        out: torch.Tensor,
        inner: torch.Tensor | None,
        strength: float,
        phrases: Sequence[str],
    ) -> ComfyTextEncoder | None:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return None
        # Start, end and padding of each list.
        silent = {name: {entry[0] for entry in rows[0]} for name, rows in self._chunks("").items()}

        def said(tokens: dict[str, Any]) -> list[str]:
            """By each token list of SDXL, in all chunks; an embedding parts what is being said."""
            prompts = []
            for name in tokens.keys() & silent.keys():
                ids = [entry[0] for chunk in tokens[name] for entry in chunk]
                read = [
                    tokenizer.inv_vocab.get(token, "") if isinstance(token, int) else "|</w>"
                    for token in ids
                    if not isinstance(token, int) or token not in silent[name]
                ]
                text = tokenizer.tokenizer.convert_tokens_to_string(read)
                prompts.append(text.replace("</w>", " "))
            return prompts

        clip = self.clip.clone()
        named = NamedMap(out, inner, strength, phrases)
        before = clip.patcher.get_model_object(_ENCODE)
        clip.patcher.add_object_patch(_ENCODE, _NamedPrompts(before, said, named))
        return ComfyTextEncoder(clip)

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        if not prompts:
            return torch.zeros(0, self.window, self.width)
        return self._encode(self._batch(prompts), len(prompts))

    def encode_start(self, prompts: Sequence[str], length: int) -> torch.Tensor:
        with _cut(self._clip.cond_stage_model, length, self.window):
            return self.encode(prompts)[:, :length]

    def embed(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Of the encoders known here only SDXL's large one has a pooled vector that is used.
        if "g" not in self._chunks(""):
            return self.encode(prompts), None
        if not prompts:
            return self.encode(prompts), torch.zeros(0, self.embed([""])[1].shape[-1])
        # Of a batch, the host returns the pooled vector of the first row only.
        seen: list[torch.Tensor] = []
        hook = self._clip.cond_stage_model.clip_g.register_forward_hook(
            lambda _module, _inputs, outputs: seen.append(outputs[1])
        )
        try:
            context = self.encode(prompts)
        finally:
            hook.remove()
        pooled = seen[0].to(context.device)
        return context, leave_inference_mode(pooled).float()

    def _batch(self, prompts: Sequence[str]) -> dict[str, list[Any]]:
        # The host encodes the 77-token chunks of a prompt as independent rows: a batch for us.
        batch: dict[str, list[Any]] = {}
        for prompt in prompts:
            for name, chunk in self._first_chunks(prompt).items():
                batch.setdefault(name, []).append(chunk)
        return batch

    def _first_chunks(self, prompt: str) -> dict[str, Any]:
        chunks = self._chunks(prompt)
        if any(len(rows) > 1 for rows in chunks.values()):
            log.warning("A prompt is cut to the text encoder's window: %s", prompt)
        return {name: rows[0] for name, rows in chunks.items()}

    def _encode(self, batch: dict[str, list[Any]], count: int) -> torch.Tensor:
        with torch.inference_mode():
            encoded = self._clip.encode_from_tokens(batch)
        expected = count * self.window
        if encoded.dim() != 3 or encoded.shape[0] != 1 or encoded.shape[1] != expected:
            kind = type(self._clip.cond_stage_model).__name__
            raise HostError(
                f"Text encoder {kind} is not supported: connect the CLIP of an SD1.x, SD2.x or "
                "SDXL checkpoint."
            )
        encoded = leave_inference_mode(encoded)
        return encoded.reshape(count, self.window, encoded.shape[-1]).float()


@contextmanager
def _cut(text_encoder: torch.nn.Module, length: int, window: int) -> Iterator[None]:
    """CLIP computes the first positions only, which do not depend on the others; zeros behind."""

    def shorten(
        _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        mask = options.get("mask")
        if mask is not None:
            options = {**options, "mask": mask[..., :length, :length]}
        return (inputs[0][:, :length], *inputs[1:]), options

    def fill(
        _module: torch.nn.Module,
        _inputs: tuple[torch.Tensor, ...],
        outputs: tuple[torch.Tensor | None, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        missing = (0, 0, 0, window - length)
        return tuple(
            None if rows is None else torch.nn.functional.pad(rows, missing) for rows in outputs
        )

    encoders = [m for m in text_encoder.modules() if isinstance(m, CLIPEncoder)]
    hooks = []
    try:
        for encoder in encoders:
            hooks.append(encoder.register_forward_pre_hook(shorten, with_kwargs=True))
            hooks.append(encoder.register_forward_hook(fill))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class ComfyDenoiser:
    """A MODEL; `with_…` return a new one that shares its base weights."""

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self._runner = patcher  # what is loaded for forward passes
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

    def text_entries(self) -> list[tuple[str, str, str, str, int, int]]:
        """What reads text: weight, LoRA name, role, stream, first column and columns (0: all)."""
        entries = [(*each, "context", 0, 0) for each in self.cross_attention()]
        model = self.patcher.model
        if entries and isinstance(model, SDXL):
            # [pooled vector, sizes]; the refiner's is refused before
            weight = model.state_dict()[_POOLED]
            sizes = 6 * model.embedder.dim
            entries.append(
                (_POOLED, _kohya(_POOLED), "input", "pooled", 0, weight.shape[1] - sizes)
            )
        return entries

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

    @property
    def fingerprint(self) -> str:
        return self._identity.fingerprint

    @property
    def revision(self) -> str:
        return str(self.patcher.patches_uuid)  # another one with every patch, and every load

    @property
    def weight_samples(self) -> dict[str, list[float]]:
        return self._identity.samples

    @property
    def _identity(self) -> Identity:
        return _base_identity(self.patcher.model, self._base_weights)

    def _base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, lora_name, _ in self.cross_attention():
            stored = self._patches(name)[0]
            yield lora_name, _converted(*stored) if _is_plain(stored[0]) else self._probe(name)

    def _patches(self, name: str) -> list[Any]:
        """[(pristine weight, conversion to numbers), patch, ...], loaded or not."""
        # Collecting them walks through the whole model, so that it is done once per load state.
        state = (self.patcher.patches_uuid, self.patcher.model.current_weight_patches_uuid)
        if self._snapshot[0] != state:
            self._snapshot = (state, self.patcher.get_key_patches("diffusion_model."))
        return self._snapshot[1][name]

    @torch.no_grad()
    def effective_weight(self, name: str) -> torch.Tensor:
        entry = self._patches(name)
        if not _is_plain(entry[0][0]) or self.patcher.injections:
            return self._probe(name)
        return comfy.lora.calculate_weight(entry[1:], _converted(*entry[0]), name)

    def _probe(self, name: str) -> torch.Tensor:
        """What the layer does to an identity: right for any storage format or injected change."""
        self._load(self.patcher)
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

    def with_weight_maps(self, maps: Sequence[TextMap], strength: float) -> ComfyDenoiser:
        patcher = self.patcher.clone()
        if strength == 0.0:
            return ComfyDenoiser(patcher)
        for entries, out, inner in maps:
            self._require([name for name, _, _ in entries])
            shared = tuple(None if t is None else t.detach().cpu() for t in (out, inner))
            patches = {
                name: _TextMapAdapter({name}, (*shared, (first, columns)))
                for name, first, columns in entries
            }
            patcher.add_patches(patches, strength)
        return ComfyDenoiser(patcher)

    def with_input_maps(
        self, maps: Sequence[TextMap], strength: float, gate: GateParts | None = None
    ) -> ComfyDenoiser:
        patcher = self.patcher.clone()
        for entries, out, inner in maps if strength != 0.0 else ():
            self._require([name for name, _, _ in entries])
            patcher.add_wrapper_with_key(
                comfy.patcher_extension.WrappersMP.APPLY_MODEL,
                "lacuna",
                _InputMap(entries, out, inner, gate and TextGate(*gate), strength),
            )
        return ComfyDenoiser(patcher)

    def _require(self, names: Sequence[str]) -> None:
        missing = set(names) - set(self.patcher.model.state_dict())
        if missing:  # the host drops unknown keys without a word
            raise HostError(f"The model has no weight named {min(missing)}; nothing was changed.")

    # --- forward passes ---

    @cached_property
    def noise_levels(self) -> torch.Tensor:
        sampling = self.patcher.get_model_object("model_sampling")
        with torch.inference_mode():
            levels = sampling.sigmas
            if len(levels) != _TRAINING_STEPS:  # distilled models keep every n-th one
                levels = sampling.sigma(torch.arange(_TRAINING_STEPS, device=levels.device))
            levels = levels.detach().float().cpu()
        with torch.inference_mode(False):
            return levels.clone()

    def latent_shape(self, width: int, height: int) -> list[int]:
        self._check_draws_from_text()
        channels = self.patcher.model.latent_format.latent_channels
        return [channels, height // _PIXELS_PER_LATENT, width // _PIXELS_PER_LATENT]

    def _check_draws_from_text(self) -> None:
        model = self.patcher.model
        for kind, what in _BEGIN_WITH_A_PICTURE.items():
            if isinstance(model, kind):
                raise HostError(
                    f"This MODEL is {what}, and cannot draw from a text alone: connect a MODEL "
                    "that can (Attention Refine edits this one, too)."
                )
        if not isinstance(model.diffusion_model, UNetModel):
            return
        channels = model.latent_format.latent_channels
        latent = torch.zeros(1, channels, 8, 8)
        told = model.concat_cond(**_neutral_picture(latent))
        given = channels + (0 if told is None else told.shape[1])
        wanted = model.diffusion_model.in_channels
        if given != wanted:
            raise HostError(
                f"This MODEL reads {wanted} channels and ComfyUI gives it {given}, so that it "
                "cannot draw: connect a MODEL that KSampler can draw with."
            )

    def to_host_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return self.patcher.model.process_latent_out(latent)

    def from_host_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return self.patcher.model.process_latent_in(latent)

    def denoise(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor | None,
        tap: Tap | None,
        attention_only: bool,
    ) -> torch.Tensor | None:
        if attention_only and tap is None:
            return None  # nobody would see it
        train = gradients_wanted()
        if train and getattr(self._runner, "is_dynamic", bool)():
            self._runner = _without_dynamic_memory(self._runner)
        runner = self._runner
        self._load(runner, whole=train)
        model, device = runner.model, runner.load_device
        latent, noise_level, text = (
            keep_gradient(tensor.to(device)) for tensor in (noisy, sigma, context)
        )
        options = self._transformer_options(runner, noise_level, train)
        if tap is not None:
            options["patches_replace"] = self._with_tap(options, tap, attention_only)
        conditions = _conditions(model, latent, text, pooled)
        forward = _Forward(runner, options, conditions)
        weights: dict[str, torch.Tensor] = {}
        if train:
            weights = {
                f"model.{name}": usable_for_autograd(parameter)
                for name, parameter in model.named_parameters()
                if _is_plain(parameter)
            }
        before = model.current_patcher
        model.current_patcher = runner
        try:
            return call_with_weights(forward, weights, latent, noise_level).float()
        except _LastAttentionSeen:
            return None
        except RuntimeError as error:
            if train and "Inference tensors cannot be saved" in str(error):
                raise HostError(
                    "Another node's patch on this MODEL cannot be trained through (an adapter or a "
                    "LoRA in bypass mode, for example): connect the MODEL from before that node."
                ) from error
            raise
        finally:
            model.current_patcher = before

    @staticmethod
    def _load(patcher: Any, whole: bool = False) -> None:
        """As for sampling; `whole`: no part of it streamed in, whose buffer is used again before
        the backward pass needs it."""
        management = comfy.model_management
        loaded = any(entry.model is patcher for entry in management.current_loaded_models)
        merged = patcher.model.current_weight_patches_uuid == patcher.patches_uuid
        if not loaded or not merged or (whole and patcher.model.model_lowvram):
            with torch.inference_mode():  # where the host's own in-place updates are at home
                management.load_models_gpu([patcher], force_full_load=whole)

    def _transformer_options(self, runner: Any, sigma: torch.Tensor, train: bool) -> dict[str, Any]:
        """What the host's sampler hands to the model, in a copy of its own."""
        options = dict(runner.model_options.get("transformer_options", {}))
        merge = comfy.patcher_extension.merge_nested_dicts
        options["callbacks"] = merge(options.get("callbacks", {}), runner.callbacks)
        options["wrappers"] = {
            # Compiled for sampling, a model would be compiled once more for each pass with a tap.
            kind: {key: calls for key, calls in keyed.items() if key != "torch.compile"}
            for kind, keyed in merge(options.get("wrappers", {}), runner.wrappers).items()
        }
        options.update(cond_or_uncond=[0], uuids=[uuid.uuid4()], sigmas=sigma)
        # In training because other kinds have no backward pass; on a CPU because the host's choice
        # there takes twice as long for pictures of 512 pixels.
        if train or sigma.device.type == "cpu":
            options["optimized_attention_override"] = _plain_attention
        return options

    def _with_tap(
        self, options: dict[str, Any], tap: Tap, attention_only: bool
    ) -> dict[str, dict[Any, Any]]:
        replacements = options.get("patches_replace", {})
        if replacements.get("attn2"):
            raise HostError(
                "Another node replaces this MODEL's cross-attention (an IP-Adapter, for example): "
                "connect the MODEL from before that node."
            )
        layers = {
            match[1]: (match[2], int(match[3] or 0), int(match[4]))
            for match in map(_CROSS_ATTENTION.fullmatch, self._names)
        }
        last = next(reversed(layers), None)
        return {
            **replacements,
            "attn2": {
                block: _attention(layer, tap, stop=attention_only and layer == last)
                for layer, block in layers.items()
            },
        }


class _LastAttentionSeen(BaseException):
    """Ends a forward pass; no `except Exception` on the way out should see it."""


class _Forward(torch.nn.Module):
    """The host's own way from a noisy latent to a clean one, as a module around the model."""

    def __init__(self, runner: Any, options: dict[str, Any], conditions: dict[str, Any]) -> None:
        super().__init__()
        self.model = runner.model
        self._wrapper = runner.model_options.get("model_function_wrapper")
        self._conditions = {**conditions, "transformer_options": options}

    def forward(self, latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self._wrapper is None:
            return self.model.apply_model(latent, sigma, **self._conditions)
        call = {"input": latent, "timestep": sigma, "c": self._conditions, "cond_or_uncond": [0]}
        return self._wrapper(self.model.apply_model, call)


def _plain_attention(_chosen: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    return attention_pytorch(*args, **kwargs)


def _attention(layer: str, tap: Tap, stop: bool) -> Callable[..., torch.Tensor]:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        attended = tap(layer, query, key, value, options["n_heads"])
        if stop:
            raise _LastAttentionSeen
        return attended.to(query.dtype)

    return attend


def _conditions(
    model: Any, latent: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor | None
) -> dict[str, Any]:
    """Text, size and whatever else this type of model is told, as its sampler would."""
    count, _, height, width = latent.shape
    if isinstance(model, SDXL | SDXLRefiner) and pooled is None:
        raise HostError(
            "This MODEL is an SDXL model and the CLIP is not: connect both from one checkpoint."
        )
    told = model.extra_conds(
        cross_attn=context,
        pooled_output=None if pooled is None else leave_inference_mode(pooled.to(latent.device)),
        **_neutral_picture(latent),
        width=width * _PIXELS_PER_LATENT,
        height=height * _PIXELS_PER_LATENT,
    )
    processed = {
        name: condition.process_cond(batch_size=count, area=None).cond
        for name, condition in told.items()
    }
    return {
        name: keep_gradient(value) if isinstance(value, torch.Tensor) else value
        for name, value in processed.items()
    }


def _neutral_picture(latent: torch.Tensor) -> dict[str, Any]:
    """What the sampler knows of an empty latent: models that also read a picture (inpainting,
    instruct-pix2pix, unCLIP) then put their own blank in its place."""
    return {
        "noise": latent,
        "latent_image": torch.zeros_like(latent),
        "denoise_mask": None,
        "seed": 0,
        "device": latent.device,
        "prompt_type": "positive",
    }


def _without_dynamic_memory(patcher: Any) -> Any:
    """Newer hosts stream weights through memory that is used again before a backward pass."""
    try:
        with torch.inference_mode():
            return patcher.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise HostError(
            f"This MODEL cannot be loaded as a whole, which training needs ({error}): start "
            "ComfyUI with --disable-dynamic-vram."
        ) from error


def _kohya(name: str) -> str:
    module = name.removeprefix("diffusion_model.").removesuffix(".weight")
    return "lora_unet_" + module.replace(".", "_")


class _TextMapAdapter(WeightAdapterBase):
    """W <- W + strength * W @ delta in the columns that read text, one delta for all such weights.

    Merged by the host like a LoRA: on the weight's device, after the patches before it.
    """

    name = "lacuna_text_map"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights  # out, inner, (first column, columns; 0: all)

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[torch.Tensor], torch.Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        *factors, (first, columns) = self.weights
        reads = weight[:, first : first + columns] if columns else weight[:, first:]
        change = reads.float()  # in half precision the product would be worth less than the edit
        for factor in factors:
            if factor is not None:
                cast = comfy.model_management.cast_to_device(factor, weight.device, torch.float32)
                change = change @ cast
        reads += function((strength * change).to(weight.dtype))
        return weight


class _InputMap:
    """An APPLY_MODEL wrapper: the same edit on what the weights read, while the model runs."""

    def __init__(
        self,
        entries: Sequence[tuple[str, int, int]],
        out: torch.Tensor,
        inner: torch.Tensor | None,
        gate: TextGate | None,
        strength: float,
    ) -> None:
        self._gate = gate
        self._modules = [name.removesuffix(".weight") for name, _, _ in entries]
        self._first = entries[0][1]
        self._factors = [t.detach().float().cpu().T for t in (inner, out) if t is not None]
        self._strength = strength

    def __deepcopy__(self, memo: dict[int, Any]) -> _InputMap:
        return self  # never changes; older hosts copy what a MODEL carries with every clone

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen: list[torch.Tensor] = []  # all layers read one tensor, which is mapped once

        def mapped(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
            text = inputs[0]
            if not seen or seen[0] is not text:
                first, width = self._first, self._factors[0].shape[0]
                change = change_of(text[..., first : first + width].float(), self._factors)
                rest = text.shape[-1] - first - width
                change = torch.nn.functional.pad(self._strength * change, (first, rest))
                opened = None if self._gate is None else self._gate(text)
                changed = (text.float() + change).to(text.dtype)
                seen[:] = [text, mapped_where(text, changed, opened)]
            return (seen[1], *inputs[1:])

        model = executor.class_obj
        # A later edit is the first to see the text: W N1 N2, as for weights.
        hooks = [
            comfy.utils.get_attr(model, name).register_forward_pre_hook(mapped, prepend=True)
            for name in self._modules
        ]
        try:
            return executor(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()


class ComfyImageDecoder:
    """A VAE: latents as LATENT sockets carry them, pictures as IMAGE sockets do."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            images = self._vae.decode(latent).float().clamp(0.0, 1.0)
        if images.dim() != 4:
            raise HostError(
                "The VAE makes videos, and pictures are needed: connect the VAE of the checkpoint."
            )
        return leave_inference_mode(images)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            latent = self._vae.encode(images[..., :3]).float()
        if not bool(latent.any()):  # a VAE that was cut down to its decoder
            raise HostError("This VAE can only decode: connect a VAE that can read pictures, too.")
        return leave_inference_mode(latent)


class ComfyImageEncoder:
    """A CLIP_VISION."""

    def __init__(self, clip_vision: Any) -> None:
        self._clip_vision = clip_vision

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            embeddings = self._clip_vision.encode_image(images)["image_embeds"]
        if not torch.is_tensor(embeddings) or embeddings.dim() != 2:
            raise HostError(
                "This CLIP_VISION makes no embeddings of whole pictures: connect one of CLIP, "
                "or none."
            )
        return leave_inference_mode(embeddings).float()


def detector(connected: Any) -> SafeDetector:
    """A LACUNA_DETECTOR of another pack; the user's Cancel is not an error of its."""
    return SafeDetector(connected, (comfy.model_management.InterruptProcessingException,))


def output_directory() -> str:
    return folder_paths.get_output_directory()


def input_directory() -> str:
    return folder_paths.get_input_directory()


def show_text(node_id: str, text: str) -> None:
    """Write below the node; `ui.text` alone is not drawn on a pack's nodes."""
    PromptServer.instance.send_progress_text(text, node_id)


class ComfyProgress:
    """The node's progress bar, text and preview, and the user's Cancel button."""

    _BAR_SECONDS, _TEXT_SECONDS = 0.1, 0.5
    _PREVIEW_PIXELS = 512

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._bar: Any = None
        self._position = (0, 1)
        self._bar_moved = self._text_shown = -math.inf

    def report(self, done: int, total: int) -> None:
        self.check()  # the bar itself looks for an interrupt only now and then
        self._position = (done, total)
        now = time.monotonic()
        if done < total and now - self._bar_moved < self._BAR_SECONDS:
            return
        self._bar_moved = now
        self._move_bar(None)

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def status(self, line: str) -> None:
        now = time.monotonic()
        if now - self._text_shown >= self._TEXT_SECONDS:
            self._text_shown = now
            show_text(self._node_id, line)

    def preview(self, image: torch.Tensor) -> None:
        pixels = (255 * image.detach().float().clamp(0, 1)).round().to(torch.uint8).cpu().numpy()
        self._move_bar(("JPEG", Image.fromarray(pixels), self._PREVIEW_PIXELS))

    def _move_bar(self, preview: tuple[str, Image.Image, int] | None) -> None:
        done, total = self._position
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total, node_id=self._node_id)
        self._bar.update_absolute(done, total, preview)
