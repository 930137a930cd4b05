# SPDX-License-Identifier: Apache-2.0
"""A ComfyUI MODEL as the denoiser that the native module calls.

Nothing here changes a weight in place: a MODEL is edited by `clone()` plus patches, which the host
merges and undoes.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
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
from comfy.weight_adapter import LoRAAdapter

from .autograd import (
    call_with_weights,
    gradients_wanted,
    keep_gradient,
    leave_inference_mode,
    usable_for_autograd,
)
from .comfyui_edits import InputMapWrapper, TextMapAdapter
from .comfyui_weights import base_identity, converted, is_plain
from .errors import HostError
from .fingerprint import Identity
from .input_map import InputMap, acts_on
from .text_gate import GateParts, TextGate

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
_APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
_WRAPPER_KEY = "lacuna"
_READ_AN_IMAGE = (SVD_img2vid, Stable_Zero123)  # instead of a text, in their cross-attention
# Draw nothing without a picture to begin with, so that there is nothing to train on or to judge.
_BEGIN_WITH_A_PICTURE = {
    SDXLRefiner: "an SDXL refiner, which only finishes what the base model has begun",
    SD_X4Upscaler: "an upscaler",
    Lotus: "an estimator of depth or normals",
}


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
        return all(is_plain(self._patches(name)[0][0]) for name in self._names)

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
        return base_identity(self.patcher.model, self._base_weights)

    def _base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, lora_name, _ in self.cross_attention():
            stored = self._patches(name)[0]
            yield lora_name, converted(*stored) if is_plain(stored[0]) else self._probe(name)

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
        if not is_plain(entry[0][0]) or self.patcher.injections:
            return self._probe(name)
        return comfy.lora.calculate_weight(entry[1:], converted(*entry[0]), name)

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
                name: TextMapAdapter({name}, (*shared, (first, columns)))
                for name, first, columns in entries
            }
            patcher.add_patches(patches, strength)
        return ComfyDenoiser(patcher)

    def with_input_maps(
        self,
        maps: Sequence[TextMap],
        strength: float,
        gate: GateParts | None = None,
        deltas: Sequence[Delta] = (),
    ) -> ComfyDenoiser:
        patcher = self.patcher.clone()
        for entries, out, inner in maps if strength != 0.0 else ():
            self._require([name for name, _, _ in entries])
            edit = InputMap(entries, out, inner, strength, gate and TextGate(*gate), deltas)
            patcher.add_wrapper_with_key(
                _APPLY_MODEL,
                _WRAPPER_KEY,
                InputMapWrapper(edit),
            )
        return ComfyDenoiser(patcher)

    def acts_on(self, context: torch.Tensor) -> torch.Tensor | None:
        wrappers = self.patcher.get_wrappers(_APPLY_MODEL, _WRAPPER_KEY)
        return acts_on((each.edit for each in wrappers), context)

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
                if is_plain(parameter)
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
