# SPDX-License-Identifier: Apache-2.0
"""Stage UNet: noise prediction on the frozen latents under the frozen text encoder."""

from __future__ import annotations

import copy
import logging
import random
from dataclasses import dataclass

import corpus as corpus_module
import torch
from captions import caption
from corpus import OBJECT, Corpus, draw_backgrounds, render
from networks import WIDTH, WINDOW, PatchEncoder, alphas_cumprod, load_weights, make_unet
from stage_decoder import load_latent_space
from stage_text import load_text_encoder
from training import (
    Options,
    Progress,
    clip_and_step,
    learning_rate,
    load_checkpoint,
    mixed_precision,
    save_checkpoint,
    set_learning_rate,
    step_generator,
)

log = logging.getLogger("lacuna.demo_model")

BATCH = 24
PEAK = 4e-4
EMA_DECAY = 0.999
EMPTY_CAPTIONS = 0.1
SNR_LIMIT = 5.0
OBJECT_SHARE = 0.85  # of the pictures
STYLE_WEIGHT = 3.0  # of captions that name their style: styles are learned last


@dataclass(frozen=True)
class Pool:
    """Captions encoded beforehand; the pictures are rendered anew at every step."""

    records: torch.Tensor  # int64 [n]: which record each caption describes
    backgrounds: list[str]  # [n]
    prompts: list[str]  # [n]
    rows: torch.Tensor  # int64 [n]: where the caption's hidden states stand in `hidden`
    hidden: torch.Tensor  # float16 [distinct captions + 1, WINDOW, WIDTH]; the last: no caption
    weights: torch.Tensor  # float32 [n]: how often an entry is drawn, relatively

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)


def choose_captions(corpus: Corpus, per_image: int, seed: int) -> tuple[list[int], list[str], list]:
    """Records, backgrounds and captions of the pool."""
    rng, generator = random.Random(f"pool {seed}"), step_generator(seed, -1)
    records = [index for index in range(len(corpus.records)) for _ in range(per_image)]
    backgrounds = draw_backgrounds(len(records), generator)
    prompts = [
        caption(corpus.records[index], background, rng)
        for index, background in zip(records, backgrounds, strict=True)
    ]
    return records, backgrounds, prompts


def draw_weights(corpus: Corpus, records: list[int], prompts: list[str]) -> torch.Tensor:
    """How often each entry of a pool is drawn, relatively: float32 [n]."""
    named = torch.tensor(
        [corpus.records[i].style in prompt for i, prompt in zip(records, prompts, strict=True)]
    )
    is_object = torch.tensor([corpus.records[index].kind == OBJECT for index in records])
    weights = torch.where(is_object & named, STYLE_WEIGHT, 1.0)
    objects, flags = weights[is_object].sum(), weights[~is_object].sum()
    return weights * torch.where(is_object, OBJECT_SHARE / objects, (1 - OBJECT_SHARE) / flags)


def make_pool(corpus: Corpus, options: Options) -> Pool:
    """Encode the pool's captions, or read what an earlier run encoded."""
    records, backgrounds, prompts = choose_captions(corpus, options.pool, options.seed)
    distinct = [*sorted(set(prompts)), ""]
    cache = options.work / "captions.pt"
    state = load_checkpoint(cache)
    if state is None or state["prompts"] != distinct:
        device = torch.device(options.device)
        encoder = load_text_encoder(options).to(device)
        hidden = torch.empty(len(distinct), WINDOW, WIDTH, dtype=torch.float16)
        for start in range(0, len(distinct), 32):
            part = distinct[start : start + 32]
            hidden[start : start + 32] = encoder(encoder.rows(part).to(device)).half().cpu()
        log.info("encoded %d distinct captions", len(distinct))
        state = {"prompts": distinct, "hidden": hidden}
        save_checkpoint(cache, state)
    row = {prompt: index for index, prompt in enumerate(distinct)}
    return Pool(
        torch.tensor(records),
        backgrounds,
        prompts,
        torch.tensor([row[prompt] for prompt in prompts]),
        state["hidden"],
        draw_weights(corpus, records, prompts),
    )


@torch.no_grad()
def draw_latents(
    corpus: Corpus,
    pool: Pool,
    entries: torch.Tensor,
    encoder: PatchEncoder,
    latent_std: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Latents of unit variance of fresh renderings of the pool's entries."""
    pictures = render(
        corpus,
        pool.records[entries].tolist(),
        [pool.backgrounds[int(entry)] for entry in entries],
        generator,
    )
    return encoder(pictures) / latent_std


def run(options: Options) -> None:
    """Train until `options.steps` steps are done in all."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    batch = options.batch or BATCH
    corpus = corpus_module.load(options.work)
    pool = make_pool(corpus, options)
    corpus, hidden = corpus.to(device), pool.hidden.to(device)
    encoder, latent_std = load_latent_space(options)
    encoder.to(device)
    unet = make_unet()
    if options.start:
        load_weights(unet, options.start / "unet.safetensors")
    unet.to(device)
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=PEAK, weight_decay=0.01, fused=True)
    done = 0
    if state := load_checkpoint(options.checkpoint("unet")):
        unet.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    parameters, averages = list(unet.parameters()), list(average.parameters())
    signal = alphas_cumprod()
    ratio = signal / (1 - signal)
    importance = ratio.clamp(max=SNR_LIMIT) / ratio  # min-SNR weights, as the density of the times
    progress = Progress("unet", options.steps)
    for step in range(done, options.steps):
        set_learning_rate(optimizer, learning_rate(step, options.steps, PEAK, hold=0.2))
        generator = step_generator(options.seed, step)
        entries = pool.draw(batch, generator)
        latents = draw_latents(corpus, pool, entries, encoder, latent_std, generator)
        rows = pool.rows[entries]
        rows[torch.rand(batch, generator=generator) < EMPTY_CAPTIONS] = len(hidden) - 1
        times = torch.multinomial(importance, batch, replacement=True, generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        a = signal[times].view(-1, 1, 1, 1).to(device)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        with mixed_precision(device):
            guess = unet(noisy, times.to(device), hidden[rows.to(device)].float()).sample
        loss = (guess.float() - noise).square().mean()
        clip_and_step(loss, optimizer, parameters)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        progress(step + 1, loss=loss.detach())
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_checkpoint(
                options.checkpoint("unet"),
                {
                    "model": unet.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
