# SPDX-License-Identifier: Apache-2.0
"""Figures that need the corpus: what the VAE loses, and how often the evaluator is right."""

from __future__ import annotations

import corpus as corpus_module
from evaluator import Evaluator
from networks import make_decoder, make_encoder
from score import cell
from stage_decoder import load_latent_space, measure_psnr
from stage_evaluator import measure_accuracy
from training import Options, load_checkpoint


def run(options: Options) -> None:
    """Print the figures of the parts that the work folder holds."""
    corpus = corpus_module.load(options.work)
    state = load_checkpoint(options.checkpoint("decoder"))
    decoder = make_decoder().eval()
    decoder.load_state_dict(state["decoder"])
    teacher, _ = load_latent_space(options)
    print(f"VAE decoder, step {state['step']}: {measure_psnr(corpus, teacher, decoder):.2f} dB")
    if trained := load_checkpoint(options.checkpoint("encoder")):
        encoder = make_encoder().eval()
        encoder.load_state_dict(trained["encoder"])
        print(f"with the TAESD encoder: {measure_psnr(corpus, encoder, decoder):.2f} dB")
    file = options.work / "evaluator.safetensors"
    if file.is_file():
        for head, counts in measure_accuracy(Evaluator.load(file), corpus).items():
            print(
                f"evaluator, {head}: {counts[0]}/{counts[1]} held-out renderings, {cell(*counts)}"
            )
