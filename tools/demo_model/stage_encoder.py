# SPDX-License-Identifier: Apache-2.0
"""Stage encoder: a TAESD-shaped encoder that reproduces the frozen latents, for image-to-image."""

from __future__ import annotations

import corpus as corpus_module
import torch
import torch.nn.functional as F
from networks import load_weights, make_encoder, start_near_identity
from stage_decoder import draw_pictures, load_latent_space
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


def run(options: Options) -> None:
    """Train until `options.steps` steps are done in all."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    batch = options.batch or BATCH
    corpus = corpus_module.load(options.work).to(device)
    teacher, latent_std = load_latent_space(options)
    teacher.to(device)
    encoder = start_near_identity(make_encoder())
    if options.start and (options.start / "vae_encoder.safetensors").is_file():
        load_weights(encoder, options.start / "vae_encoder.safetensors")
    encoder.to(device, memory_format=torch.channels_last)
    optimizer = ConvolutionOptimizer(encoder.parameters(), PEAK)
    done = 0
    if state := load_checkpoint(options.checkpoint("encoder")):
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    progress = Progress("encoder", options.steps)
    for step in range(done, options.steps):
        set_learning_rate(optimizer, learning_rate(step, options.steps, PEAK, 50, 0.4, 0.02))
        pictures = draw_pictures(corpus, batch, step_generator(options.seed, step))
        wanted = teacher(pictures)
        with mixed_precision(device):
            found = encoder(pictures.to(memory_format=torch.channels_last))
        loss = F.smooth_l1_loss(found.float(), wanted, beta=0.2)
        clip_and_step(loss, optimizer, encoder.parameters())
        unexplained = F.mse_loss(found.detach().float(), wanted) / latent_std**2
        progress(step + 1, loss=loss.detach(), unexplained=unexplained)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_checkpoint(
                options.checkpoint("encoder"),
                {
                    "encoder": encoder.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
