# SPDX-License-Identifier: Apache-2.0
"""The headless host's adapters, on the demo model."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="needs diffusers")

from python_shim import sampling, sd1_checkpoint
from python_shim.diffusers_host import DiffusersHost
from python_shim.errors import HostError
from python_shim.fingerprint import SAMPLES, fingerprint, identify

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from forward_checks import sided

KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
VALUE = KEY.replace("to_k", "to_v")


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model, clip, prompt="a photo of a cat", seed=1, steps=3, cfg=4.0, on_step=None, **other):
    options = {"sampler": "euler", "scheduler": "normal", "denoise": 1.0} | other
    options.setdefault("latent", torch.zeros(1, 4, 8, 8))
    return model.sample(
        seed=seed, steps=steps, cfg=cfg, positive=clip.encode([prompt]), negative=clip.encode([""]),
        on_step=on_step or (lambda done, total: None), **options,
    )  # fmt: skip


def state_hash(model) -> str:
    digest = hashlib.sha256()
    for name, value in model._base.unet.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def hook_count(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model._base.unet.modules())


# --------------------------------------------------------------------------- text


def test_tokens_are_clips(demo):
    clip = demo[1]
    assert clip.tokenize("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip.tokenize("") == [49406, 49407]
    assert clip.tokenize("  A PHOTO\n of   a Cat ") == clip.tokenize("a photo of a cat")
    assert clip.tokenize("it's")[1:-1] == [585, 568]  # "it</w>", "'s</w>"


def test_text_is_literal(demo):
    clip = demo[1]
    plain, weighted = clip.tokenize("cat"), clip.tokenize("(cat:1.3)")
    assert len(weighted) > len(plain) + 3, "brackets and numbers are words here, not emphasis"


def test_long_text_is_not_cut_by_the_tokenizer_but_fits_the_window(demo):
    clip = demo[1]
    text = " ".join(["cat"] * 100)
    assert len(clip.tokenize(text)) == 102
    assert clip.encode([text]).shape == (1, 77, 768)
    # causal attention: what was cut off cannot change what is left
    longer = clip.encode([text + " dog"])
    assert torch.equal(clip.encode([text]), longer)


def test_padding_is_the_end_token(demo):
    clip = demo[1]
    padded = clip._window(clip.tokenize("a cat"))
    assert padded[:4] == [49406, 320, 2368, 49407]
    assert padded[4:] == [49407] * 73


def test_encode_has_no_influence_between_prompts(demo):
    clip = demo[1]
    both = clip.encode(["a photo of a cat", "the flag of japan"])
    assert both.dtype == torch.float32
    torch.testing.assert_close(both[1:], clip.encode(["the flag of japan"]), atol=1e-5, rtol=1e-5)
    assert (both[0] - both[1]).abs().max() > 0.1
    assert clip.encode([]).shape == (0, 77, 768)


def test_identity_layers_are_dropped_without_a_trace(tmp_path):
    """Two added do-nothing layers change no bit of the output, and only one layer runs."""
    weights = {
        "embeddings.token_embedding.weight": noise(1000, 768, seed=1),
        "embeddings.position_embedding.weight": noise(77, 768, seed=2),
        "final_layer_norm.weight": torch.ones(768),
        "final_layer_norm.bias": torch.zeros(768),
    }
    for layer, gain in enumerate((0.0, 1.0, 0.0)):  # the working layer is in the middle
        for i, (name, shape) in enumerate({
            "self_attn.q_proj": (768, 768), "self_attn.k_proj": (768, 768),
            "self_attn.v_proj": (768, 768), "self_attn.out_proj": (768, 768),
            "mlp.fc1": (32, 768), "mlp.fc2": (768, 32),
        }.items()):  # fmt: skip
            is_end = name in ("self_attn.out_proj", "mlp.fc2")
            scale = (gain if is_end else 1.0) * shape[1] ** -0.5
            weights[f"encoder.layers.{layer}.{name}.weight"] = noise(*shape, seed=i, scale=scale)
            weights[f"encoder.layers.{layer}.{name}.bias"] = noise(shape[0], seed=i, scale=scale)
        for norm in ("layer_norm1", "layer_norm2"):
            weights[f"encoder.layers.{layer}.{norm}.weight"] = torch.ones(768)
            weights[f"encoder.layers.{layer}.{norm}.bias"] = torch.zeros(768)
    single = {
        k.replace(".1.", ".0.", 1): v
        for k, v in weights.items()
        if ".0." not in k[:17] and ".2." not in k[:17]
    }
    ids = torch.arange(77).unsqueeze(0)
    outputs = []
    for state in (weights, single):
        model, everything = sd1_checkpoint._build_text_model(dict(state), Path("x.safetensors"))
        assert model.config.num_hidden_layers == 1
        assert len(everything) == len(state), "the fingerprint covers dropped layers, too"
        outputs.append(model(input_ids=ids).last_hidden_state)
    assert torch.equal(*outputs)


# --------------------------------------------------------------------------- fingerprint


def test_fingerprint_ignores_order_and_float_type_only():
    a, b = noise(3, 4, seed=1).half(), noise(5, seed=2).half()
    name = fingerprint([a, b])
    assert len(name) == 32 and int(name, 16) >= 0
    assert fingerprint([b.float(), a.double()]) == name
    assert fingerprint([a, b + 0.1]) != name
    assert fingerprint([a.reshape(4, 3), b]) != name
    assert fingerprint([a]) != name


def test_fingerprints_name_the_weights(demo, demo_checkpoint):
    model, clip, _ = demo
    tensors = load_file(demo_checkpoint)
    text = [v for k, v in tensors.items() if k.startswith("cond_stage_model.")]
    attention = [v for k, v in tensors.items() if ".attn2.to_k." in k or ".attn2.to_v." in k]
    assert clip.fingerprint == fingerprint(text)
    assert model.fingerprint == fingerprint(attention)
    patched = model.with_weight_deltas([(KEY, noise(320, 768), None)], 1.0)
    assert patched.fingerprint == model.fingerprint, "the base weights are named, not the patches"
    assert patched.weight_samples == model.weight_samples
    # By names that follow from the file alone, so that every host gives the same ones.
    prefix = "cond_stage_model.transformer.text_model."
    named = {f"clip_l.{k.removeprefix(prefix)}": v for k, v in tensors.items() if prefix in k}
    assert clip.weight_samples == identify(named.items()).samples
    assert set(model.weight_samples) == {lora for _, lora, _ in model.cross_attention()}


def test_samples_are_of_matrices_and_at_the_same_places_in_every_type():
    weights = {"a": noise(64, 32, seed=1), "b": noise(5, seed=2), "c": noise(3, 2, seed=3)}
    full = identify(weights.items())
    assert full.fingerprint == fingerprint(weights.values())
    assert {name: len(values) for name, values in full.samples.items()} == {"a": SAMPLES, "c": 6}
    assert len(set(full.samples["a"])) == SAMPLES
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        stored = identify((name, weight.to(dtype)) for name, weight in weights.items())
        assert stored.samples["a"] == torch.tensor(full.samples["a"]).to(dtype).tolist()


# --------------------------------------------------------------------------- weights


def test_cross_attention_names(demo):
    model = demo[0]
    entries = model.cross_attention()
    assert len(entries) == 8 and len({name for name, _, _ in entries}) == 8
    assert (
        KEY,
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "key",
    ) in entries
    assert (
        "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_v.weight",
        "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_v",
        "value",
    ) in entries


def test_effective_weight_is_the_files_weight(demo, demo_checkpoint):
    tensors = load_file(demo_checkpoint)
    for name, _, _ in demo[0].cross_attention():
        expected = tensors["model." + name].float()
        assert torch.equal(demo[0].effective_weight(name), expected)


def test_deltas_add_up_and_strength_is_linear(demo):
    model = demo[0]
    base = model.effective_weight(KEY)
    up, down, full = noise(320, 4, seed=1), noise(4, 768, seed=2), noise(320, 768, seed=3)
    half = model.with_weight_deltas([(KEY, up, down)], 0.5)
    torch.testing.assert_close(half.effective_weight(KEY), base + 0.5 * (up @ down))
    both = half.with_weight_deltas([(KEY, full, None), (VALUE, full, None)], -2.0)
    torch.testing.assert_close(both.effective_weight(KEY), base + 0.5 * (up @ down) - 2.0 * full)
    assert torch.equal(model.effective_weight(KEY), base), (
        "a view never changes the one it came from"
    )
    torch.testing.assert_close(half.effective_weight(KEY), base + 0.5 * (up @ down))
    half.effective_weight(KEY).zero_()
    torch.testing.assert_close(half.effective_weight(KEY), base + 0.5 * (up @ down))


def test_wrong_deltas_are_refused(demo):
    model = demo[0]
    with pytest.raises(HostError, match=r"no weight named diffusion_model\.nowhere"):
        model.with_weight_deltas([("diffusion_model.nowhere", noise(320, 768), None)], 1.0)
    with pytest.raises(HostError, match="shape"):
        model.with_weight_deltas([(KEY, noise(320, 4), noise(5, 768))], 1.0)
    for place in (model.with_input_maps, model.with_weight_maps):
        with pytest.raises(HostError, match="768 x 768"):
            place([([(KEY, 0, 0)], noise(320, 320), None)], 1.0)
        with pytest.raises(HostError, match="768 x 768"):
            place([([(KEY, 0, 0)], noise(768, 3), noise(3, 320))], 1.0)
        with pytest.raises(HostError, match="no weight named"):
            place([([("diffusion_model.nowhere", 0, 0)], noise(768, 768), None)], 1.0)


# --------------------------------------------------------------------------- sampling


def test_sampling_is_deterministic_and_follows_its_seed(demo):
    model, clip, _ = demo
    first = sample(model, clip)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(first, sample(model, clip))
    assert not torch.equal(first, sample(model, clip, seed=2))
    assert torch.isfinite(first).all() and first.shape == (1, 4, 8, 8)


def test_a_negative_seed_is_the_large_one(demo):
    """The core passes 64 signed bits, users type unsigned ones; torch takes either."""
    model, clip, _ = demo
    large = sample(model, clip, seed=2**64 - 5, steps=1)
    assert torch.equal(large, sample(model, clip, seed=-5, steps=1))


def test_steps_are_reported(demo):
    model, clip, _ = demo
    seen = []
    sample(model, clip, steps=4, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_cfg_1_needs_no_negative_prompt(demo):
    model, clip, _ = demo
    almost = sample(model, clip, cfg=1.0 + 1e-6)
    torch.testing.assert_close(sample(model, clip, cfg=1.0), almost, atol=1e-3, rtol=1e-4)


def test_denoise_keeps_part_of_the_latent(demo):
    model, clip, _ = demo
    start = noise(1, 4, 8, 8, seed=4, scale=5.0)
    weak = sample(model, clip, latent=start, denoise=0.1, steps=2)
    strong = sample(model, clip, latent=start, denoise=0.9, steps=2)
    assert (weak - start).norm() < 0.5 * (strong - start).norm()
    assert torch.equal(sample(model, clip, latent=start, denoise=0.0), start)


def test_a_batch_is_one_noise_for_all(demo):
    model, clip, _ = demo
    batch = sample(model, clip, latent=torch.zeros(2, 4, 8, 8))
    torch.testing.assert_close(batch[:1], sample(model, clip), atol=1e-3, rtol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "uni_pc"}, r'"uni_pc".*euler, dpmpp_2m'),
        ({"scheduler": "beta"}, r'"beta".*normal, simple, karras'),
        ({"steps": 0}, "at least 1 step"),
        ({"denoise": 1.5}, "between 0 and 1"),
        ({"latent": torch.zeros(1, 16, 8, 8)}, "4 channels"),
    ],
)
def test_what_sampling_refuses(demo, change, message):
    with pytest.raises(HostError, match=message):
        sample(demo[0], demo[1], **change)


def test_the_model_draws_what_the_prompt_says(demo):
    """Scale and colour of the whole chain: a red thing in the middle of a blue picture."""
    model, clip, decoder = demo
    latent = sample(model, clip, "a photo of a rose on a blue background", steps=20, cfg=4.5)
    image = decoder.decode(latent)[0]
    assert image.shape == (64, 64, 3) and image.min() >= 0 and image.max() <= 1
    rim = torch.cat([image[4:60, 4:9].reshape(-1, 3), image[4:60, 55:60].reshape(-1, 3)]).mean(0)
    middle = image[22:36, 26:38].reshape(-1, 3).mean(0)
    assert rim[2] > 0.6 and rim[2] - rim[0] > 0.25, f"the background should be blue: {rim}"
    assert middle[0] > 0.6 and middle[0] - middle[2] > 0.25, f"the rose should be red: {middle}"


def test_the_decoder_gets_latents_in_the_trained_scale(demo):
    """Against diffusers' own TAESD, filled from the asset file by hand."""
    from diffusers import AutoencoderTiny

    file = Path(__file__).resolve().parents[2] / "assets" / "demo_model" / "vae_decoder.safetensors"
    tiny = AutoencoderTiny()
    weights = {}
    for key, value in load_file(file).items():
        position, _, rest = key.partition(".")
        weights[f"layers.{int(position) - 1}.{rest}"] = value.float()
    tiny.decoder.load_state_dict(weights)
    with safe_open(file, framework="pt") as opened:
        latent_std = float(opened.metadata()["latent_std"])
    unit = noise(1, 4, 8, 8)
    with torch.no_grad():
        expected = (tiny.decoder(unit * latent_std) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(demo[2].decode(unit / 0.18215), expected, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------- patches while sampling


def test_encoding_needs_an_encoder(demo, monkeypatch):
    """A VAE that was cut down to its decoder has zeros for an encoder."""
    vae = demo[2]._vae
    zeros = replace(vae, encode=lambda image: torch.zeros_like(vae.encode(image)))
    monkeypatch.setattr(demo[2], "_vae", zeros)
    with pytest.raises(HostError, match="can only decode"):
        demo[2].encode(torch.rand(1, 16, 16, 3))
    with pytest.raises(HostError, match="pictures"):
        demo[2].encode(torch.rand(16, 16, 3))


def test_encoding_is_the_other_way_than_decoding(demo, monkeypatch):
    """With an encoder that takes every 8th pixel: order, scale and crop of what it gets."""
    decoder = demo[2]
    scale = 2.0
    vae = replace(
        decoder._vae,
        encode=lambda image: torch.cat([image, image[:, :1]], 1)[..., ::8, ::8] / scale,
    )
    monkeypatch.setattr(decoder, "_vae", vae)
    images = torch.rand(2, 19, 32, 3, generator=torch.Generator().manual_seed(1))
    latent = decoder.encode(images)
    assert latent.shape == (2, 4, 2, 4)
    expected = (2 * images[:, 1:17:8, ::8] - 1) / scale  # 3 rows too many: one above, two below
    torch.testing.assert_close(latent[:, :3], expected.permute(0, 3, 1, 2))


def test_patches_are_merged_and_undone(demo):
    model, clip, _ = demo
    before, plain = state_hash(model), sample(model, clip)
    patched = model.with_weight_deltas([(KEY, noise(320, 768, scale=0.1), None)], 1.0)
    patched = patched.with_input_maps(sided(model, None, noise(768, 768, scale=0.02)), 1.0)
    assert (sample(patched, clip) - plain).abs().max() > 0.01, "the patch should show"
    assert state_hash(model) == before and hook_count(model) == 0
    assert torch.equal(sample(model, clip), plain)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError("from the callback"), Stop(), KeyboardInterrupt()])
