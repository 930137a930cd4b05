# SPDX-License-Identifier: Apache-2.0
"""Stage evaluator: the classifier that scores pictures; it must read what the decoder blurs."""

from __future__ import annotations

import random

import corpus as corpus_module
import torch
import torch.nn.functional as F
from corpus import BACKGROUNDS, FLAG, OBJECT, SIZE, STYLES, Corpus, draw_backgrounds, render
from evaluator import NOTHING, Evaluator, EvaluatorNetwork
from networks import make_decoder
from stage_decoder import load_latent_space
from training import (
    Options,
    Progress,
    clip_and_step,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
    set_learning_rate,
    step_generator,
)

BATCH, REBUILT_BATCH, EMPTY_BATCH = 48, 48, 6
PEAK = 2e-3
SEED_OFFSET = 5_000  # the evaluator never sees a rendering that the generator saw
IGNORE = -100  # no label: not part of the loss
REBUILT_PER_IMAGE = 6


def head_names(corpus: Corpus) -> dict[str, list[str]]:
    return {
        "object": [*corpus.names(OBJECT), NOTHING],
        "style": list(STYLES),
        "flag": [*corpus.names(FLAG), NOTHING],
    }


def labels(corpus: Corpus, indices: list[int], names: dict[str, list[str]]) -> dict:
    """Target columns per head, int64 [n]; flags have no style."""
    column = {head: {name: i for i, name in enumerate(row)} for head, row in names.items()}
    out: dict[str, list[int]] = {"object": [], "style": [], "flag": []}
    for record in (corpus.records[index] for index in indices):
        shows = record.name if record.kind == OBJECT else NOTHING
        out["object"].append(column["object"][shows])
        out["flag"].append(column["flag"][record.name if record.kind == FLAG else NOTHING])
        out["style"].append(column["style"][record.style] if record.kind == OBJECT else IGNORE)
    return {head: torch.tensor(values) for head, values in out.items()}


def empty_pictures(count: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures of nothing: plain backgrounds and blurred noise on them."""
    colours = torch.tensor(list(BACKGROUNDS.values())).float() / 255
    base = colours[torch.randint(0, len(colours), (count,), generator=generator)]
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    strength = 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = F.interpolate(noise * strength, (SIZE, SIZE), mode="bilinear")
    return (base.view(count, 3, 1, 1) + noise).clamp(0, 1)


def soften(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur some pictures and add a little noise to all."""
    small = int(torch.randint(14, SIZE, (1,), generator=generator))
    blurred = F.interpolate(pictures, (small, small), mode="bilinear", antialias=True)
    blurred = F.interpolate(blurred, (SIZE, SIZE), mode="bilinear")
    half = torch.rand(len(pictures), generator=generator) < 0.5
    pictures = torch.where(half.view(-1, 1, 1, 1), blurred, pictures)
    noise = torch.randn(pictures.shape, generator=generator)
    strength = 0.06 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return (pictures + strength * noise).clamp(0, 1)


@torch.no_grad()
def rebuild(corpus: Corpus, options: Options) -> tuple[torch.Tensor, list[int]]:
    """Renderings after VAE encoder and decoder, float16 [n, 3, SIZE, SIZE], and their records."""
    encoder, _ = load_latent_space(options)
    decoder = make_decoder()
    decoder.load_state_dict(load_checkpoint(options.checkpoint("decoder"))["decoder"])
    decoder = decoder.eval().to(memory_format=torch.channels_last)
    generator = step_generator(options.seed + SEED_OFFSET, -1)
    indices = list(range(len(corpus.records))) * REBUILT_PER_IMAGE
    out = []
    for start in range(0, len(indices), 64):
        part = indices[start : start + 64]
        pictures = render(corpus, part, draw_backgrounds(len(part), generator), generator)
        latents = encoder(pictures)
        disturbance = 0.3 * torch.rand(len(part), 1, 1, 1, generator=generator)
        latents = latents + disturbance * torch.randn(latents.shape, generator=generator)
        out.append(decoder(latents).clamp(0, 1).half())
    return torch.cat(out), indices


def measure_accuracy(
    judge: Evaluator, corpus: Corpus, count: int = 2000, seed: int = 990_001
) -> dict[str, tuple[int, int]]:
    """Right answers and questions per head on fresh augmented renderings."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    tally = {head: [0, 0] for head in judge.names}
    for _ in range(0, count, 100):
        indices = [rng.randrange(len(corpus.records)) for _ in range(100)]
        pictures = render(corpus, indices, draw_backgrounds(100, generator), generator)
        answers = judge.probabilities(pictures.permute(0, 2, 3, 1))
        truth = labels(corpus, indices, judge.names)
        asked = {
            "object": truth["object"] != len(judge.names["object"]) - 1,
            "style": truth["style"] != IGNORE,
            "flag": truth["flag"] != len(judge.names["flag"]) - 1,
        }
        for head, mask in asked.items():
            right = (answers[head].argmax(-1) == truth[head]) & mask
            tally[head][0] += int(right.sum())
            tally[head][1] += int(mask.sum())
    return {head: (hits, trials) for head, (hits, trials) in tally.items()}


def run(options: Options) -> None:
    """Train until `options.steps` steps are done in all."""
    seed = options.seed + SEED_OFFSET
    torch.manual_seed(seed)
    corpus = corpus_module.load(options.work)
    names = head_names(corpus)
    rebuilt, rebuilt_records = rebuild(corpus, options)
    network = EvaluatorNetwork({head: len(row) for head, row in names.items()})
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK, weight_decay=0.02)
    done = 0
    if state := load_checkpoint(options.checkpoint("evaluator")):
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    progress = Progress("evaluator", options.steps, every=50)
    for step in range(done, options.steps):
        set_learning_rate(optimizer, learning_rate(step, options.steps, PEAK, 50, 0.4, 0.01))
        generator = step_generator(seed, step)
        fresh = torch.randint(0, len(corpus.records), (BATCH,), generator=generator).tolist()
        pictures = render(corpus, fresh, draw_backgrounds(BATCH, generator), generator)
        pictures = soften(pictures, generator)
        chosen = torch.randint(0, len(rebuilt), (REBUILT_BATCH,), generator=generator)
        records = fresh + [rebuilt_records[int(i)] for i in chosen]
        nothing = empty_pictures(EMPTY_BATCH, generator)
        batch = torch.cat([pictures, rebuilt[chosen].float(), nothing])
        truth = labels(corpus, records, names)
        empty = {head: IGNORE if head == "style" else len(row) - 1 for head, row in names.items()}
        answers = network(batch)
        loss = torch.zeros(())
        for head, logits in answers.items():
            target = torch.cat([truth[head], torch.full((EMPTY_BATCH,), empty[head])])
            loss = loss + F.cross_entropy(logits, target, ignore_index=IGNORE, label_smoothing=0.05)
        clip_and_step(loss, optimizer, network.parameters())
        progress(step + 1, loss=loss.item())
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_checkpoint(
                options.checkpoint("evaluator"),
                {
                    "model": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "names": names,
                    "step": step + 1,
                },
            )
    Evaluator(network, names).save(options.work / "evaluator.safetensors")
