# SPDX-License-Identifier: Apache-2.0
"""Stage text: the text encoder, trained so that captions find their pictures."""

from __future__ import annotations

import random

import corpus as corpus_module
import torch
import torch.nn.functional as F
from captions import all_phrases, caption
from corpus import Corpus, draw_backgrounds, render
from networks import EMBEDDING, WIDTH, ImageTower, TextEncoder, used_token_ids
from safetensors.torch import load_file
from torch import nn
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

BATCH, ANCHOR_BATCH = 48, 8
PEAK_SCRATCH, PEAK_CONTINUED = 5e-4, 2e-4
ANCHOR_WEIGHT = 10.0


class Contrastive(nn.Module):
    """Both towers and what joins them."""

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__()
        self.text = TextEncoder(token_ids)
        self.image = ImageTower()
        self.text_projection = nn.Linear(WIDTH, EMBEDDING, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))

    def forward(self, rows: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Similarity of every picture (rows) to every caption (columns)."""
        ends = self.text.ends(rows)
        # causal attention: what stands behind the longest caption cannot change what is read
        hidden = self.text(rows[:, : int(ends.max()) + 1])
        captions = self.text_projection(hidden[torch.arange(len(rows)), ends])
        pictures = F.normalize(self.image(images), dim=-1)
        return self.logit_scale.exp().clamp(max=50) * pictures @ F.normalize(captions, dim=-1).T


class Anchor:
    """Keeps hidden states where an earlier encoder had them, so that its UNet stays valid."""

    def __init__(self, corpus: Corpus, earlier: dict[str, torch.Tensor]) -> None:
        ids = earlier["token_ids"].tolist()
        known = set(ids)
        self._encoder = TextEncoder(ids).eval()
        self._encoder.load_compact(dict(earlier))
        self._indices = [
            index
            for index, record in enumerate(corpus.records)
            if known.issuperset(used_token_ids(record.words))
        ]
        self._corpus = corpus

    def loss(self, model: TextEncoder, rng: random.Random) -> torch.Tensor:
        """Mean squared change of the hidden states of known captions, over the whole window."""
        indices = rng.sample(self._indices, ANCHOR_BATCH)
        names = list(corpus_module.BACKGROUNDS)
        prompts = [caption(self._corpus.records[i], rng.choice(names), rng) for i in indices]
        with torch.no_grad():
            before = self._encoder(self._encoder.rows(prompts))
        return F.mse_loss(model(model.rows(prompts)), before)


def make_batch(
    corpus: Corpus, seed: int, step: int, count: int
) -> tuple[list[str], torch.Tensor, random.Random]:
    """Captions and pictures of distinct records for one step."""
    rng, generator = random.Random(f"{seed}/{step}"), step_generator(seed, step)
    indices = rng.sample(range(len(corpus.records)), min(count, len(corpus.records)))
    backgrounds = draw_backgrounds(len(indices), generator)
    pictures = render(corpus, indices, backgrounds, generator)
    prompts = [
        caption(corpus.records[index], background, rng)
        for index, background in zip(indices, backgrounds, strict=True)
    ]
    return prompts, pictures, rng


def load_text_encoder(options: Options) -> TextEncoder:
    """The frozen result of this stage, or of the weights to continue from."""
    if state := load_checkpoint(options.checkpoint("text")):
        encoder = TextEncoder(state["token_ids"])
        prefix = "text."
        encoder.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
        )
    elif options.start:
        weights = load_file(options.start / "text_encoder.safetensors")
        encoder = TextEncoder(weights["token_ids"].tolist())
        encoder.load_compact(weights)
    else:
        raise SystemExit("the text encoder is not trained yet; run the text stage first.")
    return encoder.eval().requires_grad_(False)


def run(options: Options) -> None:
    """Train until `options.steps` steps are done in all."""
    torch.manual_seed(options.seed)
    corpus = corpus_module.load(options.work)
    model = Contrastive(used_token_ids(all_phrases(corpus)))
    anchor, peak = None, PEAK_SCRATCH
    if options.start:
        earlier = load_file(options.start / "text_encoder.safetensors")
        model.text.load_compact(dict(earlier))
        tower = options.start / "contrastive_tower.safetensors"
        if tower.is_file():
            model.load_state_dict(load_file(tower), strict=False)
        anchor, peak = Anchor(corpus, earlier), PEAK_CONTINUED
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    done = 0
    if state := load_checkpoint(options.checkpoint("text")):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]

    progress = Progress("text", options.steps)
    for step in range(done, options.steps):
        set_learning_rate(optimizer, learning_rate(step, options.steps, peak, 40, 0.5, 0.02))
        prompts, pictures, rng = make_batch(corpus, options.seed, step, BATCH)
        logits = model(model.text.rows(prompts), pictures)
        own = torch.arange(len(prompts))
        contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        drift = anchor.loss(model.text, rng) if anchor else torch.zeros(())
        clip_and_step(contrast + ANCHOR_WEIGHT * drift, optimizer, model.parameters())
        accuracy = (logits.argmax(1) == own).float().mean().item()
        progress(step + 1, loss=contrast.item(), right=accuracy, drift=drift.item())
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_checkpoint(
                options.checkpoint("text"),
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "token_ids": model.text.token_ids,
                    "step": step + 1,
                },
            )
