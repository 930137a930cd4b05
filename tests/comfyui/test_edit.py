# SPDX-License-Identifier: Apache-2.0
"""The edit inside ComfyUI: what it changes, what it leaves alone, what other nodes make of it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from comfy_server import Checkout, Graph, Rejected, Run, Server
from graphs import Builder, newest_latent, save_lora_id, saved_weights
from host_fixtures import CHECKPOINT_NAME, TEST_DATA, share_text_cache

Weights = dict[str, torch.Tensor]

LORA = "upstream.safetensors"
FP16_ROUNDING = 2.0**-11
FP8_ROUNDING = 2.0**-4


@pytest.fixture(scope="session")
def build(schemas: list[dict]) -> Builder:
    return Builder(schemas)


def _latent(server: Server, _run: Run, node: str) -> torch.Tensor:
    return newest_latent(server, node.removesuffix("_save"))


def _save_lora(server: Server, prefix: str) -> Graph:
    node = save_lora_id(server.get("/object_info"))
    return {"save": {"class_type": node, "inputs": {"lora": ["refine", 2], "prefix": prefix}}}


def _base(build: Builder, file: str = "") -> Graph:
    return build.checkpoint() | build.weights(["ckpt", 0], "base", file)


@pytest.fixture(scope="session")
def base_hash(server: Server, build: Builder) -> str:
    return server.run(_base(build, "base_kv")).outputs["base"]["text"][0]


@pytest.fixture(scope="session")
def base_weights(server: Server, base_hash: str) -> Weights:
    return saved_weights(server, "base_kv")


@pytest.fixture(scope="session")
def edited_weights(server: Server, build: Builder) -> Weights:
    server.run(build.edit() | build.weights(["refine", 0], "edited", "edited_kv"))
    return saved_weights(server, "edited_kv")


@pytest.fixture(autouse=True)
def base_is_untouched(server: Server, build: Builder, base_hash: str) -> Iterator[None]:
    """After every test of this file, however it ended, the model is the one that was loaded."""
    yield
    assert server.run(_base(build)).outputs["base"]["text"][0] == base_hash


def _stack(weights: Weights) -> torch.Tensor:
    return torch.cat([weights[name].double() for name in sorted(weights)])


def _relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return (difference.norm() / reference.norm()).item()


def _upstream_lora(server: Server, base: Weights) -> Graph:
    """A LoRA on every K/V matrix, half as strong as the weights themselves."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, weight in base.items():
        up = torch.randn(weight.shape[0], 4, generator=generator)
        down = torch.randn(4, weight.shape[1], generator=generator)
        module = name.removesuffix(".weight")
        tensors[f"{module}.lora_up.weight"] = up * (0.5 * weight.norm() / (up @ down).norm())
        tensors[f"{module}.lora_down.weight"] = down
    safetensors.torch.save_file(tensors, server.base / "models" / "loras" / LORA)
    inputs = {"model": ["ckpt", 0], "lora_name": LORA, "strength_model": 1.0}
    return {"lora": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}}


def test_only_keys_and_values_change(
    server: Server, build: Builder, base_weights: Weights, edited_weights: Weights, base_hash: str
) -> None:
    assert len(base_weights) == 8 and base_weights.keys() == edited_weights.keys()
    change = _relative(_stack(edited_weights) - _stack(base_weights), _stack(base_weights))
    assert 0.001 < change < 2.0
    text = server.run(build.edit() | build.report()).outputs["report"]["text"][0]
    assert "hamburger -> apple" in text and "Applied to the weights" in text


