# SPDX-License-Identifier: Apache-2.0
"""LoRA Erase and LoRA Fuse inside ComfyUI, on the demo model with very little training."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from comfy_server import Graph, Rejected, Server
from graphs import Builder, newest_latent, saved_weights
from host_fixtures import TEST_DATA

FP16_ROUNDING = 2.0**-11


@pytest.fixture(scope="session")
def build(schemas: list[dict]) -> Builder:
    return Builder(schemas)


@pytest.fixture(scope="session")
def base_weights(server: Server, build: Builder) -> dict[str, torch.Tensor]:
    server.run(build.checkpoint() | build.weights(["ckpt", 0], "base", "lora_base_kv"))
    return saved_weights(server, "lora_base_kv")


@pytest.fixture(autouse=True)
def base_is_untouched(
    server: Server, build: Builder, base_weights: dict[str, torch.Tensor]
) -> Iterator[None]:
    """After every test of this file, however it ended, the model is the one that was loaded."""
    yield
    server.run(build.checkpoint() | build.weights(["ckpt", 0], "base", "lora_after_kv"))
    after = saved_weights(server, "lora_after_kv")
    assert after.keys() == base_weights.keys()
    assert all(torch.equal(after[name], base_weights[name]) for name in after)


def _preview(node: list[object]) -> Graph:
    return {"pictures": {"class_type": "SaveImage",
                         "inputs": {"images": node, "filename_prefix": "masks"}}}  # fmt: skip


def _report(node: list[object]) -> Graph:
    return {"report": {"class_type": "PreviewAny", "inputs": {"source": node}}}


@pytest.mark.parametrize("gradient", ["full", "cached"])
def test_the_whole_chain(
    server: Server, build: Builder, base_weights: dict[str, torch.Tensor], gradient: str
) -> None:
    loss = {"class_type": "LossGraphNode",
            "inputs": {"loss": ["erase", 2], "filename_prefix": "loss"}}  # fmt: skip
    graph = (
        build.pipeline(gradient=gradient, vae=["ckpt", 2])
        | build.sample(["fuse", 0], f"fused_{gradient}")
        | build.weights(["fuse", 0], "fused", f"{gradient}_kv")
        | _preview(["erase", 1])
        | _report(["fuse", 3])
        | {"graph": loss}
    )
    run = server.run(graph)
    fused = saved_weights(server, f"{gradient}_kv")
    changes = {name: fused[name] - base_weights[name] for name in fused}
    keys = [change for name, change in changes.items() if ".to_k." in name]
    assert len(changes) == 8 and all(change.norm() > 0 for change in keys)
    assert "hamburger" in run.outputs["report"]["text"][0]
    pictures = run.outputs["pictures"]["images"]
    assert len(pictures) == 2 * 2  # two pictures of each concept
    assert "hamburger: attention" in run.outputs["erase"]["text"][0]
    again = server.run(graph)
    assert again.cached == set(graph) - {"fused"}  # the probe always looks again
    assert newest_latent(server, f"fused_{gradient}").isfinite().all()


def test_host_and_headless_train_the_same_lora(
    server: Server, build: Builder, shim: ModuleType, checkpoint_file: Path, tmp_path: Path,
    schemas: list[dict], base_weights: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    server.run(build.pipeline() | build.weights(["fuse", 0], "fused", "fused_kv"))
    pytest.importorskip("diffusers")
    loader = importlib.import_module(f"{shim.__name__}.loader")
    host = importlib.import_module(f"{shim.__name__}.diffusers_host").DiffusersHost(
        checkpoint_file, output_directory=tmp_path, cache_directory=TEST_DATA / "headless_cache"
    )
    model, clip, _ = host.load_checkpoint(checkpoint_file.name)
    pack = loader.load().NodePack(str(tmp_path))

    def widgets(key: str) -> dict[str, object]:
        inputs = build.pipeline()[key]["inputs"]
        return {k: v for k, v in inputs.items() if not isinstance(v, list)}

    concepts = pack.run("LacunaConceptSet", widgets("set"))[0]
    host_inputs = {"model": model, "clip": clip}
    refined = pack.run(
        "LacunaAttentionRefine", {**widgets("refine"), **host_inputs, "concepts": concepts}
    )
    inputs = {**widgets("erase"), **host_inputs, "concepts": concepts, "refinement": refined[1]}
    loras = pack.run("LacunaLoRAErase", inputs)[0]
    fused = pack.run("LacunaLoRAFuse", {**widgets("fuse"), **host_inputs, "loras": loras})[0]
    for name, weight in saved_weights(server, "fused_kv").items():
        change = weight - base_weights[name]
        headless = fused.effective_weight(name) - model.effective_weight(name)
        # Two implementations of the same network: gradients differ by rounding, and Adam's first
        # steps have the size of the learning rate whatever the gradient.
        assert (headless - change).norm() < 0.02 * change.norm(), name


def test_the_saved_lora_is_the_edit(
    server: Server, build: Builder, base_weights: dict[str, torch.Tensor]
) -> None:
    save = {"class_type": "LacunaSaveLoRA",
            "inputs": {"lora": ["fuse", 1], "filename_prefix": "loras/fused"}}  # fmt: skip
    server.run(
        build.pipeline()
        | {"save": save}
        | build.weights(["fuse", 0], "fused", "fused_kv")
        | build.sample(["fuse", 0], "edited")
    )
    file = max((server.output / "loras").glob("fused_*.safetensors"))
    mark = len(server.log())
    lora = {"class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["ckpt", 0], "lora_name": file.name, "strength_model": 1.0},
            }  # fmt: skip
    server.run(
        build.checkpoint()
        | {"lora": lora}
        | build.weights(["lora", 0], "reloaded", "reloaded_kv")
        | build.sample(["lora", 0], "reloaded")
    )
    assert "lora key not loaded" not in server.log()[mark:]
    fused = saved_weights(server, "fused_kv")
    for name, weight in saved_weights(server, "reloaded_kv").items():
        change = fused[name] - base_weights[name]
        assert (weight - fused[name]).norm() <= 4 * FP16_ROUNDING * change.norm() + 1e-6
    expected = newest_latent(server, "edited")
    torch.testing.assert_close(
        newest_latent(server, "reloaded"), expected, rtol=0, atol=0.01 * expected.abs().max().item()
    )


def test_a_bundle_is_fused_again_without_training(server: Server, build: Builder) -> None:
    save = {"class_type": "LacunaSaveBundle",
            "inputs": {"loras": ["erase", 0], "filename_prefix": "lacuna/two"}}  # fmt: skip
    server.run(
        build.pipeline() | {"save": save} | build.weights(["fuse", 0], "fused", "trained_kv")
    )
    file = max((server.output / "lacuna").glob("two_*.safetensors"))
    load = {"class_type": "LacunaLoadBundle", "inputs": {"file": f"lacuna/{file.name}"}}
    base = build.checkpoint() | {"load": load}
    server.run(base | build.fuse(["load", 0]) | build.weights(["fuse", 0], "fused", "from_file_kv"))
    trained = saved_weights(server, "trained_kv")
    for name, weight in saved_weights(server, "from_file_kv").items():
        torch.testing.assert_close(weight, trained[name], rtol=1e-4, atol=1e-5)
    one = base | build.fuse(["load", 0], leave_out="owl")
    text = server.run(one | _report(["fuse", 3])).outputs["report"]["text"][0]
    assert "hamburger" in text and "left out" in text.lower()


def test_strength_zero_is_bit_identical(server: Server, build: Builder) -> None:
    graph = build.pipeline() | build.fuse(strength=0.0) | build.sample(["fuse", 0], "zero")
    server.run(graph)
    server.run(build.checkpoint() | build.sample(["ckpt", 0], "plain"))
    assert torch.equal(newest_latent(server, "zero"), newest_latent(server, "plain"))


def test_fused_loras_act_on_prompts_that_name_a_concept(server: Server, build: Builder) -> None:
    graph = build.pipeline() | build.fuse(where="prompts that name it", retain_set="small")
    prompts = {"named": "a photo of a hamburger", "other": "a photo of a lion"}
    for name, text in prompts.items():
        graph |= build.sample(["fuse", 0], f"{name}_fused", text)
        graph |= build.sample(["ckpt", 0], f"{name}_plain", text)
    run = server.run(graph | _report(["fuse", 3]), seconds=900)
    plain, fused = (
        {name: newest_latent(server, f"{name}_{kind}") for name in prompts}
        for kind in ("plain", "fused")
    )
    assert torch.equal(fused["other"], plain["other"])
    assert not torch.allclose(fused["named"], plain["named"], atol=1e-2)
    assert "Acts on prompts that name a concept" in run.outputs["report"]["text"][0]
    # The same edit as on the weights, which read the negative prompt, too.
    for where, name in (("prompts that name it", "named_only"), ("every prompt", "named_all")):
        graph = build.pipeline() | build.fuse(where=where, retain_set="small")
        graph |= build.sample(["fuse", 0], name, prompts["named"])
        graph[f"{name}_sampler"]["inputs"]["cfg"] = 1.0
        server.run(graph)
    expected = newest_latent(server, "named_all")
    torch.testing.assert_close(
        newest_latent(server, "named_only"),
        expected,
        rtol=0,
        atol=1e-3 * expected.abs().max().item(),
    )


@pytest.mark.parametrize("gradient", ["full", "cached"])
def test_interrupts_at_random_points(server: Server, build: Builder, gradient: str) -> None:
    """Stopped within two seconds, and what was finished is not trained again."""
    names = "\n".join(f"thing number {i} -> apple" for i in range(40))
    graph = (
        build.checkpoint()
        | build.concepts(concepts=names, preserve="")
        | build.erase(gradient=gradient, steps=200, batch=1)
        | _report(["erase", 3])
    )
    del graph["erase"]["inputs"]["refinement"]
    delays = random.Random(7)
    for _ in range(5):
        prompt = server.queue(graph)
        while not server.is_running(prompt):
            time.sleep(0.02)
        time.sleep(delays.uniform(0.1, 3.0))
        interrupted = time.monotonic()
        server.post("/interrupt", {})
        run = server.wait(prompt, 30)
        assert run.status == "error" and run.message("execution_interrupted") is not None
        assert time.monotonic() - interrupted <= 2.0
        assert not list(server.output.rglob("*.part*"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"width": 100}, "multiples of 8"),
        ({"focal_t1": 500.0, "focal_t2": 100.0}, "focal"),
        ({"gradient": "full", "suppress_value": 0.5}, "suppress_value"),
    ],
)
def test_bad_widgets_are_refused_before_anything_runs(
    server: Server, build: Builder, values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(Rejected) as refused:
        server.queue(build.pipeline(**values) | build.sample(["fuse", 0], "never"))
    assert sentence in str(refused.value)


def test_out_of_memory_is_the_hosts_own(server: Server, build: Builder) -> None:
    """A model that runs out of memory in the middle of training: the host's tips, our hint."""
    oom = {"class_type": "LacunaTestOutOfMemory", "inputs": {"model": ["ckpt", 0], "after": 9}}
    graph = build.pipeline(model=["oom", 0]) | {"oom": oom} | build.sample(["fuse", 0], "never")
    run = server.wait(server.queue(graph))
    assert run.status == "error"
    assert run.message("execution_error")["exception_type"].endswith("OutOfMemoryError")
    server.run(build.pipeline() | build.sample(["fuse", 0], "after_oom"))
