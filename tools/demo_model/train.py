# SPDX-License-Identifier: Apache-2.0
"""Train the demo model. Every stage resumes where its checkpoint in the work folder stands.

python tools/demo_model/train.py corpus      fetch the artwork (150 MB) and build the image table
python tools/demo_model/train.py text        text encoder, against an image tower; then frozen
python tools/demo_model/train.py decoder     VAE decoder (without --start: and the latent space)
python tools/demo_model/train.py unet        the UNet
python tools/demo_model/train.py transformer the second generator, in SD3's shape
python tools/demo_model/train.py evaluator   the classifier that scores pictures
python tools/demo_model/train.py encoder     VAE encoder, to reproduce the frozen latents
python tools/demo_model/train.py all         all of these but the transformer
python tools/demo_model/train.py gates       what the VAE loses, how often the evaluator is right
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from pathlib import Path

import corpus
import torch
from training import Options

# stage -> the number of steps that makes a good model from scratch
STEPS = {"text": 1100, "decoder": 3000, "unet": 5000, "evaluator": 1500, "encoder": 600}
SECOND = {"transformer": 20_000}


def build_corpus(options: Options) -> None:
    """Fetch the packages and write the image table, unless it is there."""
    try:
        corpus.load(options.work)
    except corpus.CorpusError:
        corpus.save(corpus.build(options.work / "corpus"), options.work)


def run_stage(stage: str, options: Options) -> None:
    """Run one stage to its end."""
    if stage == "corpus":
        build_corpus(options)
    else:
        name = stage if stage == "gates" else f"stage_{stage}"
        importlib.import_module(name).run(options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["corpus", *STEPS, *SECOND, "all", "gates"])
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"), metavar="DIR",
                        help="corpus and checkpoints (default %(default)s)")  # fmt: skip
    parser.add_argument("--start", type=Path, metavar="DIR",
                        help="compact weights to continue from")  # fmt: skip
    parser.add_argument("--steps", type=int, help="steps of the stage, over all its runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="for the UNet and VAE stages")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--pool", type=int, default=24, help="captions per image (generators)")
    parser.add_argument("--batch", type=int, help="pictures of a step (generators and VAE)")
    parser.add_argument("--cool-down", type=int, default=0, metavar="STEPS",
                        help="last steps, of falling learning rate (transformer)")  # fmt: skip
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    stages = ["corpus", *STEPS] if options.stage == "all" else [options.stage]
    try:
        for stage in stages:
            run_stage(
                stage,
                Options(
                    work=options.work,
                    steps=options.steps or (STEPS | SECOND).get(stage, 0),
                    seed=options.seed,
                    device=options.device,
                    start=options.start,
                    save_every=options.save_every,
                    pool=options.pool,
                    batch=options.batch,
                    cool_down=options.cool_down,
                ),
            )
    except corpus.CorpusError as error:
        logging.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
