# SPDX-License-Identifier: Apache-2.0
"""Figures that need the corpus: what the VAE loses, and how often the evaluator is right."""

from __future__ import annotations

import corpus as corpus_module
from evaluator import Evaluator
from networks import load_weights, make_decoder, make_encoder
from score import cell
from stage_decoder import load_latent_space, measure_psnr
from stage_evaluator import measure_accuracy
from torch import nn
from training import Options, load_checkpoint


def load_part(options: Options, stage: str, network: nn.Module) -> nn.Module | None:
    """A part of the VAE from the weights to start from, else from its stage's checkpoint."""
    if options.start:
        return load_weights(network, options.start / f"vae_{stage}.safetensors").eval()
    state = load_checkpoint(options.checkpoint(stage))
    if state is None:
        return None
    network.load_state_dict(state[stage])
    return network.eval()


def run(options: Options) -> None:
    """Print the figures of the parts that the work folder, or `options.start`, holds."""
    corpus = corpus_module.load(options.work)
    teacher, _ = load_latent_space(options)
    if decoder := load_part(options, "decoder", make_decoder()):
        print(f"VAE decoder: {measure_psnr(corpus, teacher, decoder):.2f} dB")
        if encoder := load_part(options, "encoder", make_encoder()):
            print(f"with the TAESD encoder: {measure_psnr(corpus, encoder, decoder):.2f} dB")
    file = (options.start or options.work) / "evaluator.safetensors"
    if file.is_file():
        for head, counts in measure_accuracy(Evaluator.load(file), corpus).items():
            print(
                f"evaluator, {head}: {counts[0]}/{counts[1]} held-out renderings, {cell(*counts)}"
            )