def test_weights_in_fp8_are_edited_as_any(
    checkout: Checkout, checkpoint_file: Path, build: Builder, tmp_path: Path,
    base_weights: Weights, edited_weights: Weights,
) -> None:  # fmt: skip
    share_text_cache(tmp_path)
    files = {CHECKPOINT_NAME: checkpoint_file}
    fp8 = Server(checkout, tmp_path, checkpoints=files, arguments=["--fp8_e4m3fn-unet"])
    fp8.start()
    try:
        before = fp8.run(_base(build, "base_kv")).outputs["base"]["text"][0]
        edit = build.edit() | build.weights(["refine", 0], "w", "edited_kv") | build.report()
        assert "Applied to the weights" in fp8.run(edit).outputs["report"]["text"][0]
        off = build.edit(strength=0.0) | build.weights(["refine", 0], "off")
        assert fp8.run(off).outputs["off"]["text"][0] == before
        assert fp8.run(_base(build)).outputs["base"]["text"][0] == before
    finally:
        fp8.stop()
    base, edited = _stack(saved_weights(fp8, "base_kv")), _stack(saved_weights(fp8, "edited_kv"))
    full = _stack(base_weights)
    assert 0 < _relative(base - full, full) < FP8_ROUNDING
    shared = torch.linalg.lstsq(full, _stack(edited_weights) - full).solution
    assert _relative(base - edited, edited) > 2 * FP8_ROUNDING
    # Rounded once more when the host stores it.
    assert _relative(base + base @ shared - edited, edited) < FP8_ROUNDING


def test_all_matrices_share_one_map(base_weights: Weights, edited_weights: Weights) -> None:
    base, edited = _stack(base_weights), _stack(edited_weights)
    shared = torch.linalg.lstsq(base, edited - base).solution
    assert _relative(base @ shared - (edited - base), edited - base) < 1e-3


def test_the_headless_host_computes_the_same_patch(
    build: Builder, shim: ModuleType, checkpoint_file: Path, tmp_path: Path,
    base_weights: Weights, edited_weights: Weights,
) -> None:  # fmt: skip
    pytest.importorskip("diffusers")
    loader = importlib.import_module(f"{shim.__name__}.loader")
    host = importlib.import_module(f"{shim.__name__}.diffusers_host").DiffusersHost(
        checkpoint_file, output_directory=tmp_path, cache_directory=TEST_DATA / "headless_cache"
    )
    model, clip, _ = host.load_checkpoint(checkpoint_file.name)
    pack = loader.load().NodePack()
    graph = build.edit()
    widgets = {
        key: {k: v for k, v in graph[key]["inputs"].items() if not isinstance(v, list)}
        for key in ("set", "refine")
    }
    concepts = pack.run("LacunaConceptSet", widgets["set"])[0]
    inputs = {**widgets["refine"], "model": model, "clip": clip, "concepts": concepts}
    erased = pack.run("LacunaAttentionRefine", inputs)[0]
    for name, edited in edited_weights.items():
        headless = erased.effective_weight(name) - model.effective_weight(name)
        change = edited - base_weights[name]
        # Two implementations of the text encoder differ by 1e-6; the solve multiplies that by up to
        # the square root of its condition number (about 200 here).
        assert _relative(headless - change, change) < 1e-3


def test_an_upstream_lora_is_part_of_what_is_edited(
    server: Server, build: Builder, base_weights: Weights
) -> None:
    """W_eff* = W_eff N, with W_eff = W + dW; not W N + dW."""
    lora = _upstream_lora(server, base_weights)
    plain = build.checkpoint() | lora | build.weights(["lora", 0], "plain", "lora_kv")
    server.run(plain)
    server.run(
        build.edit(model=["lora", 0]) | lora | build.weights(["refine", 0], "w", "lora_edited_kv")
    )
    before, after = (
        _stack(saved_weights(server, "lora_kv")),
        _stack(saved_weights(server, "lora_edited_kv")),
    )
    assert _relative(before - _stack(base_weights), _stack(base_weights)) > 0.3
    change = after - before
    for weights, fits in ((before, True), (_stack(base_weights), False)):
        shared = torch.linalg.lstsq(weights, change).solution
        residual = _relative(weights @ shared - change, change)
        assert residual < 1e-3 if fits else residual > 0.05