def test_patches_are_undone_when_a_step_raises(demo, error):
    model, clip, _ = demo
    before = state_hash(model)
    patched = model.with_weight_deltas([(KEY, noise(320, 768), None)], 1.0)
    patched = patched.with_input_maps([([(KEY, 0, 0), (VALUE, 0, 0)], noise(768, 768), None)], 1.0)

    def on_step(done: int, total: int) -> None:
        assert state_hash(model) == before, "not even while it samples are base weights touched"
        assert hook_count(model) == 2
        raise error

    with pytest.raises(type(error)) as caught:
        sample(patched, clip, on_step=on_step)
    assert caught.value is error
    assert state_hash(model) == before and hook_count(model) == 0


def test_strength_0_changes_no_bit(demo):
    model, clip, _ = demo
    silent = model.with_weight_deltas([(KEY, noise(320, 768), None)], 0.0)
    silent = silent.with_input_maps(sided(model, noise(768, 768), noise(768, 768)), 0.0)
    silent = silent.with_weight_maps(sided(model, noise(768, 768), noise(768, 768)), 0.0)
    assert torch.equal(sample(silent, clip), sample(model, clip))


def test_a_map_is_the_same_on_weights_and_on_what_they_read(demo):
    """W (e + s D e) = (W + s W D) e, for keys and values apart, and for two maps in a row."""
    model, clip, _ = demo
    key, value = noise(768, 768, seed=1, scale=0.02), noise(768, 768, seed=2, scale=0.02)
    maps = sided(model, key, value)
    mapped, patched = model.with_input_maps(maps, 0.7), model.with_weight_maps(maps, 0.7)
    base = model.effective_weight(KEY)
    torch.testing.assert_close(patched.effective_weight(KEY), base + 0.7 * base @ key)
    plain = sample(model, clip)
    assert (sample(mapped, clip) - plain).abs().max() > 0.05
    torch.testing.assert_close(sample(mapped, clip), sample(patched, clip), atol=2e-3, rtol=1e-4)
    # swapping keys and values must be noticed
    swapped = sided(model, value, key)
    assert (
        sample(model.with_input_maps(swapped, 0.7), clip) - sample(mapped, clip)
    ).abs().max() > 0.05
    # a second map acts on top of the first, as on weights: W (I + s1 D1)(I + s2 D2)
    expected = sample(patched.with_weight_maps(swapped, -0.5), clip)
    twice = mapped.with_input_maps(swapped, -0.5)
    torch.testing.assert_close(sample(twice, clip), expected, atol=2e-3, rtol=1e-4)
    # what weights add beside it reads the text as it came: W (I + s D) e + s up down e
    deltas = [(KEY, noise(320, 3, seed=5, scale=0.1), noise(3, 768, seed=6, scale=0.1)),
              (VALUE, noise(320, 768, seed=7, scale=0.02), None)]  # fmt: skip
    expected = sample(patched.with_weight_deltas(deltas, 0.7), clip)
    assert (expected - sample(patched, clip)).abs().max() > 0.05
    beside = model.with_input_maps(maps, 0.7, None, deltas)
    torch.testing.assert_close(sample(beside, clip), expected, atol=2e-3, rtol=1e-4)
    never = [(torch.zeros(768, 1), None, torch.ones(1), False)], 77
    closed = model.with_input_maps(maps, 0.7, never, deltas)
    assert torch.equal(sample(closed, clip), plain)
    text = clip.encode(["an owl", "a ship"])
    always = [(torch.zeros(768, 1), None, -torch.ones(1), False)], 77
    assert model.acts_on(text) is None and beside.acts_on(text) is None
    assert closed.acts_on(text).tolist() == [False, False]
    assert closed.with_input_maps(maps, 0.7, always).acts_on(text).tolist() == [True, True]
    assert closed.with_input_maps(maps, 0.7).acts_on(text) is None  # the second acts everywhere
    # two factors are their product
    out, inner = noise(768, 4, seed=3, scale=0.1), noise(4, 768, seed=4, scale=0.1)
    for place in ("with_weight_maps", "with_input_maps"):
        pair, whole = (
            getattr(model, place)([([(KEY, 0, 0), (VALUE, 0, 0)], *factors)], 1.0)
            for factors in ((out, inner), (out @ inner, None))
        )
        torch.testing.assert_close(sample(pair, clip), sample(whole, clip), atol=2e-3, rtol=1e-4)


