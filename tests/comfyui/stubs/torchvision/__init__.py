# SPDX-License-Identifier: Apache-2.0
"""Names that ComfyUI imports at start; on the path only when torchvision does not import."""

from . import ops, transforms

__all__ = ["ops", "transforms"]
