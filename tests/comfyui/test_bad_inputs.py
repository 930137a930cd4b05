# SPDX-License-Identifier: Apache-2.0
"""A mistake is told before anything is queued: HTTP 400, our sentence, once."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_server import Graph, Rejected, Server
from graphs import Builder


@pytest.fixture
def build(schemas: list[dict]) -> Builder:
    return Builder(schemas)


def _rejection(server: Server, graph: Graph, node: str) -> list[str]:
    with pytest.raises(Rejected) as refused:
        server.queue(graph)
    assert set(refused.value.answer["node_errors"]) == {node}
    return refused.value.sentences()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"concepts": ""}, ["concept"]),
        ({"concepts": "  \n# only a comment\n"}, ["concept"]),
        ({"concepts": "owl -> owl"}, ["owl", "anchor"]),
        ({"concepts": "owl", "default_anchor": "owl"}, ["owl", "anchor"]),
        ({"concepts": "owl -> tree\nOwl -> ship"}, ["owl"]),
        ({"concepts": "owl -> tree", "preserve": "ship\nowl"}, ["owl", "preserve"]),
        ({"concepts": '{"format": "lacuna.concepts/1", "concepts": ['}, ["JSON"]),
        ({"concepts": '{"format": "lacuna.concepts/9", "concepts": []}'}, ["lacuna.concepts"]),
        ({"concepts": "{“format”: 1}"}, ["JSON", "straight"]),
        ({"concepts": "猫" * 600}, ["猫", "longer than 500"]),
        ({"concepts": "owl; ship; cat"}, ["semicolons"]),
        ({"concepts": "(hamburger:1.3)"}, ["prompt syntax"]),
        ({"concepts": "owl", "preserve": "ship -> boat"}, ["preserve list", "arrow"]),
        ({"kind": "animal"}, ["kind", "animal"]),
        ({"templates": 99}, ["templates"]),
    ],
)
def test_concept_set(
    server: Server, build: Builder, values: dict[str, Any], words: list[str]
) -> None:
    graph = build.edit() | build.concepts(**values) | build.report()
    sentences = _rejection(server, graph, "set")
    assert len(sentences) == 1, sentences
    for word in words:
        assert word.lower() in sentences[0].lower()


def test_a_pasted_list_is_read_and_the_node_says_how(server: Server, build: Builder) -> None:
    run = server.run(
        build.edit()
        | build.concepts(concepts="\ufeff- hamburger → apple\n- “owl”")
        | build.report()
    )
    said = run.outputs["set"]["text"][0]
    assert "'hamburger' -> 'apple'" in said and "'owl' -> 'scenery'" in said, said
    assert "'→' read as '->'" in said and "byte-order mark" in said, said


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"strength": 5.0}, "strength"),
        ({"method": "magic"}, "magic"),
        ({"adversarial_rounds": 4}, "adversarial_rounds"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"regularization": float("nan")}, "regularization"),
    ],
)
def test_attention_refine(
    server: Server, build: Builder, values: dict[str, Any], word: str
) -> None:
    sentences = _rejection(server, build.edit(**values) | build.report(), "refine")
    assert len(sentences) == 1 and word in sentences[0]


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("", "the filename prefix is empty"),
        ("loras/a\0b", "holds a NUL character"),
        ("x" * 300, "too long"),
        ("../x", "leaves the output folder"),
    ],
)
def test_names_of_files(server: Server, build: Builder, prefix: str, words: str) -> None:
    inputs = {"lora": ["refine", 2], "filename_prefix": prefix}
    graph = build.edit() | {"save": {"class_type": "LacunaSaveLoRA", "inputs": inputs}}
    sentences = _rejection(server, graph, "save")
    assert len(sentences) == 1 and words in sentences[0] and len(sentences[0]) < 400


def test_linked_text_is_judged_when_it_is_known(server: Server, build: Builder) -> None:
    """Text that comes through a link cannot be refused before the run; then it is, by name."""
    text = {"text": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "owl -> owl"}}}
    graph = build.edit() | build.concepts(concepts=["text", 0]) | build.report() | text
    run = server.wait(server.queue(graph))
    assert run.status == "error" and "owl" in run.error and "anchor" in run.error


def test_linked_text_is_not_judged_by_the_default(server: Server, build: Builder) -> None:
    text = {"text": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "owl -> tree"}}}
    values = {"concepts": ["text", 0], "preserve": "church"}  # the default concept
    run = server.run(build.edit() | build.concepts(**values) | build.report() | text)
    assert "owl -> tree" in run.outputs["report"]["text"][0]


def test_wrong_links_are_refused(server: Server, build: Builder) -> None:
    graph = build.edit() | build.refine(concepts=["ckpt", 1]) | build.report()
    sentences = _rejection(server, graph, "refine")
    assert any("mismatch" in sentence for sentence in sentences)


def test_a_phrase_too_long_for_the_encoder(server: Server, build: Builder) -> None:
    graph = build.edit() | build.concepts(concepts=" ".join(["owl"] * 100)) | build.report()
    run = server.wait(server.queue(graph))
    assert run.status == "error" and "owl owl" in run.error


def test_embeddings_are_not_words(server: Server, build: Builder) -> None:
    graph = build.edit() | build.concepts(concepts="embedding:mine -> tree") | build.report()
    run = server.wait(server.queue(graph))
    assert run.status == "error" and "textual inversion" in run.error


def test_a_model_without_cross_attention_is_refused_by_name(server: Server, build: Builder) -> None:
    other = {"other": {"class_type": "LacunaTestOtherModel", "inputs": {}}}
    run = server.wait(server.queue(build.edit(model=["other", 0]) | build.report() | other))
    assert run.status == "error" and "Flux" in run.error