def test_a_downstream_lora_still_counts(
    server: Server, build: Builder, base_weights: Weights, edited_weights: Weights
) -> None:
    lora = _upstream_lora(server, base_weights)
    lora["lora"]["inputs"]["model"] = ["refine", 0]
    server.run(build.edit() | lora | build.weights(["lora", 0], "w", "edited_lora_kv"))
    up = safetensors.torch.load_file(server.base / "models" / "loras" / LORA)
    for name, weight in saved_weights(server, "edited_lora_kv").items():
        module = name.removesuffix(".weight")
        added = up[f"{module}.lora_up.weight"] @ up[f"{module}.lora_down.weight"]
        torch.testing.assert_close(weight, edited_weights[name] + added, rtol=1e-4, atol=1e-5)


def test_strength_zero_is_bit_identical_and_one_is_not(server: Server, build: Builder) -> None:
    latents = {}
    for name, strength in (("s0", 0.0), ("s1", 1.0)):
        graph = build.edit(strength=strength) | build.sample(["refine", 0], name)
        latents[name] = _latent(server, server.run(graph), f"{name}_save")
    run = server.run(build.checkpoint() | build.sample(["ckpt", 0], "plain"))
    plain = _latent(server, run, "plain_save")
    assert torch.equal(latents["s0"], plain)
    assert not torch.allclose(latents["s1"], plain, atol=1e-2)


def test_strength_is_linear(
    server: Server, build: Builder, base_weights: Weights, edited_weights: Weights
) -> None:
    server.run(build.edit(strength=0.5) | build.weights(["refine", 0], "half", "half_kv"))
    middle = (_stack(base_weights) + _stack(edited_weights)) / 2
    assert _relative(_stack(saved_weights(server, "half_kv")) - middle, middle) < 1e-5


def test_a_merge_takes_its_share_of_the_edit(
    server: Server, build: Builder, base_weights: Weights, edited_weights: Weights
) -> None:
    inputs = {"model1": ["refine", 0], "model2": ["ckpt", 0], "ratio": 0.25}
    merge = {"merge": {"class_type": "ModelMergeSimple", "inputs": inputs}}
    server.run(build.edit() | merge | build.weights(["merge", 0], "merged", "merged_kv"))
    base, edited = _stack(base_weights), _stack(edited_weights)
    merged = _stack(saved_weights(server, "merged_kv"))
    assert _relative(merged - base - 0.25 * (edited - base), edited - base) < 1e-3


def test_one_map_is_held_for_all_matrices(
    server: Server, build: Builder, base_weights: Weights
) -> None:
    count = {"patches": {"class_type": "LacunaTestPatches", "inputs": {"model": ["refine", 0]}}}
    held = int(server.run(build.edit() | count).outputs["patches"]["text"][0])
    width = next(iter(base_weights.values())).shape[1]
    assert 0 < held <= 4 * width * width  # a float32 matrix, where eight weights are patched


def test_bypass_restores(server: Server, build: Builder) -> None:
    """The edited model and the plain one in one prompt, then the plain one alone."""
    both = build.edit() | build.sample(["refine", 0], "erased") | build.sample(["ckpt", 0], "kept")
    run = server.run(both)
    alone = server.run(build.checkpoint() | build.sample(["ckpt", 0], "alone"))
    assert torch.equal(_latent(server, run, "kept_save"), _latent(server, alone, "alone_save"))


def test_conditioning_equals_weights(server: Server, build: Builder) -> None:
    latents = []
    for kind in ("weights", "conditioning"):
        graph = build.edit(apply_as=kind) | build.sample(["refine", 0], kind)
        run = server.run(graph)
        latents.append(_latent(server, run, f"{kind}_save"))
        # Only the one that no saver writes says so, and these weights are not packed.
        report = run.outputs["refine"]["text"][0]
        assert ("Save Checkpoint" in report) == (kind == "conditioning") and "packed" not in report
    torch.testing.assert_close(*latents, rtol=1e-3, atol=1e-3)


