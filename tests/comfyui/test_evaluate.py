# SPDX-License-Identifier: Apache-2.0
"""Evaluate Erasure inside ComfyUI, on the demo model with very few steps."""

from __future__ import annotations

import json
import random
import time

import pytest
from comfy_server import Graph, Rejected, Server
from graphs import Builder


@pytest.fixture(scope="session")
def build(schemas: list[dict]) -> Builder:
    return Builder(schemas)


def _text(source: list[object]) -> Graph:
    return {"text": {"class_type": "PreviewAny", "inputs": {"source": source}}}


def test_the_sheet_the_report_and_the_verdict(server: Server, build: Builder) -> None:
    graph = build.edit() | build.evaluate(["refine", 0]) | _text(["evaluate", 1])
    run = server.run(graph)
    shown = run.outputs["evaluate"]
    assert len(shown["images"]) == 2 and shown["images"][0]["type"] == "temp"  # a page a concept
    assert "'hamburger' is gone in " in shown["text"][0]
    report = json.loads(run.outputs["text"]["text"][0])
    assert report["format"] == "lacuna.evaluation/1"
    assert report["protocol"]["steps"] == 2 and report["protocol"]["family"] == "SD1.x"
    assert report["counts"]["erased"][1] == 2
    assert any(pair["latent_change"] > 0 for pair in report["pairs"])
    assert report["preflight"]["weights_differ"]
    assert server.run(graph).cached == set(graph)
    # Another seed draws other pictures, and computes no edit again.
    again = server.run(graph | build.evaluate(["refine", 0], evaluation_seed=1))
    assert {"set", "refine", "ckpt"} <= again.cached


def test_a_do_nothing_edit_is_called_what_it_is(server: Server, build: Builder) -> None:
    for erased in (["ckpt", 0], ["refine", 0]):
        graph = build.edit(strength=0.0) | build.concepts(concepts="owl -> tree")
        graph |= build.evaluate(erased)
        text = server.run(graph).outputs["evaluate"]["text"][0]
        assert "Nothing was erased: both models draw exactly the same pictures." in text


def test_a_detector_of_another_pack_judges(server: Server, build: Builder) -> None:
    judge = {"judge": {"class_type": "LacunaTestDetector", "inputs": {"fails_on": "owl"}}}
    graph = build.edit() | judge | build.evaluate(["refine", 0], detector=["judge", 0])
    run = server.run(graph | _text(["evaluate", 1]))
    report = json.loads(run.outputs["text"]["text"][0])
    assert report["protocol"]["detector"]["name"] == "brightness"
    for pair in report["pairs"]:
        failed = pair["concept"] == "owl"
        assert ("failed on purpose" in pair.get("detector_error", "")) == failed
        if not failed and pair["phrase"]:
            assert 0 < pair["score_before"] < 1


def test_a_clip_vision_model_compares_pictures(server: Server, build: Builder) -> None:
    vision = {"vision": {"class_type": "LacunaTestClipVision", "inputs": {}}}
    graph = build.edit() | build.concepts(concepts="owl -> tree") | vision
    graph |= build.evaluate(["refine", 0], clip_vision=["vision", 0])
    run = server.run(graph | _text(["evaluate", 1]))
    report = json.loads(run.outputs["text"]["text"][0])
    assert report["protocol"]["clip_vision"] == "images"
    assert all(-1 <= pair["image_similarity"] <= 1.0001 for pair in report["pairs"])
    assert "were not trained together" in run.outputs["evaluate"]["text"][0]


def test_a_prompt_file_in_the_input_folder(server: Server, build: Builder) -> None:
    file = server.input / "attacks.csv"
    file.write_text('prompt,concept\nbun with meat,hamburger\n"hoot, hoot",owl\n', "utf-8")
    graph = build.edit() | build.evaluate(["refine", 0], prompt_file="attacks.csv")
    run = server.run(graph | _text(["evaluate", 8]))
    assert "Of the prompt file, " in run.outputs["evaluate"]["text"][0]
    harder = json.loads(run.outputs["text"]["text"][0])
    assert [item["target"] for item in harder["concepts"]] == ["hamburger", "owl"]
    assert server.run(graph).cached == set(graph)
    file.write_text("prompt\nbun with meat\n", "utf-8")  # another file: judged again
    with pytest.raises(Rejected) as refused:
        server.queue(build.edit() | build.evaluate(["refine", 0], prompt_file="none.csv"))
    assert "there is no prompt file" in str(refused.value)
    run = server.wait(server.queue(graph))
    assert run.status == "error" and "does not say which of the 2 concepts" in run.error


def test_thorough_attacks_and_says_what_comes_through(server: Server, build: Builder) -> None:
    graph = build.edit() | build.concepts(concepts="hamburger -> apple")
    graph |= build.evaluate(["refine", 0], level="thorough") | _text(["evaluate", 1])
    run = server.run(graph, seconds=900)
    report = json.loads(run.outputs["text"]["text"][0])
    assert {item["attack"] for item in report["attacks"]} == {
        "paraphrase", "adversarial embedding", "composition", "emphasis", "similar word",
        "searched words", "learned embedding",
    }  # fmt: skip
    assert report["cost"]["pairs"] == len(report["pairs"]) == report["cost"]["thorough_pairs"]
    assert "'hamburger' under attack: gone in " in run.outputs["evaluate"]["text"][0]


def test_preflight_draws_nothing(server: Server, build: Builder) -> None:
    graph = build.edit() | build.evaluate(["refine", 0], level="preflight") | _text(["evaluate", 1])
    run = server.run(graph)
    report = json.loads(run.outputs["text"]["text"][0])
    assert report["pairs"] == []
    assert "Read off the weights" in run.outputs["evaluate"]["text"][0]


def test_bad_widgets_are_refused_before_anything_runs(server: Server, build: Builder) -> None:
    with pytest.raises(Rejected) as refused:
        server.queue(build.edit() | build.evaluate(["refine", 0], width=100))
    assert "multiples of 8" in str(refused.value)


def test_interrupts_at_random_points(server: Server, build: Builder) -> None:
    graph = build.edit() | build.evaluate(["refine", 0], images=50, steps=20)
    delays = random.Random(3)
    for _ in range(3):
        prompt = server.queue(graph)
        while not server.is_running(prompt):
            time.sleep(0.02)
        time.sleep(delays.uniform(0.5, 4.0))
        interrupted = time.monotonic()
        server.post("/interrupt", {})
        run = server.wait(prompt, 30)
        assert run.status == "error" and run.message("execution_interrupted") is not None
        assert time.monotonic() - interrupted <= 2.0
