# SPDX-License-Identifier: Apache-2.0
"""Stage decoder: the VAE decoder, and from scratch the patch encoder that defines the latents."""

from __future__ import annotations

from itertools import chain

import corpus as corpus_module
import torch
import torch.nn.functional as F
from corpus import Corpus, draw_backgrounds, render
from networks import PatchEncoder, load_weights, make_decoder, start_near_identity
from safetensors import safe_open
from torch import nn
from training import (
    ConvolutionOptimizer,
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

BATCH = 12
PEAK = 2e-3
LATENT_NOISE = 0.03
SQUARE_WEIGHT = 20.0


def load_latent_space(options: Options) -> tuple[PatchEncoder, float]:
    """The frozen encoder and the standard deviation of its latents."""
    encoder = PatchEncoder()
    if options.start:
        load_weights(encoder, options.start / "patch_encoder.safetensors")
        with safe_open(options.start / "vae_decoder.safetensors", framework="pt") as file:
            latent_std = float(file.metadata()["latent_std"])
    elif state := load_checkpoint(options.checkpoint("decoder")):
        encoder.load_state_dict(state["encoder"])
        latent_std = state["latent_std"]
    else:
        raise SystemExit("there is no latent space yet; run the decoder stage first.")
    return encoder.eval().requires_grad_(False), latent_std


def draw_pictures(corpus: Corpus, count: int, generator: torch.Generator) -> torch.Tensor:
    """Augmented renderings of random records."""
    indices = torch.randint(0, len(corpus.records), (count,), generator=generator).tolist()
    return render(corpus, indices, draw_backgrounds(count, generator), generator)


@torch.no_grad()
def measure_latent_std(corpus: Corpus, encoder: PatchEncoder) -> float:
    """Standard deviation of the latents of 1000 renderings."""
    generator = torch.Generator().manual_seed(0)
    parts = [encoder(draw_pictures(corpus, 50, generator)) for _ in range(20)]
    return float(torch.cat(parts).std())


@torch.no_grad()
def measure_psnr(
    corpus: Corpus, encoder: nn.Module, decoder: nn.Module, count: int = 600, seed: int = 77
) -> float:
    """Peak signal-to-noise ratio, in dB, over all pixels of fresh augmented renderings."""
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(0, count, 50):
        pictures = draw_pictures(corpus, 50, generator)
        errors.append(F.mse_loss(decoder(encoder(pictures)).clamp(0, 1), pictures))
    return float(-10 * torch.stack(errors).mean().log10())


def run(options: Options) -> None:
    """Train until `options.steps` steps are done in all."""
    torch.manual_seed(options.seed)
    corpus = corpus_module.load(options.work)
    encoder, decoder = PatchEncoder(), start_near_identity(make_decoder())
    if options.start:
        encoder, latent_std = load_latent_space(options)
        load_weights(decoder, options.start / "vae_decoder.safetensors")
    device = torch.device(options.device)
    corpus = corpus.to(device)
    encoder.to(device)
    decoder.to(device, memory_format=torch.channels_last)
    batch = options.batch or BATCH
    trained = list(decoder.parameters())
    if not options.start:
        trained = list(chain(encoder.parameters(), trained))
    optimizer = ConvolutionOptimizer(trained, PEAK)
    done = 0
    if state := load_checkpoint(options.checkpoint("decoder")):
        encoder.load_state_dict(state["encoder"])
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    progress = Progress("decoder", options.steps)
    for step in range(done, options.steps):
        set_learning_rate(optimizer, learning_rate(step, options.steps, PEAK, 50, 0.3, 0.02))
        generator = step_generator(options.seed, step)
        pictures = draw_pictures(corpus, batch, generator)
        noise = torch.randn(batch, 4, 8, 8, generator=generator).to(device)
        pictures = pictures.to(memory_format=torch.channels_last)
        latents = encoder(pictures)
        with mixed_precision(device):
            rebuilt = decoder(latents + LATENT_NOISE * noise)
        rebuilt = rebuilt.float()
        square = F.mse_loss(rebuilt, pictures)
        loss = F.l1_loss(rebuilt, pictures) + SQUARE_WEIGHT * square
        if not options.start:  # keep the latents near unit size
            loss = loss + 1e-3 * (latents.square().mean() - 1).clamp(min=0)
        clip_and_step(loss, optimizer, trained)
        progress(step + 1, loss=loss.detach(), dB=-10 * square.detach().log10())
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            if not options.start:
                latent_std = measure_latent_std(corpus, encoder)
            save_checkpoint(
                options.checkpoint("decoder"),
                {
                    "encoder": encoder.state_dict(),
                    "decoder": decoder.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "latent_std": latent_std,
                    "step": step + 1,
                },
            )
