# SPDX-License-Identifier: Apache-2.0
"""Stage transformer: the second generator, a rectified flow in SD3's shape.

It learns on the frozen latents under the frozen text encoder of the first. The learning rate is
constant, so that a run can be stopped at any moment and go on anywhere: from its checkpoint, or
from the compact weights alone (`demo_transformer/` beside the folder to start from).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import corpus as corpus_module
import torch
from corpus import Corpus, render
from networks import (
    FLOW_COPIES,
    LATENT_CHANNELS,
    LATENT_SIZE,
    WIDTH,
    WINDOW,
    load_weights,
    make_transformer,
)
from safetensors import safe_open
from stage_decoder import load_latent_space
from stage_text import load_text_encoder
from stage_unet import EMPTY_CAPTIONS, choose_captions, draw_weights
from torch import nn
from training import (
    Options,
    Progress,
    clip_and_step,
    load_checkpoint,
    mixed_precision,
    save_checkpoint,
    set_learning_rate,
    step_generator,
)

log = logging.getLogger("lacuna.demo_model")

BATCH = 64
PEAK = 1e-3
WARM_UP = 200  # steps, after every start without the optimiser's state
EMA_DECAY = 0.999
# Positions of the context that are read: all captions end before the 20th, and what follows costs
# more than it teaches. Programs read the whole window, so every WHOLE_EVERY-th step does, too.
SHORT, WHOLE_EVERY = 20, 16
RENDERINGS = 8  # of every caption, encoded beforehand
# Noise levels are logit-normal around the middle of SD3's schedule (shift 3).
SHIFT, SPREAD = 3.0, 1.2
MULTIPLIER = 1000.0  # timestep of a noise level
SAVE_SECONDS = 120.0  # between checkpoints at most: in the background a step can take long


@dataclass(frozen=True)
class Pool:
    """Captions and pictures encoded beforehand."""

    rows: torch.Tensor  # int64 [n]: where the caption stands in `hidden` and `pooled`
    hidden: torch.Tensor  # float16 [distinct captions + 1, WINDOW, WIDTH]; the last: no caption
    pooled: torch.Tensor  # float32 [distinct captions + 1, WIDTH]
    latents: torch.Tensor  # float16 [n, RENDERINGS, channels, size, size] of unit variance
    weights: torch.Tensor  # float32 [n]: how often an entry is drawn, relatively


@torch.no_grad()
def encode_captions(prompts: list[str], options: Options) -> dict:
    """The conditioning of the prompts, or what an earlier run encoded."""
    cache = options.work / "transformer_captions.pt"
    state = load_checkpoint(cache)
    if state is None or state["prompts"] != prompts:
        encoder = load_text_encoder(options).to(options.device)
        hidden = torch.empty(len(prompts), WINDOW, WIDTH, dtype=torch.float16)
        pooled = torch.empty(len(prompts), WIDTH)
        for start in range(0, len(prompts), 32):
            part = slice(start, start + 32)
            hidden[part], pooled[part] = encoder.conditioning(
                encoder.rows(prompts[part]).to(options.device)
            )
        log.info("encoded %d distinct captions", len(prompts))
        state = {"prompts": prompts, "hidden": hidden, "pooled": pooled}
        save_checkpoint(cache, state)
    return state


@torch.no_grad()
def encode_pictures(
    corpus: Corpus, records: list[int], backgrounds: list[str], options: Options
) -> torch.Tensor:
    """Latents of RENDERINGS pictures of every entry, or what an earlier run encoded."""
    cache = options.work / "transformer_latents.pt"
    state = load_checkpoint(cache)
    if state is None or state["records"] != records or state["backgrounds"] != backgrounds:
        corpus = corpus.to(options.device)
        encoder, latent_std = load_latent_space(options)
        encoder.to(options.device)
        shape = (len(records), RENDERINGS, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        latents = torch.empty(shape, dtype=torch.float16)
        generator = step_generator(options.seed, -2)
        for rendering in range(RENDERINGS):
            for start in range(0, len(records), 64):
                part = slice(start, start + 64)
                pictures = render(corpus, records[part], backgrounds[part], generator)
                latents[part, rendering] = (encoder(pictures) / latent_std).half().cpu()
        log.info("encoded %d pictures", len(records) * RENDERINGS)
        state = {"records": records, "backgrounds": backgrounds, "latents": latents}
        save_checkpoint(cache, state)
    return state["latents"]


def make_pool(options: Options) -> Pool:
    """Everything that training reads, on its device."""
    corpus = corpus_module.load(options.work)
    records, backgrounds, prompts = choose_captions(corpus, options.pool, options.seed)
    distinct = [*sorted(set(prompts)), ""]
    row = {prompt: index for index, prompt in enumerate(distinct)}
    captions = encode_captions(distinct, options)
    return Pool(
        torch.tensor([row[prompt] for prompt in prompts]),
        captions["hidden"].to(options.device),
        captions["pooled"].to(options.device),
        encode_pictures(corpus, records, backgrounds, options).to(options.device),
        draw_weights(corpus, records, prompts),
    )


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal sigmas in 0..1, one from each of `count` equal shares of their distribution."""
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    normal = torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4))
    return torch.sigmoid(math.log(SHIFT) + SPREAD * normal)


