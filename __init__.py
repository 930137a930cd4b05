# SPDX-License-Identifier: Apache-2.0
"""Lacuna: concept erasure for diffusion models. ComfyUI imports this folder as a node pack."""

import importlib.util
import logging

# Help pages of the nodes, web/docs/<node id>.md, and what keeps saved graphs as they were.
WEB_DIRECTORY = "./web"

# Test runners and packaging tools import this file, too, where there is no ComfyUI.
if importlib.util.find_spec("comfy_api"):
    from .python_shim.comfyui_nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
else:
    logging.getLogger(__name__).info("No ComfyUI 0.3.64 or newer here: no nodes are loaded.")
