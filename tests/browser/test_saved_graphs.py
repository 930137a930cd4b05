# SPDX-License-Identifier: Apache-2.0
"""Graphs from before a widget was there keep what they did; new nodes get the default."""

from __future__ import annotations

from comfy_server import Server
from test_page import run_script


def test_widgets_newer_than_the_graph_stand_for_how_things_were(
    chromium: str, page_server: Server
) -> None:
    seen = run_script(chromium, "saved_graphs.mjs", page_server.url("/"), "LacunaAttentionRefine")
    new = {"retain_set": "small", "where": "prompts that name it"}
    before = {"retain_set": "none", "where": "every prompt"}
    for name in new:
        assert seen["fresh"][name] == new[name]
        assert seen["old"][name] == before[name]
    assert seen["again"] == seen["fresh"]
    assert {k: v for k, v in seen["old"].items() if k not in new} == {
        k: v for k, v in seen["fresh"].items() if k not in new
    }