# --------------------------------------------------------------------------- schedules and samplers


def test_schedule_has_the_known_ends():
    schedule = sampling.NoiseSchedule()
    assert float(schedule.sigmas[0]) == pytest.approx(0.0292, abs=1e-4)
    assert float(schedule.sigmas[-1]) == pytest.approx(14.6146, abs=1e-3)
    assert int(schedule.timestep(schedule.sigmas[345])) == 345
    for name in sampling.SCHEDULERS:
        sigmas = sampling.make_sigmas(schedule, name, 20, 1.0)
        assert len(sigmas) == 21 and sigmas[-1] == 0
        assert (sigmas[1:] < sigmas[:-1]).all()
        assert float(sigmas[0]) == pytest.approx(14.6146, abs=1e-3)
    assert len(sampling.make_sigmas(schedule, "normal", 20, 0.5)) == 21
    assert float(sampling.make_sigmas(schedule, "karras", 20, 0.5)[0]) < 5


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("dpmpp_2m", 2)])
def test_samplers_converge_at_their_order(sampler, order):
    """For unit-variance Gaussian data the exact path is x ~ sqrt(1 + sigma^2)."""

    def error(steps: int) -> float:
        sigmas = torch.exp(torch.linspace(2.0, -2.0, steps + 1, dtype=torch.float64))
        start = torch.ones(1, dtype=torch.float64) * (1 + sigmas[0] ** 2).sqrt()
        end = sampling.run_sampler(
            sampler, start, sigmas, lambda x, s: x / (1 + s**2), lambda done, total: None
        )
        return float((end - (1 + sigmas[-1] ** 2).sqrt()).abs())

    ratio = error(100) / error(200)
    assert 2**order * 0.8 < ratio < 2**order * 1.35