def test_prompts_that_name_no_concept_are_drawn_bit_for_bit(server: Server, build: Builder) -> None:
    """As new nodes are set: the edit acts where a prompt names a concept, and nowhere else."""
    graph = build.edit(where="prompts that name it", retain_set="small")
    prompts = {"named": "a photo of a hamburger", "other": "a photo of a lion"}
    for name, text in prompts.items():
        graph |= build.sample(["refine", 0], f"{name}_gated", text)
        graph |= build.sample(["ckpt", 0], f"{name}_plain", text)
    run = server.run(graph, seconds=900)  # 600 prompts are read, where no test has done so before
    latents = {
        (name, kind): _latent(server, run, f"{name}_{kind}_save")
        for name in prompts
        for kind in ("gated", "plain")
    }
    assert torch.equal(latents["other", "gated"], latents["other", "plain"])
    assert not torch.allclose(latents["named", "gated"], latents["named", "plain"], atol=1e-2)
    # Beside other things, by the clip of the node: the same map as on the model.
    words = "a picture of a crab, a tree and a hamburger, sunset"
    graph = build.edit(where="prompts that name it", retain_set="small")
    for name, clip in (("edited", ["refine", 4]), ("given", ["ckpt", 1])):
        graph |= build.sample(["ckpt", 0], f"{name}_clip", words)
        graph[f"{name}_clip_pos"]["inputs"]["clip"] = clip
    beside = server.run(graph, seconds=900)
    assert not torch.allclose(
        _latent(server, beside, "edited_clip_save"), _latent(server, beside, "given_clip_save"),
        atol=1e-2,
    )  # fmt: skip
    report = run.outputs["refine"]["text"][0]
    assert "this node's clip" in report
    assert "Acts on prompts that name a concept" in report and "Retain set: " in report
    assert "Save Checkpoint writes the model with the concepts still in it" in report


def test_second_run_is_all_cached(server: Server, build: Builder) -> None:
    graph = build.edit() | build.report() | build.sample(["refine", 0], "cached")
    first = server.run(graph)
    second = server.run(graph)
    assert second.cached == set(graph)
    assert second.outputs["report"] == first.outputs["report"]
    assert second.outputs["refine"]["text"] == second.outputs["report"]["text"]


def test_the_same_inputs_give_the_same_edit(
    server: Server, build: Builder, edited_weights: Weights
) -> None:
    server.run(_base(build))  # another graph in between: the cache is empty
    server.run(build.edit() | build.weights(["refine", 0], "again", "again_kv"))
    again = saved_weights(server, "again_kv")
    assert all(torch.equal(again[name], edited_weights[name]) for name in again)


def test_baked_checkpoint(
    server: Server, build: Builder, edited_weights: Weights, checkpoint_file: Path
) -> None:
    save = {
        "class_type": "CheckpointSave",
        "inputs": {
            "model": ["refine", 0],
            "clip": ["ckpt", 1],
            "vae": ["ckpt", 2],
            "filename_prefix": "checkpoints/baked",
        },
    }
    server.run(build.edit() | {"save": save})
    file = max((server.output / "checkpoints").glob("baked_*.safetensors"))
    try:
        baked = safetensors.torch.load_file(file)
    finally:
        file.unlink()
    original = safetensors.torch.load_file(checkpoint_file)
    assert baked.keys() == original.keys()
    for key, value in baked.items():
        name = key.removeprefix("model.")
        expected = edited_weights.get(name, original[key])
        torch.testing.assert_close(value.float(), expected.float(), rtol=FP16_ROUNDING, atol=1e-7)
    assert sum(not torch.equal(baked[k].float(), original[k].float()) for k in baked) == 8


def test_saved_lora_reloads(
    server: Server, build: Builder, base_weights: Weights, edited_weights: Weights
) -> None:
    server.run(build.edit(lora_rank=768) | _save_lora(server, "loras/erase"))
    file = max((server.output / "loras").glob("erase_*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    assert all(key.startswith("lora_unet_") for key in tensors)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    assert len(tensors) == 8 * 3

    mark = len(server.log())
    loader = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["ckpt", 0], "lora_name": file.name, "strength_model": 1.0},
    }
    graph = build.checkpoint() | {"lora": loader}
    run = server.run(
        graph | build.weights(["lora", 0], "w", "reloaded_kv") | build.sample(["lora", 0], "reload")
    )
    assert "lora key not loaded" not in server.log()[mark:]
    reloaded = saved_weights(server, "reloaded_kv")
    for name, weight in reloaded.items():
        change = edited_weights[name] - base_weights[name]
        assert _relative(weight - edited_weights[name], change) < 4 * FP16_ROUNDING
    erased = server.run(build.edit() | build.sample(["refine", 0], "erased2"))
    expected = _latent(server, erased, "erased2_save")
    torch.testing.assert_close(
        _latent(server, run, "reload_save"),
        expected,
        rtol=0,
        atol=0.01 * expected.abs().max().item(),
    )


