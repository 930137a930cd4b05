# SPDX-License-Identifier: Apache-2.0
"""Names that ComfyUI imports at start; on the path only when torchaudio does not import."""

from . import functional, transforms

__all__ = ["functional", "transforms"]