# --------------------------------------------------------------------------- LoRA files


def lora_host(demo_checkpoint, folder):
    return DiffusersHost(demo_checkpoint, folder, lora_directory=folder, cache_directory=folder)


DIFFUSERS_MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
LDM_MODULE = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize("module", [DIFFUSERS_MODULE, LDM_MODULE, KEY.removesuffix(".weight")])
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_lora_files(demo, demo_checkpoint, tmp_path, module, alpha):
    up, down = noise(320, 4, seed=1).half(), noise(4, 768, seed=2).half()
    tensors = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "erase.safetensors")
    host = lora_host(demo_checkpoint, tmp_path)
    patched = host.load_lora(demo[0], "erase.safetensors", 0.5)
    scale = 0.5 * (1.0 if alpha is None else alpha / 4)
    expected = demo[0].effective_weight(KEY) + scale * (up.float() @ down.float())
    torch.testing.assert_close(patched.effective_weight(KEY), expected)


def test_lora_on_convolutions(demo, demo_checkpoint, tmp_path):
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    up, down = noise(320, 2, 1, 1, seed=1), noise(2, 320, 3, 3, seed=2)
    save_file({f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down},
              tmp_path / "conv.safetensors")  # fmt: skip
    patched = lora_host(demo_checkpoint, tmp_path).load_lora(demo[0], "conv.safetensors", 1.0)
    name = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    change = patched.effective_weight(name) - demo[0].effective_weight(name)
    expected = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    torch.testing.assert_close(change, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": noise(3, 1)},
            "text encoder",
        ),
        (
            {"lora_unet_nowhere.lora_up.weight": noise(3, 1)},
            r"no place for lora_unet_nowhere\.lora_up",
        ),
        ({f"{DIFFUSERS_MODULE}.dora_scale": noise(3)}, "no place for .*dora_scale"),
        (
            {f"{DIFFUSERS_MODULE}.lora_up.weight": noise(320, 4)},
            "only one of lora_up and lora_down",
        ),
        ({f"{DIFFUSERS_MODULE}.alpha": torch.tensor(4.0)}, "alpha but no weights"),
        ({f"{DIFFUSERS_MODULE}.diff": noise(320, 1024)}, "made for another model"),
        ({f"{DIFFUSERS_MODULE}.diff": noise(320, 768) * float("nan")}, "NaN"),
        ({}, "holds no LoRA weights"),
    ],
)
def test_lora_files_that_are_refused(demo, demo_checkpoint, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(HostError, match=message):
        lora_host(demo_checkpoint, tmp_path).load_lora(demo[0], "bad.safetensors", 1.0)


def test_lora_names_stay_inside_their_folder(demo, demo_checkpoint, tmp_path):
    (tmp_path / "loras").mkdir()
    save_file({}, tmp_path / "secret.safetensors")
    host = lora_host(demo_checkpoint, tmp_path / "loras")
    for name in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "..\\secret.safetensors",
    ):
        with pytest.raises(HostError, match="outside the folder"):
            host.load_lora(demo[0], name, 1.0)
    with pytest.raises(HostError, match=r'no "missing\.safetensors"'):
        host.load_lora(demo[0], "missing.safetensors", 1.0)
    with pytest.raises(HostError, match="--lora-dir"):
        DiffusersHost(demo_checkpoint).load_lora(demo[0], "x.safetensors", 1.0)


