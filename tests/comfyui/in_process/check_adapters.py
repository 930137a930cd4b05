# SPDX-License-Identifier: Apache-2.0
"""The ComfyUI adapters against ComfyUI's own objects, in one process."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.supported_models_base
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_api.torch_helpers import set_torch_compile_wrapper

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from forward_checks import sided

SMALL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
}
SMALL_SD2 = {**SMALL, "context_dim": 1024}
SMALL_SDXL = {
    **SMALL,
    "context_dim": 2048,
    "num_res_blocks": [3],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0, 0, 0, 0],
    "transformer_depth_middle": -2,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
PROMPTS = ["a photo of a hamburger", "", "two owls (in a tree:1.3), watercolour"]


def random_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = UNetModel(**config).state_dict()
    return {k: torch.randn(v.shape, generator=generator) * 0.02 for k, v in shapes.items()}


def random_unet(config: dict[str, Any]) -> Any:
    return comfy.sd.load_diffusion_model_state_dict(random_weights(config))


def random_clip(tokenizer: type, model: type, **options: Any) -> Any:
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    clip = comfy.sd.CLIP(target, model_options=options)
    generator = torch.Generator().manual_seed(0)
    for parameter in clip.cond_stage_model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return clip


def small_sdxl_clip() -> Any:
    from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer

    layers = {"num_hidden_layers": 3}
    return random_clip(
        SDXLTokenizer, SDXLClipModel, clip_l_model_config=layers, clip_g_model_config=layers
    )


def conditioning(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True))


def sample(model: Any, clip: Any, text: str = "a photo of a hamburger") -> torch.Tensor:
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 7)
    return comfy.sample.sample(
        model, noise, 3, 4.0, "euler", "normal",
        conditioning(clip, text), conditioning(clip, ""), latent, seed=7, disable_pbar=True,
    )  # fmt: skip


def module_weights(model: Any) -> dict[str, torch.Tensor]:
    """What the layers hold while `model` is loaded: the ground truth of every patch."""
    comfy.model_management.load_models_gpu([model])
    return {k: v.detach().clone() for k, v in model.model.state_dict().items()}


def lora(rank: int = 2, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for block in ("input_blocks.1.1", "middle_block.1"):
        for role in "kv":
            name = f"diffusion_model.{block}.transformer_blocks.0.attn2.to_{role}"
            weights[f"{name}.lora_up.weight"] = torch.randn(320, rank, generator=generator) * 0.05
            weights[f"{name}.lora_down.weight"] = torch.randn(rank, 768, generator=generator) * 0.05
    return weights


# --- text encoder ---


def test_tokens_are_the_literal_text(host: ModuleType, checkpoint: Any) -> None:
    encoder = host.ComfyTextEncoder(checkpoint[1])
    assert (encoder.window, encoder.width) == (77, 768)
    start, end = 49406, 49407
    assert encoder.tokenize("") == [start, end]
    dog = encoder.tokenize("dog")
    assert dog[0] == start and dog[-1] == end and len(dog) == 3
    assert encoder.tokenize("a (dog:1.3)")[3:4] == dog[1:2]  # brackets and weight are tokens, too
    assert len(encoder.tokenize("a (dog:1.3)")) > len(encoder.tokenize("a dog"))


def test_long_text_is_not_truncated(host: ModuleType, checkpoint: Any) -> None:
    encoder = host.ComfyTextEncoder(checkpoint[1])
    once = encoder.tokenize("dog")[1]
    assert encoder.tokenize(" ".join(["dog"] * 200)) == [49406, *[once] * 200, 49407]


def test_embeddings_are_refused_in_words(host: ModuleType, checkpoint: Any) -> None:
    encoder = host.ComfyTextEncoder(checkpoint[1])
    for call in (encoder.tokenize, lambda text: encoder.encode([text])):
        with pytest.raises(ValueError, match="textual inversion"):
            call("a photo of embedding:mine")


def test_batch_equals_what_the_host_encodes_one_by_one(host: ModuleType, checkpoint: Any) -> None:
    clip = checkpoint[1]
    encoder = host.ComfyTextEncoder(clip)
    batch = encoder.encode(PROMPTS)
    check_starts(encoder, batch)
    single = torch.cat([conditioning(clip, prompt)[0][0] for prompt in PROMPTS])
    assert batch.shape == (3, 77, 768) and batch.dtype == torch.float32
    torch.testing.assert_close(batch, single, rtol=0, atol=2e-4)


def test_sd2_and_sdxl_batches(host: ModuleType) -> None:
    from comfy.text_encoders.sd2_clip import SD2ClipModel, SD2Tokenizer

    sd2 = random_clip(SD2Tokenizer, SD2ClipModel, clip_h_model_config={"num_hidden_layers": 3})
    for clip, width in ((sd2, 1024), (small_sdxl_clip(), 2048)):
        encoder = host.ComfyTextEncoder(clip)
        batch = encoder.encode(PROMPTS)
        check_starts(encoder, batch)
        single = torch.cat([conditioning(clip, prompt)[0][0] for prompt in PROMPTS])
        assert batch.shape == (3, 77, width) == single.shape
        assert encoder.width == width and encoder.window == 77
        torch.testing.assert_close(batch, single, rtol=1e-3, atol=1e-3 * single.abs().max().item())
        assert encoder.tokenize("dog")[0] == 49406 and len(encoder.tokenize("dog")) == 3
        assert len(encoder.fingerprint) == 32


def check_starts(encoder: Any, whole: torch.Tensor) -> None:
    """The first rows alone are those of the whole window, and nothing else is computed."""
    layers = [m for m in encoder._clip.cond_stage_model.modules() if type(m).__name__ == "CLIPMLP"]
    seen: list[int] = []
    hooks = [m.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1])) for m in layers]
    starts = encoder.encode_start(PROMPTS, 12)
    for hook in hooks:
        hook.remove()
    scale = whole.abs().max().item()
    torch.testing.assert_close(starts, whole[:, :12], rtol=1e-4, atol=1e-4 * scale)
    assert set(seen) == {12} and len(seen) == len(layers)
    assert torch.equal(encoder.encode(PROMPTS), whole), "nothing stays behind"


def test_embeddings_with_pooled_vectors(host: ModuleType, checkpoint: Any) -> None:
    sdxl = small_sdxl_clip()
    context, pooled = host.ComfyTextEncoder(sdxl).embed(PROMPTS)
    single = [conditioning(sdxl, prompt)[0] for prompt in PROMPTS]
    expected = torch.cat([extra["pooled_output"] for _, extra in single])
    for ours, theirs in (
        (context, torch.cat([cond for cond, _ in single])),
        (pooled, expected),  # of every prompt, not of the first of a batch
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    assert not sdxl.cond_stage_model.clip_g._forward_hooks
    assert pooled.shape == (3, 1280) and not torch.allclose(pooled[0], pooled[1])
    empty = host.ComfyTextEncoder(sdxl).embed([])
    assert [tuple(part.shape) for part in empty] == [(0, 77, 2048), (0, 1280)]

    encoder = host.ComfyTextEncoder(checkpoint[1])
    context, pooled = encoder.embed(PROMPTS)
    assert pooled is None and torch.equal(context, encoder.encode(PROMPTS))


def test_embeddings_outside_inference_mode_can_be_trained_on(
    host: ModuleType, checkpoint: Any
) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        context, _ = host.ComfyTextEncoder(checkpoint[1]).embed(["a photo of a cat"])
        assert not context.is_inference() and not context.requires_grad
        weight = torch.ones(768, requires_grad=True)
        (context * weight).sum().backward()
        assert float(weight.grad.abs().max()) > 0
    assert all(p.grad is None for p in checkpoint[1].cond_stage_model.parameters())


def test_text_fingerprint_follows_the_weights_and_the_state(
    host: ModuleType, checkpoint: Any
) -> None:
    clip = checkpoint[1]
    plain = host.ComfyTextEncoder(clip).fingerprint
    assert len(plain) == 32 and plain == host.ComfyTextEncoder(clip.clone()).fingerprint
    skipped = clip.clone()
    skipped.clip_layer(-2)
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    patched, other = clip.clone(), clip.clone()
    patched.add_patches({key: ("diff", (torch.ones(3072, 768),))}, 0.5)
    other.add_patches({key: ("diff", (torch.ones(3072, 768),))}, 0.6)
    states = [host.ComfyTextEncoder(c).fingerprint for c in (skipped, patched, other)]
    assert len({plain, *states}) == 4
    again = clip.clone()
    again.add_patches({key: ("diff", (torch.ones(3072, 768),))}, 0.5)
    assert host.ComfyTextEncoder(again).fingerprint == states[1]
    merged = clip.clone()
    merged.add_patches({key: [(torch.ones(3072, 768), lambda a, **_: a)]}, 0.5)
    assert host.ComfyTextEncoder(merged).fingerprint == ""


def test_cache_lies_in_the_user_folder(host: ModuleType, checkpoint: Any) -> None:
    folder = Path(host.ComfyTextEncoder(checkpoint[1]).cache_directory)
    assert folder.is_dir() and folder.name == "lacuna"


# --- denoiser ---


def test_layers_of_sd1(host: ModuleType, checkpoint: Any) -> None:
    denoiser = host.ComfyDenoiser(checkpoint[0])
    layers = denoiser.cross_attention()
    assert denoiser.family == "SD1.x" and denoiser.patchable
    assert len(layers) == 8 and [role for _, _, role in layers].count("key") == 4
    names = {name: lora_name for name, lora_name, _ in layers}
    block = "transformer_blocks_0_attn2_to_k"
    assert names["diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == (
        f"lora_unet_down_blocks_0_attentions_0_{block}"
    )
    assert names["diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"] == (
        f"lora_unet_mid_block_attentions_0_{block}"
    )
    # ComfyUI itself knows every one of these names, and means the same weight.
    known = comfy.lora.model_lora_keys_unet(checkpoint[0].model, {})
    assert all(known[lora_name] == name for name, lora_name in names.items())


@pytest.mark.parametrize(
    ("config", "family", "count", "first"),
    [
        (SMALL_SD2, "SD2.x", 8, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"),
        (SMALL_SDXL, "KOALA_700M", 14, "lora_unet_input_blocks_2_1_transformer_blocks_0"),
    ],
)
def test_layers_of_other_families(
    host: ModuleType, config: dict[str, Any], family: str, count: int, first: str
) -> None:
    model = random_unet(config)
    denoiser = host.ComfyDenoiser(model)
    layers = denoiser.cross_attention()
    assert denoiser.family == family and len(layers) == count
    assert layers[0][1].startswith(first)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    assert all(known[lora_name] == name for name, lora_name, _ in layers)
    assert denoiser.effective_weight(layers[0][0]).shape == (320, config["context_dim"])


def test_the_pooled_text_of_sdxl_is_edited_in_its_own_columns(host: ModuleType) -> None:
    model, clip = random_unet(SMALL_SDXL), small_sdxl_clip()
    denoiser = host.ComfyDenoiser(model)
    entries = denoiser.text_entries()
    assert [each[:3] for each in entries[:-1]] == denoiser.cross_attention()
    name, lora_name, role, stream, first, columns = entries[-1]
    assert (role, stream, first, columns) == ("input", "pooled", 0, 1280)
    assert comfy.lora.model_lora_keys_unet(model.model, {})[lora_name] == name

    # it reads what the encoder calls pooled, and nothing but sizes behind that
    seen: list[torch.Tensor] = []
    module = comfy.utils.get_attr(model.model, name.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    plain = sample(model, clip, PROMPTS[0])
    hook.remove()
    _, pooled = host.ComfyTextEncoder(clip).embed([PROMPTS[0], ""])
    told = seen[0].float()
    rows = [int((told[:, :1280] - each).norm(dim=1).argmin()) for each in pooled]
    torch.testing.assert_close(told[rows, :1280], pooled, rtol=1e-3, atol=1e-3)
    assert torch.equal(told[0, 1280:], told[-1, 1280:])

    delta = torch.randn(1280, 1280, generator=torch.Generator().manual_seed(5)) * 0.05
    maps = [([(name, first, columns)], delta, None)]
    by_weights = denoiser.with_weight_maps(maps, 0.5)
    base, edited = denoiser.effective_weight(name), by_weights.effective_weight(name)
    torch.testing.assert_close(
        edited[:, :1280], base[:, :1280] @ (torch.eye(1280) + 0.5 * delta), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(edited[:, 1280:], base[:, 1280:])
    drawn = sample(by_weights.patcher, clip, PROMPTS[0])
    assert not torch.allclose(drawn, plain, atol=1e-4)
    by_inputs = denoiser.with_input_maps(maps, 0.5)
    torch.testing.assert_close(
        sample(by_inputs.patcher, clip, PROMPTS[0]), drawn, rtol=1e-3, atol=1e-3
    )
    assert torch.equal(denoiser.effective_weight(name), base)


def test_a_model_without_text_cross_attention_has_no_layers(
    host: ModuleType, checkpoint: Any
) -> None:
    class Flux(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)
            self.model_config = Flux

    patcher = checkpoint[0].clone()
    patcher.model = Flux()
    patcher.model.model_config = type("Flux", (), {})()
    denoiser = host.ComfyDenoiser(patcher)
    assert denoiser.cross_attention() == [] and denoiser.family == "Flux"


@pytest.mark.parametrize("in_place", [False, True])
def test_effective_weight_is_what_the_layer_uses(
    host: ModuleType, checkpoint: Any, in_place: bool
) -> None:
    base = checkpoint[0].clone()
    base.weight_inplace_update = in_place  # as the host does when memory is short
    with_lora, _ = comfy.sd.load_lora_for_models(base, None, lora(), 0.8, 0)
    plain = module_weights(base)
    loaded = module_weights(with_lora)
    before, after = host.ComfyDenoiser(base), host.ComfyDenoiser(with_lora)
    for load in (base, with_lora, base):  # right whichever of the two is loaded now
        comfy.model_management.load_models_gpu([load])
        for name, _, _ in before.cross_attention():
            assert torch.equal(before.effective_weight(name), plain[name])
            assert torch.equal(after.effective_weight(name), loaded[name])
    changed = [k for k in plain if not torch.equal(plain[k], loaded[k])]
    assert len(changed) == 4
    assert host.ComfyDenoiser(base).fingerprint == host.ComfyDenoiser(with_lora).fingerprint


def test_effective_weight_may_be_written_to(host: ModuleType, checkpoint: Any) -> None:
    denoiser = host.ComfyDenoiser(checkpoint[0])
    name = denoiser.cross_attention()[0][0]
    before = denoiser.effective_weight(name)
    denoiser.effective_weight(name).zero_()
    assert torch.equal(denoiser.effective_weight(name), before)


@pytest.mark.parametrize("wrapped", ["packed", "subclass"])
def test_odd_storage_is_probed_and_not_patchable(
    host: ModuleType, checkpoint: Any, wrapped: str
) -> None:
    denoiser = host.ComfyDenoiser(checkpoint[0])
    name = denoiser.cross_attention()[0][0]
    true = denoiser.effective_weight(name)
    comfy.model_management.load_models_gpu([checkpoint[0]])
    layer = comfy.utils.get_attr(checkpoint[0].model, name.removesuffix(".weight"))
    original = layer.weight

    class Packed(torch.Tensor):
        pass

    stored = torch.zeros(10, dtype=torch.uint8) if wrapped == "packed" else true.clone()
    stored = stored if wrapped == "packed" else stored.as_subclass(Packed)
    layer.weight = torch.nn.Parameter(stored, requires_grad=False)
    layer.forward = lambda x: x @ true.T
    try:
        odd = host.ComfyDenoiser(checkpoint[0])
        assert not odd.patchable
        torch.testing.assert_close(odd.effective_weight(name), true)
    finally:
        layer.weight = original
        del layer.forward


def test_bypassed_lora_counts(host: ModuleType, checkpoint: Any) -> None:
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRAs")
    model, _ = comfy.sd.load_bypass_lora_for_models(checkpoint[0], None, lora(), 0.8, 0)
    merged, _ = comfy.sd.load_lora_for_models(checkpoint[0], None, lora(), 0.8, 0)
    name = host.ComfyDenoiser(model).cross_attention()[0][0]
    expected = host.ComfyDenoiser(merged).effective_weight(name)
    torch.testing.assert_close(
        host.ComfyDenoiser(model).effective_weight(name), expected, rtol=1e-4, atol=1e-5
    )


def test_fp8_storage_is_patchable(host: ModuleType) -> None:
    fp8 = torch.float8_e4m3fn
    weights = random_weights(SMALL_SD2)
    matrix = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    stored = weights[matrix].to(fp8)
    half = {k: v.to(fp8) if v.dim() == 2 else v.half() for k, v in weights.items()}
    model = comfy.sd.load_diffusion_model_state_dict(half, model_options={"dtype": fp8})
    denoiser = host.ComfyDenoiser(model)
    name = f"diffusion_model.{matrix}"
    assert model.model.state_dict()[name].dtype == fp8
    assert denoiser.patchable
    assert torch.equal(denoiser.effective_weight(name), stored.float())


def test_weight_deltas(host: ModuleType, checkpoint: Any) -> None:
    base = checkpoint[0]
    denoiser = host.ComfyDenoiser(base)
    plain = module_weights(base)
    (first, _, _), (second, _, _) = denoiser.cross_attention()[:2]
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(320, 4, generator=generator), torch.randn(4, 768, generator=generator)
    dense = torch.randn(320, 768, generator=generator) * 0.1
    edited = denoiser.with_weight_deltas([(first, up, down), (second, dense, None)], 0.5)
    loaded = module_weights(edited.patcher)
    torch.testing.assert_close(loaded[first], plain[first] + 0.5 * (up @ down))
    torch.testing.assert_close(loaded[second], plain[second] + 0.5 * dense)
    assert torch.equal(edited.effective_weight(first), loaded[first])
    others = [k for k in plain if k not in (first, second)]
    assert all(torch.equal(loaded[k], plain[k]) for k in others)
    again = module_weights(base)
    assert all(torch.equal(again[k], plain[k]) for k in plain) and not base.patches


def test_weight_deltas_compose_with_loras_on_both_sides(host: ModuleType, checkpoint: Any) -> None:
    base = checkpoint[0]
    name = host.ComfyDenoiser(base).cross_attention()[0][0]
    up, down = torch.ones(320, 1) * 0.1, torch.ones(1, 768) * 0.1
    plain = module_weights(base)[name]
    before, _ = comfy.sd.load_lora_for_models(base, None, lora(), 1.0, 0)
    edited = host.ComfyDenoiser(before).with_weight_deltas([(name, up, down)], 1.0)
    after, _ = comfy.sd.load_lora_for_models(edited.patcher, None, lora(seed=4), 0.5, 0)

    def part(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        key = name.removesuffix(".weight")
        return weights[f"{key}.lora_up.weight"] @ weights[f"{key}.lora_down.weight"]

    expected = plain + part(lora()) + up @ down + 0.5 * part(lora(seed=4))
    torch.testing.assert_close(module_weights(after)[name], expected)


def test_unknown_weight_is_an_error(host: ModuleType, checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="no weight named nowhere"):
        host.ComfyDenoiser(checkpoint[0]).with_weight_deltas(
            [("nowhere", torch.ones(1, 1), None)], 1
        )


def test_strength_zero_and_bypass_are_bit_identical(host: ModuleType, checkpoint: Any) -> None:
    model, clip = checkpoint[:2]
    before = sample(model, clip)
    denoiser = host.ComfyDenoiser(model)
    deltas = [(name, torch.ones(320, 768), None) for name, _, _ in denoiser.cross_attention()]
    maps = sided(denoiser, torch.eye(768), torch.eye(768))
    unpatched = denoiser.with_weight_deltas(deltas, 0.0)
    assert torch.equal(sample(unpatched.patcher, clip), before)
    for place in (denoiser.with_weight_maps, denoiser.with_input_maps):
        assert torch.equal(sample(place(maps, 0.0).patcher, clip), before)
        assert not torch.allclose(sample(place(maps, 0.5).patcher, clip), before)
        assert torch.equal(sample(model, clip), before)
    assert not torch.allclose(
        sample(denoiser.with_weight_deltas(deltas, 0.5).patcher, clip), before
    )
    assert torch.equal(sample(model, clip), before)


def test_maps_are_the_same_on_weights_and_on_what_they_read(
    host: ModuleType, checkpoint: Any
) -> None:
    model, clip = checkpoint[:2]
    key, value, later = (
        torch.randn(768, 768, generator=torch.Generator().manual_seed(seed)) * 0.01
        for seed in (2, 3, 4)
    )
    denoiser = host.ComfyDenoiser(model)
    maps, more = sided(denoiser, key, value), sided(denoiser, None, later)
    name = denoiser.cross_attention()[0][0]
    by_weights = denoiser.with_weight_maps(maps, 0.7)
    base = denoiser.effective_weight(name)
    torch.testing.assert_close(by_weights.effective_weight(name), base + 0.7 * base @ key)
    by_weights = by_weights.with_weight_maps(more, -0.5)
    by_inputs = denoiser.with_input_maps(maps, 0.7).with_input_maps(more, -0.5)
    expected = sample(by_weights.patcher, clip)
    assert not torch.allclose(expected, sample(model, clip), atol=1e-3)
    torch.testing.assert_close(sample(by_inputs.patcher, clip), expected, rtol=1e-3, atol=1e-3)
    # a clone of the clone still works, on another prompt too, and nothing stays behind
    text = "a photo of a cat"
    torch.testing.assert_close(
        sample(by_inputs.patcher.clone(), clip, text),
        sample(by_weights.patcher.clone(), clip, text),
        rtol=1e-3,
        atol=1e-3,
    )
    # what weights add beside the map reads the text as it came: W (I + s D) e + s up down e
    rows = [(name, denoiser.effective_weight(name).shape[0]) for name in denoiser._names]
    deltas = [(name, torch.randn(n, 3) * 0.1, torch.randn(3, 768) * 0.1) for name, n in rows]
    deltas[0] = (rows[0][0], torch.randn(rows[0][1], 768) * 0.02, None)
    mapped = denoiser.with_weight_maps(maps, 0.7)
    expected = sample(mapped.with_weight_deltas(deltas, 0.7).patcher, clip)
    assert not torch.allclose(sample(mapped.patcher, clip), expected, atol=1e-2)
    beside = denoiser.with_input_maps(maps, 0.7, None, deltas)
    torch.testing.assert_close(sample(beside.patcher, clip), expected, rtol=1e-3, atol=2e-3)
    never = [(torch.zeros(768, 1), None, torch.ones(1), False)], 77
    closed = denoiser.with_input_maps(maps, 0.7, never, deltas)
    assert torch.equal(sample(closed.patcher, clip), sample(model, clip))
    text = host.ComfyTextEncoder(clip).encode(["an owl", "a ship"])
    always = [(torch.zeros(768, 1), None, -torch.ones(1), False)], 77
    assert denoiser.acts_on(text) is None and beside.acts_on(text) is None
    assert closed.acts_on(text).tolist() == [False, False]
    assert closed.with_input_maps(maps, 0.7, always).acts_on(text).tolist() == [True, True]
    for module in model.model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("first", ["edit", "compile"])
def test_an_edit_is_seen_by_a_compiled_model(host: ModuleType, checkpoint: Any, first: str) -> None:
    """Code that was compiled without the edit is not run with it."""
    model, clip = checkpoint[:2]

    def compiled(patcher: Any) -> Any:
        clone = patcher.clone()
        set_torch_compile_wrapper(model=clone, backend="eager")
        return clone

    def edited(patcher: Any) -> Any:
        denoiser = host.ComfyDenoiser(patcher)
        deltas = [(denoiser._names[0], torch.ones(320, 768) * 0.01, None)]
        maps = sided(denoiser, *[-0.3 * torch.eye(768)] * 2)
        return denoiser.with_input_maps(maps, 1.0, None, deltas).patcher

    plain, expected = sample(model, clip), sample(edited(model), clip)
    torch.testing.assert_close(sample(compiled(model), clip), plain, rtol=1e-3, atol=1e-3)
    both = edited(compiled(model)) if first == "compile" else compiled(edited(model))
    torch.testing.assert_close(sample(both, clip), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample(compiled(model), clip), plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_a_shared_map_lives_with_other_patches(host: ModuleType, checkpoint: Any) -> None:
    """LoRAs on both sides, merging, saving; and one map in memory, however many weights."""
    model, _ = checkpoint[:2]
    name = host.ComfyDenoiser(model).cross_attention()[0][0]
    up, down = torch.randn(320, 4) * 0.1, torch.randn(4, 768) * 0.1
    before = host.ComfyDenoiser(model).with_weight_deltas([(name, up, down)], 1.0)
    delta = torch.randn(768, 768) * 0.01
    edited = before.with_weight_maps(sided(before, delta, delta), 0.5)
    after = edited.with_weight_deltas([(name, up, down)], 1.0)
    base = host.ComfyDenoiser(model).effective_weight(name)
    expected = (base + up @ down) @ (torch.eye(768) + 0.5 * delta) + up @ down
    torch.testing.assert_close(after.effective_weight(name), expected, rtol=1e-4, atol=1e-4)

    held = {
        tensor.data_ptr(): tensor.nbytes
        for patches in edited.patcher.patches.values()
        for patch in patches
        for tensor in patch[1].weights
        if isinstance(tensor, torch.Tensor) and tensor.shape[0] == 768
    }
    assert sum(held.values()) <= 2 * delta.nbytes  # keys and values

    merged = after.patcher.clone()  # as ModelMergeSimple does it
    for key, patches in model.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patches}, 0.5, 0.5)
    torch.testing.assert_close(
        host.ComfyDenoiser(merged).effective_weight(name),
        0.5 * expected + 0.5 * base,
        rtol=1e-4,
        atol=1e-4,
    )
    after._load(after.patcher)
    try:
        saved = after.patcher.model.state_dict()[name]
        torch.testing.assert_close(saved.float(), expected, rtol=2e-3, atol=2e-3)
    finally:
        after.patcher.unpatch_model()


# --- images ---


def test_pictures_and_latents(host: ModuleType, checkpoint: Any) -> None:
    vae = checkpoint[2]
    decoder = host.ComfyImageDecoder(vae)
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(False), torch.enable_grad():
        images = decoder.decode(latent)
        assert not images.is_inference() and not images.requires_grad
    assert images.shape == (2, 64, 64, 3) and images.dtype == torch.float32
    torch.testing.assert_close(images, vae.decode(latent), rtol=0, atol=1e-5)
    assert float(images.min()) >= 0 and float(images.max()) <= 1


def test_encoding_needs_an_encoder(host: ModuleType, checkpoint: Any) -> None:
    """A decoder's other half can be all zeros; with weights, it is the host's own encoding."""
    vae = checkpoint[2]
    decoder = host.ComfyImageDecoder(vae)
    images = torch.rand(1, 32, 48, 4, generator=torch.Generator().manual_seed(1))
    encoder = vae.first_stage_model.taesd_encoder
    trained = copy.deepcopy(encoder.state_dict())
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in encoder.parameters():
            parameter.zero_()
        with pytest.raises(ValueError, match="can only decode"):
            decoder.encode(images)
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        latent = decoder.encode(images)
        assert latent.shape == (1, 4, 4, 6) and float(latent.abs().max()) > 0
        assert torch.equal(latent, vae.encode(images[..., :3]))
    finally:
        encoder.load_state_dict(trained)


# --- progress ---


def test_progress_is_throttled_but_shows_the_end(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append((done, total))
    )
    progress = host.ComfyProgress("7")
    for step in range(1, 501):
        progress.report(step, 500)
    assert seen[0] == (1, 500) and seen[-1] == (500, 500) and len(seen) < 20


def test_interrupt_arrives_in_report_and_check(host: ModuleType) -> None:
    interrupted = comfy.model_management.InterruptProcessingException
    progress = host.ComfyProgress("7")
    for call in (lambda: progress.report(3, 100), progress.check):
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(interrupted):
            call()
        call()  # the flag is spent


def test_previews_and_lines_go_to_the_node(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda done, total, preview=None, node_id=None: seen.append(
            (done, total, preview, node_id)
        ),
    )
    lines: list[tuple[str, str]] = []
    monkeypatch.setattr(host, "show_text", lambda node, text: lines.append((node, text)))
    progress = host.ComfyProgress("7")
    progress.report(2, 10)
    picture = torch.zeros(16, 24, 3)
    picture[..., 0] = 1.0
    progress.preview(picture)
    done, total, (kind, image, limit), node = seen[-1]
    assert (done, total, node, kind) == (2, 10, "7", "JPEG") and limit > 0
    assert image.size == (24, 16) and image.getpixel((3, 3)) == (255, 0, 0)
    for step in range(1000):
        progress.status(f"step {step}")
    assert lines[0] == ("7", "step 0") and len(lines) < 50