def flow_loss(
    model: nn.Module, pool: Pool, step: int, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the velocity, noise - clean, at (1 - sigma) clean + sigma noise."""
    entries = torch.multinomial(pool.weights, count, replacement=True, generator=generator)
    rendering = torch.randint(0, RENDERINGS, (count,), generator=generator)
    rows = pool.rows[entries]
    rows[torch.rand(count, generator=generator) < EMPTY_CAPTIONS] = len(pool.hidden) - 1
    sigma = noise_levels(count, generator)
    shape = (count, FLOW_COPIES * LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    noise = torch.randn(shape, generator=generator)
    device = pool.hidden.device
    sigma, noise, rows = sigma.to(device), noise.to(device), rows.to(device)
    clean = pool.latents[entries.to(device), rendering.to(device)].float()
    clean = clean.repeat(1, FLOW_COPIES, 1, 1)
    window = SHORT if (step + 1) % WHOLE_EVERY else WINDOW
    with mixed_precision(device):
        velocity = model(
            hidden_states=torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1)),
            encoder_hidden_states=pool.hidden[rows, :window].float(),
            pooled_projections=pool.pooled[rows],
            timestep=MULTIPLIER * sigma,
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - clean)).square().mean()


def learning_rate(step: int, begun: int, total: int, cool_down: int) -> float:
    """Warm up from the step `begun` on, stay, and fall to nothing in the last `cool_down` steps."""
    rise = min(1.0, (step - begun + 1) / WARM_UP)
    return PEAK * rise * min(1.0, (total - step) / max(cool_down, 1))


def compact_weights(options: Options) -> Path | None:
    """The compact weights to go on from, where there are some."""
    if options.start is None:
        return None
    file = options.start.parent / "demo_transformer" / "transformer.safetensors"
    return file if file.is_file() else None


def run(options: Options) -> None:
    """Train until `options.steps` steps are done in all."""
    device = torch.device(options.device)
    pool = make_pool(options)
    torch.manual_seed(options.seed)
    model = make_transformer()
    done = 0
    state = load_checkpoint(options.checkpoint("transformer"))
    if state is None and (file := compact_weights(options)):
        load_weights(model, file)
        with safe_open(file, framework="pt") as weights:
            done = int(weights.metadata()["steps"])
    model.to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    begun = done
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done, begun = state["step"], state["begun"]
    parameters, averages = list(model.parameters()), list(average.parameters())
    progress, saved = Progress("transformer", options.steps), time.monotonic()
    count = options.batch or BATCH
    for step in range(done, options.steps):
        rate = learning_rate(step, begun, options.steps, options.cool_down)
        set_learning_rate(optimizer, rate)
        loss = flow_loss(model, pool, step, count, step_generator(options.seed, step))
        clip_and_step(loss, optimizer, parameters)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        progress(step + 1, loss=loss.detach())
        late = time.monotonic() - saved > SAVE_SECONDS
        if late or (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_checkpoint(
                options.checkpoint("transformer"),
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "begun": begun,
                    "loss": float(progress.means["loss"]),
                },
            )
            saved = time.monotonic()
