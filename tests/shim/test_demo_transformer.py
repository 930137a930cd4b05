# SPDX-License-Identifier: Apache-2.0
"""Training and expanding the demo transformer; its checkpoint in ComfyUI is tested in
tests/comfyui/in_process/check_demo_transformer.py."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "assets" / "demo_model"
sys.path.insert(0, str(REPOSITORY / "tools" / "demo_model"))

pytest.importorskip("diffusers", reason="needs diffusers")
import corpus as corpus_module  # noqa: E402
import expand as demo_expand  # noqa: E402
import expand_transformer  # noqa: E402
import export  # noqa: E402
import networks  # noqa: E402
import stage_transformer  # noqa: E402
import train  # noqa: E402
import training  # noqa: E402
from corpus import OBJECT, STYLES, Corpus, Record  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --------------------------------------------------------------------------- training


def test_noise_levels_lie_around_the_middle_of_sd3s_schedule() -> None:
    sigma = stage_transformer.noise_levels(4000, torch.Generator().manual_seed(0))
    assert (sigma > 0).all() and (sigma < 1).all()
    assert (sigma[1:] > sigma[:-1]).float().mean() > 0.99  # one from each share
    assert float(sigma.median()) == pytest.approx(0.75, abs=0.002)  # shift 3: 3t / (1 + 2t)
    spread = torch.logit(sigma.double()).std()
    assert float(spread) == pytest.approx(stage_transformer.SPREAD, abs=0.01)


def test_the_learning_rate_has_no_fixed_end() -> None:
    rates = [stage_transformer.learning_rate(step, 500, 10**9, 0) for step in range(500, 2000)]
    assert rates[0] == pytest.approx(stage_transformer.PEAK / stage_transformer.WARM_UP)
    assert set(rates[stage_transformer.WARM_UP :]) == {stage_transformer.PEAK}
    fall = [stage_transformer.learning_rate(step, 0, 1000, 100) for step in range(1000)]
    assert fall[900] == stage_transformer.PEAK
    assert fall[950] == pytest.approx(stage_transformer.PEAK / 2)
    assert fall[999] == pytest.approx(stage_transformer.PEAK / 100)


def test_the_loss_is_that_of_a_rectified_flow() -> None:
    captions, entries, count = 3, 5, 8
    generator = torch.Generator().manual_seed(1)
    pool = stage_transformer.Pool(
        torch.randint(0, captions, (entries,), generator=generator),
        torch.randn(captions + 1, networks.WINDOW, networks.WIDTH, generator=generator).half(),
        torch.randn(captions + 1, networks.WIDTH, generator=generator),
        torch.randn(entries, stage_transformer.RENDERINGS, 4, 8, 8, generator=generator).half(),
        torch.ones(entries),
    )
    seen: dict[str, Any] = {}

    def perfect(**inputs: Any) -> tuple[torch.Tensor]:
        """The velocity that leads back to whichever latents of the pool were made noisy."""
        seen.update(inputs)
        sigma = (inputs["timestep"] / 1000).view(-1, 1, 1, 1, 1)
        clean = pool.latents.flatten(0, 1).float().repeat(1, networks.FLOW_COPIES, 1, 1)
        noise = (inputs["hidden_states"][:, None] - (1 - sigma) * clean) / sigma
        likely = noise.flatten(2).square().sum(-1).argmin(1)
        row = torch.arange(count)
        return (noise[row, likely] - clean[likely],)

    for step, window in ((0, 20), (stage_transformer.WHOLE_EVERY - 1, networks.WINDOW)):
        generator = training.step_generator(0, step)
        loss = stage_transformer.flow_loss(perfect, pool, step, count, generator)
        assert float(loss) < 1e-6
        assert seen["encoder_hidden_states"].shape == (count, window, networks.WIDTH)
        context, pooled = seen["encoder_hidden_states"], seen["pooled_projections"]
        rows = [int((pool.pooled - one).abs().sum(-1).argmin()) for one in pooled]
        assert torch.equal(context, pool.hidden[rows, :window].float())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two pictures."""
    folder = tmp_path_factory.mktemp("transformer")
    records = tuple(Record((word,), STYLES[0], OBJECT, "1F600") for word in ("cat", "owl"))
    images = torch.randint(0, 256, (2, 64, 64, 4), generator=torch.Generator().manual_seed(4))
    corpus_module.save(Corpus(records, images.byte()), folder)
    return folder


def run(work: Path, steps: int, start: Path) -> dict[str, Any]:
    arguments = ["transformer", "--work", str(work), "--start", str(start), "--steps", str(steps)]
    arguments += ["--pool", "1", "--batch", "2"]
    assert train.main(arguments) == 0
    return torch.load(work / "transformer.pt", weights_only=True)