# --------------------------------------------------------------------------- files that are refused


@pytest.fixture(scope="module")
def unet_tensors(demo_checkpoint):
    return {
        k: v
        for k, v in load_file(demo_checkpoint).items()
        if k.startswith("model.diffusion_model.")
    }


def refusal(path: Path) -> str:
    with pytest.raises(HostError) as caught:
        DiffusersHost(path).load_checkpoint(path.name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_truncated_and_hostile_files(demo_checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    content = demo_checkpoint.open("rb").read(1_000_000)
    huge_header = struct.pack("<Q", 2**63) + b"{}"
    bad_offsets = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
    files = {
        "cut in the data": content,
        "cut in the header": content[:1000],
        "empty": b"",
        "not safetensors": b"PK\x03\x04" + bytes(1000),
        "enormous header": huge_header,
        "offsets outside the file": struct.pack("<Q", len(bad_offsets)) + bad_offsets + bytes(4),
    }
    for what, data in files.items():
        path.write_bytes(data)
        assert "cannot be read as safetensors" in refusal(path), what
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"cos\nsystem\n")
    assert "not a .safetensors file" in refusal(pickle)
    with pytest.raises(HostError, match="no checkpoint"):
        DiffusersHost(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"conditioner.embedders.0.x": (1,), "model.diffusion_model.label_emb.0.0.weight": (1,)},
            "an SDXL model",
        ),
        ({"cond_stage_model.model.ln_final.weight": (1,)}, "an SD2.x model"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "an SD3 model"),
        ({"model.diffusion_model.double_blocks.0.x": (1,)}, "a Flux model"),
        ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "a Flux model"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (1,)}, "is a LoRA"),
        ({"input_blocks.0.0.weight": (1,)}, "a bare UNet"),
        ({"whatever": (1,)}, "no Stable Diffusion checkpoint"),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
                "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (
                    320,
                    1024,
                ),
            },
            "an SD2.x model",
        ),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3),
                "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (
                    320,
                    768,
                ),
            },
            "an inpainting model",
        ),
    ],
)
def test_other_families(tmp_path, keys, message):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, path)
    text = refusal(path)
    assert message in text
    if "LoRA" not in message:
        assert "SD1.x" in text, "the sentence says what works"


