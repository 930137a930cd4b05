# SPDX-License-Identifier: Apache-2.0
"""Without a native module that fits, the nodes are still there and say what to do."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import Checkout, Rejected, Server, copy_pack
from graphs import Builder

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture(scope="module")
def crippled(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The pack in a folder as unpacked from an archive, with a module for another torch only; were
    it opened, it would fail to load."""
    folder = tmp_path_factory.mktemp(f"degraded-{checkout.name}")
    pack = copy_pack(folder / "lacuna")
    (pack / "python_shim" / f"_lacuna_t299{SUFFIX}").write_bytes(b"\x7fELF not a module")
    server = Server(checkout, folder / "base", pack=pack, pack_name="lacuna-main")
    server.start()
    yield server
    server.stop()


def test_the_nodes_appear(crippled: Server, schemas: list[dict]) -> None:
    listed = crippled.get("/object_info")
    assert all(schema["id"] in listed for schema in schemas)
    assert crippled.log().count("Lacuna's native module is missing") == 1  # one line, no traceback


def test_the_sentence_arrives_and_the_server_lives(crippled: Server, schemas: list[dict]) -> None:
    build = Builder(schemas)
    preview = {"p": {"class_type": "PreviewAny", "inputs": {"source": ["set", 1]}}}
    for _ in range(2):
        with pytest.raises(Rejected) as refused:
            crippled.queue(build.concepts() | preview)
        (sentence,) = refused.value.sentences()
        assert "native module is missing" in sentence
        assert "torch 2.99 on Python" in sentence  # what is there
        assert "build_module.py --into" in sentence  # what to do
    assert crippled.get("/system_stats")


def test_no_foreign_module_was_opened(crippled: Server) -> None:
    maps = Path(f"/proc/{crippled.pid}/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    assert "libtorch" in maps.read_text() and "_lacuna_t" not in maps.read_text()
