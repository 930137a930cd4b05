# SPDX-License-Identifier: Apache-2.0
"""The ComfyUI host: MODEL, CLIP, pictures and progress bar as the native module calls them.

Only the comfyui_*.py files import ComfyUI's services. Everything in them runs under
torch.inference_mode() unless the core trains.
"""

from __future__ import annotations

import math
import time
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image
from server import PromptServer

from .autograd import leave_inference_mode
from .comfyui_model import ComfyDenoiser
from .comfyui_text import ComfyTextEncoder
from .detector import SafeDetector
from .errors import HostError

__all__ = [
    "ComfyDenoiser",
    "ComfyImageDecoder",
    "ComfyImageEncoder",
    "ComfyProgress",
    "ComfyTextEncoder",
    "detector",
    "input_directory",
    "output_directory",
    "show_text",
]


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