def test_broken_weights(unet_tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    name = "model." + KEY

    def with_change(**change):
        save_file({k: v for k, v in (unet_tensors | change).items() if v is not None}, path)
        return refusal(path)

    nan = unet_tensors[name].clone()
    nan[3, 5] = float("nan")
    assert "NaN" in with_change(**{name: nan})
    infinite = unet_tensors[name].clone()
    infinite[-1, -1] = -float("inf")
    assert "infinite" in with_change(**{name: infinite})
    # named as the module that diffusers builds calls it
    assert "lacks mid_block.attentions.0" in with_change(**{name: None})
    extra = {"model.diffusion_model.surprise.weight": torch.zeros(3)}
    assert "has unknown surprise.weight" in with_change(**extra)
    short = with_change(**{"model.diffusion_model.time_embed.0.bias": torch.zeros(5)})
    assert "shape [5]" in short and "[1280]" in short
    assert "packed" in with_change(**{name: nan.to(torch.int8)})
    assert "text encoder is missing" in with_change()


def test_missing_vae(demo_checkpoint, tmp_path):
    tensors = load_file(demo_checkpoint)
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}, path)
    assert "no VAE" in refusal(path)


# --------------------------------------------------------------------------- folders


def test_a_diffusers_folder_is_the_same_model(demo, expand, tmp_path):
    folder = expand.write_diffusers_folder(tmp_path)
    model, clip, decoder = DiffusersHost(folder).load_checkpoint("ignored")
    assert model.cross_attention() == demo[0].cross_attention()
    assert (model.fingerprint, clip.fingerprint) == (demo[0].fingerprint, demo[1].fingerprint)
    latent = sample(model, clip, sampler="dpmpp_2m", scheduler="karras")
    assert torch.equal(latent, sample(*demo[:2], sampler="dpmpp_2m", scheduler="karras"))
    assert torch.allclose(decoder.decode(latent), demo[2].decode(latent), atol=1e-5)

    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction"}))
    assert "v_prediction" in refusal(folder)
    scheduler.unlink()
    shutil.rmtree(folder / "vae")
    assert "vae/diffusion_pytorch_model.safetensors is missing" in refusal(folder)


def test_a_folder_of_models_is_searched_by_name(demo_checkpoint, tmp_path):
    host = DiffusersHost(demo_checkpoint.parent)
    assert host._checkpoint_path("lacuna_demo.safetensors") == demo_checkpoint
    with pytest.raises(HostError, match="outside the folder"):
        host.load_checkpoint("../other.safetensors")
    with pytest.raises(HostError, match=r'no "other\.safetensors"'):
        host.load_checkpoint("other.safetensors")


def test_loading_twice_gives_the_same_objects(demo_checkpoint, monkeypatch):
    monkeypatch.setattr(sd1_checkpoint, "load", lambda path, device: pytest.fail("loaded again"))
    host = DiffusersHost(demo_checkpoint)
    host._loaded[demo_checkpoint] = ("model", "clip", "vae")
    assert host.load_checkpoint("any name.safetensors") == ("model", "clip", "vae")
