# SPDX-License-Identifier: Apache-2.0
"""The help of every node, opened in ComfyUI's own panel."""

from __future__ import annotations

import json

from comfy_server import REPOSITORY, Server
from test_page import SCREENSHOTS, run_script


def test_every_help_page_is_rendered_whole(chromium: str, page_server: Server) -> None:
    text = (REPOSITORY / "python_shim" / "node_schemas.json").read_text("utf-8")
    nodes = [schema["id"] for schema in json.loads(text)]
    old = page_server.checkout.version.startswith("0.3.")
    prefix = SCREENSHOTS / ("help_old_" if old else "help_")
    seen = run_script(chromium, "help.mjs", page_server.url("/"), prefix, *nodes)
    assert set(seen) == set(nodes)
    for node, panel in seen.items():
        assert panel["rows"] > 3 and all(panel["pictures"]), node
        assert panel["raw"] == [], node
        # The older page opens its panel 200 pixels wide, to be widened: words are longer than that.
        assert old or panel["cut"] == [], node
