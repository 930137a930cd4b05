# SPDX-License-Identifier: Apache-2.0
"""A ComfyUI CLIP as the text encoder that the native module calls."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import folder_paths
import torch
from comfy.clip_model import CLIPEncoder
from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.weight_adapter import WeightAdapterBase

from .autograd import leave_inference_mode
from .comfyui_weights import base_identity, converted, is_plain
from .errors import HostError
from .fingerprint import Identity, fingerprint
from .text_gate import NamedMap
from .vocabulary import whole_words

log = logging.getLogger(__name__)

_NOT_THE_TEXT_TRANSFORMER = ("text_projection", "logit_scale", "position_ids")
_ENCODE = "encode_token_weights"  # of a CLIP's model, which a patch of ours may stand in for


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
        return base_identity(self._clip.patcher.model, self._base_weights)

    def _base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for key, entry in self._clip.patcher.get_key_patches().items():
            weight = entry[0][0]
            if not weight.is_floating_point() or any(
                part in key for part in _NOT_THE_TEXT_TRANSFORMER
            ):
                continue
            name = key.replace(".transformer.text_model.", ".")
            yield name, converted(*entry[0]) if is_plain(weight) else weight.dequantize()

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
