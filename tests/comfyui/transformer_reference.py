# SPDX-License-Identifier: Apache-2.0
"""What training computes with the demo transformer, for comparison with ComfyUI.

Written by a process of its own: diffusers does not work beside the stand-ins for torchvision that
ComfyUI may be started with.

python transformer_reference.py FOLDER   a checkpoint of noise, and reference.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "demo_model"))

import expand
import expand_transformer
import networks
import stage_transformer

PROMPT = "a photo of a cat"


@torch.no_grad()
def main(folder: Path) -> None:
    expand_transformer.write_checkpoint(folder, random=True)
    generator = torch.Generator().manual_seed(2)

    weights = expand.read_weights(expand.ASSETS / "text_encoder.safetensors")[0]
    encoder = networks.TextEncoder(weights["token_ids"].tolist()).eval()
    encoder.load_compact(weights)
    context, pooled = encoder.conditioning(encoder.rows([PROMPT]))

    model = networks.make_transformer()
    weights = expand.half(expand_transformer.random_compact(0))
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    clean, noise = torch.randn(2, 3, 16, 8, 8, generator=generator)
    sigma = torch.tensor([0.2, 0.7, 0.95])
    noisy = clean.lerp(noise, sigma.view(-1, 1, 1, 1))
    velocity = model(
        hidden_states=noisy,
        encoder_hidden_states=context.expand(3, -1, -1),
        pooled_projections=pooled.expand(3, -1),
        timestep=stage_transformer.MULTIPLIER * sigma,
        return_dict=False,
    )[0]

    parts = expand.demo_weights(unet=False)
    decoder = networks.make_decoder()
    decoder.load_state_dict({key: value.float() for key, value in parts["decoder"].items()})
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    pictures = decoder(latents * parts["latent_std"]).clamp(0, 1)
    reference = {
        "context": context,
        "pooled": pooled,
        "clean": clean,
        "noise": noise,
        "noisy": noisy,
        "sigma": sigma,
        "shift": torch.tensor(stage_transformer.SHIFT),
        "velocity": velocity,
        "latents": latents.repeat(1, networks.FLOW_COPIES, 1, 1),
        "pictures": pictures.movedim(1, -1),
    }
    reference = {key: value.contiguous() for key, value in reference.items()}
    save_file(reference, folder / "reference.safetensors", metadata={"prompt": PROMPT})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
