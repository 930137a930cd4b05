# SPDX-License-Identifier: Apache-2.0
"""ComfyUI node classes, generated from the schemas that the native module declares."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_api.v0_0_2 import ComfyExtension, io, ui

from . import comfyui_host, loader

log = logging.getLogger(__name__)

JSON = dict[str, Any]

_STANDARD_TYPES = {
    "BOOLEAN": io.Boolean,
    "CLIP": io.Clip,
    "CLIP_VISION": io.ClipVision,
    "COMBO": io.Combo,
    "FLOAT": io.Float,
    "IMAGE": io.Image,
    "INT": io.Int,
    "MASK": io.Mask,
    "MODEL": io.Model,
    "STRING": io.String,
    "VAE": io.Vae,
}
_INPUT_ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "CLIP": comfyui_host.ComfyTextEncoder,
    "CLIP_VISION": comfyui_host.ComfyImageEncoder,
    "LACUNA_DETECTOR": comfyui_host.detector,
    "MODEL": comfyui_host.ComfyDenoiser,
    "VAE": comfyui_host.ComfyImageDecoder,
}
_OUTPUT_ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "CLIP": lambda encoder: encoder.clip,
    "MODEL": lambda denoiser: denoiser.patcher,
}

_WIDGET_TYPES = ("STRING", "COMBO", "BOOLEAN", "INT", "FLOAT")


@functools.cache
def _pack() -> Any:
    """Owns the nodes and their caches, for the life of the process."""
    return loader.load().NodePack(comfyui_host.output_directory(), comfyui_host.input_directory())


def _schemas() -> list[JSON]:
    try:
        return json.loads(_pack().schemas())
    except loader.NativeUnavailable as error:
        # The nodes still appear, so that nobody's workflow loses them, and say what is missing.
        log.warning("Lacuna: %s", error)
        return json.loads(Path(__file__).with_name("node_schemas.json").read_text("utf-8"))


def _known(function: Callable[..., Any], values: JSON) -> JSON:
    """Only what this version of ComfyUI understands."""
    accepted = inspect.signature(function).parameters
    return {key: value for key, value in values.items() if key in accepted}


def _as_it_is(value: Any) -> Any:
    return value


def _type(name: str) -> Any:
    return _STANDARD_TYPES.get(name) or io.Custom(name)


def _input(spec: JSON) -> Any:
    kind = _type(spec["type"]).Input
    made = kind(**_known(kind.__init__, {k: v for k, v in spec.items() if k != "type"}))
    if "saved" in spec:  # for web/saved_graphs.js
        made.extra_dict = {**made.extra_dict, "saved": spec["saved"]}
    return made


def _output(spec: JSON) -> Any:
    # Without an id: ComfyUI 0.3 refuses an output named like an input.
    return _type(spec["type"]).Output(
        display_name=spec["display_name"], tooltip=spec.get("tooltip")
    )


def _has_report(spec: JSON) -> bool:
    return any(item["id"] == "report" for item in spec["outputs"])


def _schema(spec: JSON) -> io.Schema:
    values = {
        "node_id": spec["id"],
        "display_name": spec["display_name"],
        "description": spec["description"],
        "category": spec["category"],
        "search_aliases": spec["search_aliases"],
        "is_output_node": spec["output_node"],
        # Newer hosts then show the report again when the node comes from the cache.
        "has_intermediate_output": _has_report(spec),
        "inputs": [_input(item) for item in spec["inputs"]],
        "outputs": [_output(item) for item in spec["outputs"]],
        "hidden": [io.Hidden.unique_id],
    }
    if spec["output_node"]:
        values["hidden"] += [io.Hidden.prompt, io.Hidden.extra_pnginfo]
    return io.Schema(**_known(io.Schema, values))


def _validator(spec: JSON) -> classmethod:
    def validate_inputs(_cls: type, **constants: Any) -> bool:
        # An error is raised, not returned: ComfyUI would repeat it for each input of the signature.
        # A link comes as None: its value is not known yet, and judged when the node runs.
        given = {name: value for name, value in constants.items() if value is not None}
        _pack().validate(spec["id"], given)
        return True

    names = [item["id"] for item in spec["inputs"] if item["type"] in _WIDGET_TYPES]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    validate_inputs.__signature__ = inspect.Signature(
        [inspect.Parameter(name, positional) for name in ["cls", *names]]
    )
    return classmethod(validate_inputs)


def _file_state(spec: JSON) -> classmethod:
    def fingerprint_inputs(_cls: type, **constants: Any) -> str:
        # ComfyUI runs the node again when this changes, e.g. because the file was replaced.
        given = {name: value for name, value in constants.items() if value is not None}
        return _pack().outside_state(spec["id"], given)

    return classmethod(fingerprint_inputs)


def _widget_texts(hidden: Any) -> dict[str, str]:
    """What %Node.widget% in the name of a file stands for; the page fills it in for ComfyUI's own
    savers only. A node goes by its "name for search and replace", else by its title."""
    prompt = hidden.prompt or {}
    page = (hidden.extra_pnginfo or {}).get("workflow") or {}
    renamed = {
        str(node.get("id")): (node.get("properties") or {}).get("Node name for S&R")
        for node in page.get("nodes") or []
    }
    names = [{key: renamed.get(key) or node["class_type"] for key, node in prompt.items()}]
    names.append({key: (node.get("_meta") or {}).get("title") for key, node in prompt.items()})
    texts: dict[str, str] = {}
    for name_of in names:
        for key, node in prompt.items():
            for widget, value in node.get("inputs", {}).items():
                if isinstance(value, str | int | float):  # what is linked is not known here
                    texts.setdefault(f"{name_of[key]}.{widget}", _as_the_page_writes(value))
    return texts


def _as_the_page_writes(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _executor(spec: JSON) -> classmethod:
    input_types = {item["id"]: item["type"] for item in spec["inputs"]}

    def execute(cls: Any, **values: Any) -> io.NodeOutput:
        inputs = {
            name: _INPUT_ADAPTERS.get(input_types[name], _as_it_is)(value)
            for name, value in values.items()
            if value is not None
        }
        progress = comfyui_host.ComfyProgress(cls.hidden.unique_id)
        widgets = _widget_texts(cls.hidden) if spec["output_node"] else {}
        results = _pack().run(spec["id"], inputs, progress, widgets)
        adapted, shown = [], {}
        for item, result in zip(spec["outputs"], results, strict=True):
            if item["id"] == "report":
                comfyui_host.show_text(cls.hidden.unique_id, result)
                shown["text"] = [result]
            elif item["id"] == "sheet":
                shown |= ui.PreviewImage(result, cls=cls).as_dict()
            adapted.append(_OUTPUT_ADAPTERS.get(item["type"], _as_it_is)(result))
        return io.NodeOutput(*adapted, ui=shown or None)

    return classmethod(execute)


def _node_class(spec: JSON) -> type[io.ComfyNode]:
    body = {
        "__module__": __name__,
        "__doc__": spec["description"],
        "define_schema": classmethod(lambda cls: _schema(spec)),
        "validate_inputs": _validator(spec),
        "execute": _executor(spec),
    }
    if spec["reads_files"]:
        body["fingerprint_inputs"] = _file_state(spec)
    return type(spec["id"], (io.ComfyNode,), body)


class LacunaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [_node_class(spec) for spec in _schemas()]


async def comfy_entrypoint() -> ComfyExtension:
    return LacunaExtension()
