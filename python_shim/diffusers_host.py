# SPDX-License-Identifier: Apache-2.0
"""The headless host: SD1.x models on transformers and diffusers, for runs without ComfyUI."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from . import clip_bpe, lora_file, sampling, sd1_checkpoint
from .autograd import (
    call_with_weights,
    gradients_wanted,
    keep_gradient,
    usable_for_autograd,
)
from .errors import HostError, brief
from .fingerprint import Identity, identify
from .input_map import InputMap, acts_on
from .lora_file import Delta
from .sd1_checkpoint import LATENT_CHANNELS, LATENT_SCALE, PIXELS_PER_LATENT
from .text_gate import GateParts, NamedMap, TextGate
from .vocabulary import whole_words

log = logging.getLogger(__name__)

Tap = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
# (weight, first column, columns; 0: all) that read x, and x <- x + strength * x @ (out @ inner).T;
# out alone when inner is None
TextMap = tuple[list[tuple[str, int, int]], torch.Tensor, torch.Tensor | None]


class DiffusersTextEncoder:
    """CLIP-L as SD1.x uses it: literal text, end-token padding, last layer after the final norm."""

    def __init__(self, checkpoint: sd1_checkpoint.SD1Checkpoint, cache_directory: str) -> None:
        self._model = checkpoint.text_model
        self._weights = checkpoint.text_weights
        self._tokenizer = checkpoint.tokenizer
        self.width: int = self._model.config.hidden_size
        self.window: int = self._model.config.max_position_embeddings
        self.cache_directory = cache_directory
        self._maps: tuple[NamedMap, ...] = ()

    @property
    def fingerprint(self) -> str:
        return self._identity.fingerprint

    @property
    def weight_samples(self) -> dict[str, list[float]]:
        return self._identity.samples

    @cached_property
    def _identity(self) -> Identity:
        return identify((f"clip_l.{name}", weight) for name, weight in self._weights.items())

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def vocabulary(self) -> list[str]:
        words = clip_bpe.vocabulary_and_merges()[0]
        return whole_words(words, self._model.get_input_embeddings())

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        return self.encode_start(prompts, self.window)

    def encode_start(self, prompts: Sequence[str], length: int) -> torch.Tensor:
        """The first positions, which do not depend on the ones behind."""
        if not prompts:
            return torch.zeros(0, length, self.width)
        rows = [self._window(self.tokenize(prompt))[:length] for prompt in prompts]
        ids = torch.tensor(rows, device=next(self._model.parameters()).device)
        with torch.no_grad():
            return self._model(input_ids=ids).last_hidden_state.float().cpu()

    def embed(self, prompts: Sequence[str]) -> tuple[torch.Tensor, None]:
        return self.encode(prompts), None

    def with_map(
        self,
        out: torch.Tensor,
        inner: torch.Tensor | None,
        strength: float,
        phrases: Sequence[str],
    ) -> DiffusersTextEncoder:
        mapped = copy.copy(self)
        mapped._maps += (NamedMap(out, inner, strength, phrases),)
        return mapped

    def conditioning(self, prompts: Sequence[str]) -> torch.Tensor:
        text = self.encode(prompts)
        for each in self._maps:
            rows = zip(text, prompts, strict=True)
            text = torch.stack([each(row, [prompt]) for row, prompt in rows])
        return text

    def _window(self, ids: list[int]) -> list[int]:
        if len(ids) > self.window:
            log.warning(
                "A prompt of %d tokens is cut to the text encoder's %d.", len(ids), self.window
            )
            ids = ids[: self.window - 1]
        return ids + [clip_bpe.END_ID] * (self.window - len(ids))


@dataclass(frozen=True)
class _Change:
    """W <- W + strength * left @ right, or of_weight: W + strength * W @ left @ right."""

    name: str
    left: torch.Tensor
    right: torch.Tensor | None
    strength: float
    of_weight: bool = False

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        change = weight @ self.left.to(weight) if self.of_weight else self.left.to(weight)
        if self.right is not None:
            change = change @ self.right.to(weight)
        return self.strength * change.reshape(weight.shape)


class _LastAttentionSeen(BaseException):
    """Ends a forward pass; no `except Exception` on the way out should see it."""


class _TappedAttention:
    """The attention processor of one text cross-attention layer during one forward pass."""

    def __init__(self, layer: str, tap: Tap, stop: bool) -> None:
        self._layer, self._tap, self._stop = layer, tap, stop

    def __call__(
        self,
        attention: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query = attention.to_q(hidden_states)
        key = attention.to_k(encoder_hidden_states)
        value = attention.to_v(encoder_hidden_states)
        attended = self._tap(self._layer, query, key, value, attention.heads)
        if self._stop:
            raise _LastAttentionSeen
        project, dropout = attention.to_out
        return dropout(project(attended.to(query.dtype)))


def _execution_order(name: str) -> int:
    """The middle block runs before the up blocks, and is listed after them."""
    return ("down_blocks", "mid_block", "up_blocks").index(name.split(".")[0])


class _SharedUNet:
    """The base model under any number of denoiser views; its weight storage is never written."""

    def __init__(self, unet: torch.nn.Module, unet_names: dict[str, str]) -> None:
        self.unet = unet
        self.diffusers_names = unet_names
        self.module_names = {f"diffusion_model.{ldm}": name for name, ldm in unet_names.items()}
        parameters = dict(unet.named_parameters())
        self.weights = {
            f"diffusion_model.{ldm}": parameters[name] for name, ldm in unet_names.items()
        }
        self.lock = threading.RLock()
        self.cross_attention: list[tuple[str, str, str]] = []
        self.layers: dict[str, torch.nn.Module] = {}  # by common weight name, as they run
        self.merged: tuple[object, dict[str, torch.Tensor]] = ((), {})
        attentions = [item for item in unet.named_modules() if ".attn2" in item[0]]
        for path, module in sorted(attentions, key=lambda item: _execution_order(item[0])):
            for ending, role in ((".attn2.to_k", "key"), (".attn2.to_v", "value")):
                if path.endswith(ending):
                    lora_name = "lora_unet_" + path.replace(".", "_")
                    self.cross_attention.append(
                        (f"diffusion_model.{unet_names[path + '.weight']}", lora_name, role)
                    )
            if path.endswith(".attn2"):
                name = f"diffusion_model.{unet_names[path + '.to_k.weight']}"
                self.layers[name.removesuffix(".to_k.weight")] = module

    @cached_property
    def identity(self) -> Identity:
        return identify((lora, self.weights[name]) for name, lora, _ in self.cross_attention)


@dataclass(frozen=True)
class DiffusersDenoiser:
    """An immutable view of a UNet: shared base weights and changes that are merged for sampling."""

    _base: _SharedUNet
    _changes: tuple[_Change, ...] = ()
    _input_maps: tuple[InputMap, ...] = ()

    family = "SD1.x"
    patchable = True
    revision = ""  # one graph, one run: nothing is asked for twice

    @property
    def fingerprint(self) -> str:
        return self._base.identity.fingerprint

    @property
    def weight_samples(self) -> dict[str, list[float]]:
        return self._base.identity.samples

    def cross_attention(self) -> list[tuple[str, str, str]]:
        return list(self._base.cross_attention)

    def text_entries(self) -> list[tuple[str, str, str, str, int, int]]:
        """What reads text: weight, LoRA name, role, stream, first column and columns (0: all)."""
        return [(*each, "context", 0, 0) for each in self.cross_attention()]

    def weight_names(self) -> dict[str, torch.Size]:
        """Every weight that a LoRA may change, with its shape."""
        return {name: weight.shape for name, weight in self._base.weights.items()}

    def effective_weight(self, name: str) -> torch.Tensor:
        with torch.no_grad():
            weight = self._weight(name).detach().float().clone()
            for change in self._changes:
                if change.name == name:
                    weight += change.of(weight)
        return weight

    def with_weight_deltas(self, deltas: Sequence[Delta], strength: float) -> DiffusersDenoiser:
        for name, up, down in deltas:
            shape = self._weight(name).shape
            rows, columns = shape[0], shape.numel() // shape[0]
            found = (
                (up.shape[0], up.numel() // max(up.shape[0], 1))
                if down is None
                else (up.shape[0], down.shape[1])
            )
            if found != (rows, columns) or (down is not None and up.shape[1] != down.shape[0]):
                raise HostError(
                    f"A weight change for {name} does not have its shape {list(shape)}."
                )
        if strength == 0.0 or not deltas:
            return self
        added = tuple(
            _Change(name, up.detach(), None if down is None else down.detach(), float(strength))
            for name, up, down in deltas
        )
        return replace(self, _changes=self._changes + added)

    def with_weight_maps(self, maps: Sequence[TextMap], strength: float) -> DiffusersDenoiser:
        self._check(maps)
        if strength == 0.0:
            return self
        added = tuple(
            _Change(
                name,
                out.detach(),
                None if inner is None else inner.detach(),
                float(strength),
                of_weight=True,
            )
            for entries, out, inner in maps
            for name, _, _ in entries
        )
        return replace(self, _changes=self._changes + added)

    def with_input_maps(
        self,
        maps: Sequence[TextMap],
        strength: float,
        gate: GateParts | None = None,
        deltas: Sequence[Delta] = (),
    ) -> DiffusersDenoiser:
        self._check(maps)
        if strength == 0.0:
            return self
        opens = gate and TextGate(*gate)
        added = [
            InputMap(entries, out, inner, float(strength), opens, deltas)
            for entries, out, inner in maps
        ]
        return replace(self, _input_maps=(*self._input_maps, *added))

    def acts_on(self, context: torch.Tensor) -> torch.Tensor | None:
        return acts_on(self._input_maps, context)

    def _check(self, maps: Sequence[TextMap]) -> None:
        for entries, out, inner in maps:
            reads = (out if inner is None else inner).shape[-1]
            for name, _, _ in entries:  # SD1.x: text fills every column of what reads it
                width = self._weight(name).shape[-1]
                if (out.shape[0], reads) != (width, width):
                    raise HostError(
                        f"A map of what {name} reads should be {width} x {width}, "
                        f"not {out.shape[0]} x {reads}."
                    )

    def sample(
        self,
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        scheduler: str,
        positive: torch.Tensor,
        negative: torch.Tensor,
        latent: torch.Tensor,
        denoise: float,
        on_step: sampling.OnStep,
    ) -> torch.Tensor:
        """Same noise, levels and steps as ComfyUI's KSampler; latents divided by 0.18215."""
        if latent.dim() != 4 or latent.shape[1] != LATENT_CHANNELS:
            raise HostError(
                f"SD1.x needs a latent of {LATENT_CHANNELS} channels, "
                f"not of shape {list(latent.shape)}."
            )
        if sampler not in sampling.SAMPLERS:
            sampling.run_sampler(
                sampler, latent, latent, lambda x, sigma: x, on_step
            )  # raises its sentence
        schedule = sampling.NoiseSchedule()
        sigmas = sampling.make_sigmas(schedule, scheduler, steps, denoise)
        if not len(sigmas):
            return latent.clone()
        unet = self._base.unet
        device = next(unet.parameters()).device
        guided = cfg != 1.0
        with torch.no_grad(), self._base.lock, self._inputs_mapped():
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(latent.shape, generator=generator)
            starts_at_full_noise = abs(float(sigmas[0]) / float(schedule.sigmas[-1]) - 1.0) < 1e-5
            spread = (1.0 + sigmas[0] ** 2).sqrt() if starts_at_full_noise else sigmas[0]
            x = (noise * spread + latent.float().cpu() * LATENT_SCALE).to(device)
            contexts = [positive, negative] if guided else [positive]
            context = _stack_contexts(contexts, latent.shape[0]).to(device)

            def clean_estimate(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                scaled = x / (sigma**2 + 1.0) ** 0.5
                time = schedule.timestep(sigma).to(device)
                batch = torch.cat([scaled] * len(contexts))
                noise = call_with_weights(unet, self._merged(), batch, time, context).sample
                if not guided:
                    return x - sigma * noise
                with_prompt, without = noise.chunk(2)
                return x - sigma * (without + cfg * (with_prompt - without))

            # the levels stay on the CPU: scalars mix with any device
            x = sampling.run_sampler(sampler, x, sigmas, clean_estimate, on_step)
        return (x / LATENT_SCALE).float().cpu()

    @property
    def noise_levels(self) -> torch.Tensor:
        return sampling.NoiseSchedule().sigmas

    def latent_shape(self, width: int, height: int) -> list[int]:
        return [LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT]

    def to_host_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / LATENT_SCALE

    def from_host_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return latent * LATENT_SCALE

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
        unet = self._base.unet
        device = next(unet.parameters()).device
        with self._base.lock, self._inputs_mapped(), self._tapped(tap, attention_only):
            weights = dict(self._merged())
            if gradients_wanted():
                weights |= {
                    name: usable_for_autograd(weights.get(name, parameter))
                    for name, parameter in unet.named_parameters()
                    if name in weights or parameter.is_inference() or parameter.requires_grad
                }
                noisy, sigma, context = map(keep_gradient, (noisy, sigma, context))
            noisy, context = noisy.to(device), context.to(device)
            time = sampling.NoiseSchedule().timestep(sigma.reshape(-1, 1)).to(device)
            level = sigma.to(device).reshape(-1, 1, 1, 1)
            scaled = noisy / (level**2 + 1.0) ** 0.5
            try:
                noise = call_with_weights(unet, weights, scaled, time, context).sample
            except _LastAttentionSeen:
                return None
        return (noisy - level * noise).float()

    def _weight(self, name: str) -> torch.nn.Parameter:
        weight = self._base.weights.get(name)
        if weight is None:
            raise HostError(f"This model has no weight named {name}.")
        return weight

    def _merged(self) -> dict[str, torch.Tensor]:
        """The changed weights by their name in the module.

        They take the place of the base weights for one call at a time, and are kept until another
        view needs its own: training runs many passes through one view.
        """
        if self._base.merged[0] is not self._changes:
            self._base.merged = ((), {})  # two sets at a time would not fit every machine
            with torch.inference_mode(False):  # of use to any later pass
                merged = {
                    self._base.module_names[name]: self.effective_weight(name).to(
                        self._weight(name).dtype
                    )
                    for name in dict.fromkeys(change.name for change in self._changes)
                }
            self._base.merged = (self._changes, merged)
        return self._base.merged[1]

    @contextlib.contextmanager
    def _inputs_mapped(self) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for each in self._input_maps:
                paths = {
                    name: self._base.module_names[name].removesuffix(".weight")
                    for name in each.names
                }
                hooks.enter_context(
                    each.hooked(
                        {name: self._base.unet.get_submodule(path) for name, path in paths.items()}
                    )
                )
            yield

    @contextlib.contextmanager
    def _tapped(self, tap: Tap | None, attention_only: bool) -> Iterator[None]:
        layers = {} if tap is None else self._base.layers
        last = next(reversed(layers), None)
        originals = [(module, module.processor) for module in layers.values()]
        try:
            for layer, module in layers.items():
                stop = attention_only and layer == last
                module.processor = _TappedAttention(layer, tap, stop)
            yield
        finally:
            for module, processor in originals:
                module.processor = processor


def _stack_contexts(contexts: list[torch.Tensor], batch: int) -> torch.Tensor:
    """[len(contexts) * batch, T, d]; contexts of unequal length are repeated, as in ComfyUI."""
    length = torch.tensor([context.shape[1] for context in contexts])
    common = int(torch.lcm(length[0], length[-1]))
    rows = []
    for context in contexts:
        context = context.float().cpu().repeat(1, common // context.shape[1], 1)
        if batch % context.shape[0]:
            raise HostError(f"{context.shape[0]} prompts do not fit a batch of {batch} images.")
        rows.append(context.repeat(batch // context.shape[0], 1, 1))
    return torch.cat(rows)


class DiffusersImageDecoder:
    def __init__(self, checkpoint: sd1_checkpoint.SD1Checkpoint, device: torch.device) -> None:
        self._vae = checkpoint.vae
        self._device = device

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[n, H, W, 3] in 0..1; image by image, because a decoder needs more memory than a UNet."""
        if latent.dim() != 4 or latent.shape[1] != LATENT_CHANNELS:
            raise HostError(
                f"The VAE needs a latent of {LATENT_CHANNELS} channels, "
                f"not of shape {list(latent.shape)}."
            )
        with torch.no_grad():
            images = [
                self._vae.decode(one.unsqueeze(0).float().to(self._device)).float().cpu()
                for one in latent
            ]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The centre of what the encoder finds possible, as in ComfyUI; sides cut to whole latents,
        evenly on both ends."""
        if images.dim() != 4 or images.shape[-1] < 3:
            raise HostError(
                f"The VAE needs pictures [n, H, W, 3], not a tensor of shape {list(images.shape)}."
            )
        height, width = (
            PIXELS_PER_LATENT * (side // PIXELS_PER_LATENT) for side in images.shape[1:3]
        )
        top, left = (
            (side - kept) // 2
            for side, kept in zip(images.shape[1:3], (height, width), strict=True)
        )
        images = images[:, top : top + height, left : left + width, :3].permute(0, 3, 1, 2)
        with torch.no_grad():
            latents = [
                self._vae.encode(2 * one.unsqueeze(0).float().to(self._device) - 1).float().cpu()
                for one in images
            ]
        latent = torch.cat(latents)
        if not bool(latent.any()):  # a VAE that was cut down to its decoder
            raise HostError(
                "This checkpoint's VAE can only decode; use one that can read pictures, too."
            )
        return latent


class DiffusersHost:
    """What the graph runner asks for: files by name, and the folders to write to."""

    def __init__(
        self,
        checkpoint: str | Path,
        output_directory: str | Path = "output",
        lora_directory: str | Path | None = None,
        cache_directory: str | Path | None = None,
        device: str = "cpu",
    ) -> None:
        self._checkpoint = _path(checkpoint)
        if not self._checkpoint.exists():
            raise HostError(
                f"There is no checkpoint {self._checkpoint}; give a .safetensors file or a folder."
            )
        self._lora_directory = None if lora_directory is None else _path(lora_directory)
        self._device = _device(device)
        self._loaded: dict[
            Path, tuple[DiffusersDenoiser, DiffusersTextEncoder, DiffusersImageDecoder]
        ] = {}
        self.output_directory = str(_path(output_directory))
        self.cache_directory = str(
            _default_cache() if cache_directory is None else _path(cache_directory)
        )

    def load_checkpoint(
        self, name: str
    ) -> tuple[DiffusersDenoiser, DiffusersTextEncoder, DiffusersImageDecoder]:
        path = self._checkpoint_path(name)
        if path not in self._loaded:
            if name and Path(name).name != path.name:
                log.info("The workflow names the checkpoint %s; using %s.", name, path)
            checkpoint = sd1_checkpoint.load(path, self._device)
            self._loaded[path] = (
                DiffusersDenoiser(_SharedUNet(checkpoint.unet, checkpoint.unet_names)),
                DiffusersTextEncoder(checkpoint, self.cache_directory),
                DiffusersImageDecoder(checkpoint, self._device),
            )
        return self._loaded[path]

    def load_lora(self, model: DiffusersDenoiser, name: str, strength: float) -> DiffusersDenoiser:
        if self._lora_directory is None:
            raise HostError(
                f'The workflow loads the LoRA "{name}"; say where LoRAs are with --lora-dir.'
            )
        path = _inside(self._lora_directory, name)
        deltas = lora_file.read_lora(path, model._base.diffusers_names, model.weight_names())
        return model.with_weight_deltas(deltas, strength)

    def _checkpoint_path(self, name: str) -> Path:
        """The given model, whatever the workflow says; in a folder of models its name counts."""
        if self._checkpoint.is_file() or (self._checkpoint / "unet").is_dir():
            return self._checkpoint
        return _inside(self._checkpoint, name)


def _path(name: str | Path) -> Path:
    """With ~ expanded; refuses what no file system takes."""
    try:
        path = Path(name).expanduser()
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:
        raise HostError(f"{brief(name)} cannot be used as a path ({brief(error)}).") from error
    return path


def _inside(folder: Path, name: str) -> Path:
    path = _path(folder / name.replace("\\", "/"))  # workflows saved on Windows
    if not path.resolve().is_relative_to(folder.resolve()):
        raise HostError(f'"{name}" points outside the folder {folder}.')
    if not name or not path.exists():
        raise HostError(f'There is no "{name}" in the folder {folder}.')
    return path


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise HostError(
            "This PyTorch finds no CUDA device; use --device cpu or install PyTorch with CUDA."
        )
    return torch.device(name)


def _default_cache() -> Path:
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lacuna"