def test_training_goes_on_from_the_checkpoint_and_from_compact_weights(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_stop(path: Path, content: dict) -> None:
        training.save_checkpoint(path, content)
        if path.name == "transformer.pt":
            raise KeyboardInterrupt

    small = functools.partial(networks.make_transformer, blocks=1, heads=1)
    monkeypatch.setattr(stage_transformer, "make_transformer", small)
    start = tmp_path / "demo_model"  # without the trained transformer beside it
    start.symlink_to(ASSETS, target_is_directory=True)
    once = run(work, 2, start)
    (work / "transformer.pt").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage_transformer, "save_checkpoint", save_and_stop)
        patch.setattr(stage_transformer, "SAVE_SECONDS", 0.0)  # not at the end only
        run(work, 2, start)
    assert torch.load(work / "transformer.pt", weights_only=True)["step"] == 1
    twice = run(work, 2, start)
    assert (twice["step"], twice["begun"]) == (2, 0)
    for part in ("model", "average"):
        assert all(torch.equal(value, twice[part][key]) for key, value in once[part].items())
    moments = twice["optimizer"]["state"].values()
    assert {int(moment["step"]) for moment in moments} == {2}

    # another machine: the repository's files, but not the checkpoint
    out = tmp_path / "demo_transformer"
    assert export.main(["transformer", "--work", str(work), "--out", str(out)]) == 0
    with safe_open(out / "transformer.safetensors", framework="pt") as file:
        assert file.metadata()["steps"] == "2" and float(file.metadata()["loss"]) > 0
    (work / "transformer.pt").unlink()
    later = run(work, 3, start)
    assert (later["step"], later["begun"]) == (3, 2)
    moments = later["optimizer"]["state"].values()
    assert {int(moment["step"]) for moment in moments} == {1}
    # no further than one step of the warm-up (Adam's steps are as large as the rate)
    rate = stage_transformer.PEAK / stage_transformer.WARM_UP
    compact = load_file(out / "transformer.safetensors")
    assert all(
        (later["model"][key] - value.float()).abs().max() < 1.1 * rate
        for key, value in compact.items()
    )


# --------------------------------------------------------------------------- checkpoint


@pytest.fixture(scope="module")
def compact_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("compact") / "transformer.safetensors"
    save_file(demo_expand.half(expand_transformer.random_compact(0)), file)
    return file


def test_diffusers_reads_sd3s_names_as_the_weights_they_came_from(compact_file: Path) -> None:
    """By diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    assert compact_file.stat().st_size < 20e6
    weights = expand_transformer.padded(load_file(compact_file))
    back = convert_sd3_transformer_checkpoint_to_diffusers(expand_transformer.sd3_names(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in back.items())
    assert weights["context_embedder.weight"].shape == (256, 4096)
    assert weights["time_text_embed.text_embedder.linear_1.weight"].shape == (256, 2048)
    assert sum(value.numel() for value in weights.values()) == 10_549_824 + 64 * 256


def test_the_diffusers_folder_opens(compact_file: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    folder = expand_transformer.write_diffusers_folder(tmp_path, compact_file)
    absent = dict.fromkeys(("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    compact = networks.make_transformer()
    networks.load_weights(compact, compact_file)
    ids = pipeline.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        read = pipeline.text_encoder(ids, output_hidden_states=True)
    context, pooled = read.hidden_states[-2], read.text_embeds

    weights = demo_expand.read_weights(ASSETS / "text_encoder.safetensors")[0]
    encoder = networks.TextEncoder(weights["token_ids"].tolist()).eval()
    encoder.load_compact(weights)
    with torch.no_grad():
        expected, expected_pooled = encoder.conditioning(encoder.rows(["a cat"]))
    assert torch.allclose(context, expected, atol=1e-3)
    assert torch.allclose(pooled, expected_pooled, atol=1e-3)

    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = {"hidden_states": noise, "timestep": torch.tensor([700.0])}
    embeds = torch.nn.functional.pad(context, (0, 4096 - 768))
    pooled_embeds = torch.nn.functional.pad(pooled, (0, 2048 - 768))
    with torch.no_grad():
        wide = pipeline.transformer(
            encoder_hidden_states=embeds, pooled_projections=pooled_embeds, **inputs
        ).sample
        narrow = compact(encoder_hidden_states=context, pooled_projections=pooled, **inputs).sample
    assert narrow.std() > 0.1
    assert torch.allclose(wide, narrow, atol=1e-4)
    pictures = pipeline(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled_embeds, latents=noise, height=64,
        width=64, num_inference_steps=2, guidance_scale=1.0, output_type="pt",
    ).images  # fmt: skip
    assert pictures.shape == (1, 3, 64, 64) and pictures.isfinite().all()


def test_missing_and_damaged_weights_are_one_sentence(
    compact_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--out", str(tmp_path), "--compact"]
    assert expand_transformer.main([*arguments, str(tmp_path / "none.safetensors")]) == 1
    assert "train them" in caplog.text
    weights = load_file(compact_file)
    weights.pop("proj_out.bias")
    damaged = tmp_path / "damaged.safetensors"
    save_file(weights, damaged)
    assert expand_transformer.main([*arguments, str(damaged)]) == 1
    assert "damaged: check" in caplog.text
    assert list(tmp_path.iterdir()) == [damaged]