def test_chained_concept_sets(server: Server, build: Builder) -> None:
    first = {"first": build.concepts(concepts="ghost -> star", preserve="")["set"]}
    graph = build.edit() | build.concepts(previous=["first", 0]) | first | build.report()
    text = server.run(graph).outputs["report"]["text"][0]
    assert "ghost -> star" in text and "hamburger -> apple" in text


def test_an_error_behind_the_node_leaves_the_model_alone(server: Server, build: Builder) -> None:
    fail = {"fail": {"class_type": "LacunaTestFail", "inputs": {"model": ["refine", 0]}}}
    run = server.wait(server.queue(build.edit() | fail))
    assert run.status == "error" and "on purpose" in run.error


@pytest.mark.parametrize("delay", [0.3, 2.0])
def test_interrupt(server: Server, build: Builder, delay: float) -> None:
    """Stopped within two seconds at any time, and the next run is as if nothing had happened."""
    names = "\n".join(f"thing number {i} -> apple" for i in range(60))
    long = build.edit() | build.concepts(concepts=names, templates=30) | build.report()
    prompt = server.queue(long)
    while not server.is_running(prompt):
        time.sleep(0.02)
    time.sleep(delay)
    server.post("/interrupt", {})
    run = server.wait(prompt, 30)
    assert run.status == "error" and run.message("execution_interrupted") is not None
    assert run.seconds <= 2.0
    server.run(build.edit() | build.report())


def test_no_place_for_the_text_cache(server: Server, build: Builder) -> None:
    """A user folder that cannot be written costs time, not the run."""
    folder = server.base / "user" / "lacuna"
    target = folder.readlink()
    folder.unlink()
    folder.write_text("not a folder")
    try:
        graph = build.edit() | build.concepts(concepts="robot -> tree") | build.report()
        assert "robot -> tree" in server.run(graph).outputs["report"]["text"][0]
    finally:
        folder.unlink()
        folder.symlink_to(target)


def test_names_of_files_are_filled_in(server: Server, build: Builder) -> None:
    """The page does it for ComfyUI's own savers only, so ours do it themselves."""
    prefix = "named/%LacunaAttentionRefine.strength%_%Edit.method%_%Words.kind%_%date:yyyy%_%year%"
    save = {"class_type": "LacunaSaveLoRA",
            "inputs": {"lora": ["refine", 2], "filename_prefix": prefix}}  # fmt: skip
    graph = build.edit() | {"save": save}
    graph["refine"] = graph["refine"] | {"_meta": {"title": "Edit"}}
    page = {"nodes": [{"id": "set", "properties": {"Node name for S&R": "Words"}}]}
    extra = {"extra_pnginfo": {"workflow": page}}
    prompt = server.post("/prompt", {"prompt": graph, "extra_data": extra})["prompt_id"]
    run = server.wait(prompt)
    assert run.status == "success", run.error
    year = time.localtime().tm_year
    assert [file.name for file in (server.output / "named").iterdir()] == [
        f"1_uce_object_{year}_{year}_00001_.safetensors"
    ]


def test_no_place_for_the_lora(server: Server, build: Builder) -> None:
    (server.output / "blocked").write_text("not a folder")
    run = server.wait(server.queue(build.edit() | _save_lora(server, "blocked/x")))
    assert run.status == "error"
    server.run(build.edit() | build.report())


def test_api_calls_need_no_browser_state(server: Server, build: Builder) -> None:
    """A queued prompt that is refused leaves the server able to take the next one."""
    with pytest.raises(Rejected):
        server.queue(build.edit() | build.concepts(concepts="") | build.report())
    server.run(build.edit() | build.report())
