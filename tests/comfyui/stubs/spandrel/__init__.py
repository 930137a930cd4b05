# SPDX-License-Identifier: Apache-2.0
"""ComfyUI 0.3's page needs the node UpscaleModelLoader to exist before it opens any workflow."""


class ImageModelDescriptor:
    pass


class ModelLoader:
    def __init__(self, *_args: object, **_kwargs: object) -> None:
        raise RuntimeError("spandrel is not installed: this is the test suite's stand-in.")
