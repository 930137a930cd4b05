# SPDX-License-Identifier: Apache-2.0
"""The networks of the demo model and its training: text encoder, UNet, VAE parts, image tower."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]

WIDTH, WINDOW = 768, 77  # of the text encoder
TEXT_LAYERS = 2
LATENT_CHANNELS, LATENT_SIZE = 4, 8
FLOW_COPIES = 4  # SD3's shape has 16 latent channels: each of ours, four times
EMBEDDING = 512  # of the contrastive training
START_ID, END_ID = 49406, 49407


@cache
def tokenizer() -> Tokenizer:
    """CLIP's byte-pair tokenizer."""
    sys.path.insert(0, str(REPOSITORY))
    try:
        from python_shim import clip_bpe
    finally:
        sys.path.remove(str(REPOSITORY))
    return clip_bpe.make_tokenizer()


def used_token_ids(phrases: Iterable[str]) -> list[int]:
    """The distinct token ids of the phrases in ascending order: start and end come last."""
    ids = {START_ID, END_ID}
    for phrase in phrases:
        ids.update(tokenizer().encode(phrase).ids)
    return sorted(ids)


class TextEncoder(nn.Module):
    """A CLIP-L shaped text encoder with few layers and rows for the used tokens only."""

    def __init__(self, token_ids: Sequence[int], layers: int = TEXT_LAYERS) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.token_ids = list(token_ids)
        self._row = {token: row for row, token in enumerate(self.token_ids)}
        self.model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.token_ids),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=layers,
                num_attention_heads=WIDTH // 64,
                max_position_embeddings=WINDOW,
                hidden_act="quick_gelu",
                bos_token_id=self._row[START_ID],
                eos_token_id=self._row[END_ID],
                pad_token_id=self._row[END_ID],
            )
        )

    def rows(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embedding rows of the prompts, int64 [n, WINDOW], padded with end tokens."""
        end = self._row[END_ID]
        out = torch.full((len(prompts), WINDOW), end)
        for line, prompt in zip(out, prompts, strict=True):
            ids = tokenizer().encode(prompt).ids[: WINDOW - 1]
            line[: len(ids)] = torch.tensor([self._row[token] for token in ids])
        return out

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, positions, WIDTH] after the final norm."""
        return self.model(input_ids=rows).last_hidden_state

    def conditioning(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What SD3 reads: hidden states before the final norm [n, positions, WIDTH], and the normed
        state of the first end token [n, WIDTH], not projected.

        SD3 takes the last layer but one of twelve; all that follow ours change nothing.
        """
        output = self.model(input_ids=rows, output_hidden_states=True)
        first = torch.arange(len(rows), device=rows.device)
        return output.hidden_states[-1], output.last_hidden_state[first, self.ends(rows)]

    def ends(self, rows: torch.Tensor) -> torch.Tensor:
        """The position of each prompt's first end token, int64 [n]."""
        return (rows == self._row[END_ID]).int().argmax(1)

    def compact(self) -> dict[str, torch.Tensor]:
        """The weights in the layout of text_encoder.safetensors."""
        weights = {key.removeprefix("text_model."): w for key, w in self.model.state_dict().items()}
        weights.pop("embeddings.position_ids", None)
        weights["token_rows"] = weights.pop("embeddings.token_embedding.weight")
        return weights | {"token_ids": torch.tensor(self.token_ids)}

    @torch.no_grad()
    def load_compact(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over compact weights; rows of tokens they lack are drawn like those they have."""
        weights = {
            key: value if key == "token_ids" else value.float() for key, value in weights.items()
        }
        ids, known = weights.pop("token_ids").tolist(), weights.pop("token_rows")
        table = torch.randn(len(self.token_ids), WIDTH) * known.std()
        for token, row in zip(ids, known, strict=True):
            if token in self._row:
                table[self._row[token]] = row
        weights["embeddings.token_embedding.weight"] = table
        prefix = "text_model." if "text_model.final_layer_norm.bias" in self.keys() else ""
        missing, unexpected = self.model.load_state_dict(
            {prefix + key: value for key, value in weights.items()}, strict=False
        )
        missing = [key for key in missing if not key.endswith("position_ids")]
        if missing or unexpected:
            raise ValueError(f"text encoder weights do not fit: {missing + unexpected}.")

    def keys(self) -> set[str]:
        """Names of the transformers model's weights (they differ between its versions)."""
        return set(self.model.state_dict())


class ImageTower(nn.Module):
    """The image side of the contrastive training: pictures [n, 3, 64, 64] -> [n, EMBEDDING]."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()

        def layer(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
            )

        w = width
        self.f = nn.Sequential(
            layer(3, w, 2),
            layer(w, w, 1),
            layer(w, 2 * w, 2),
            layer(2 * w, 2 * w, 1),
            layer(2 * w, 4 * w, 2),
            layer(4 * w, 4 * w, 1),
            layer(4 * w, 4 * w, 2),
        )
        self.p = nn.Linear(4 * w * 16, EMBEDDING)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.p(self.f(images * 2 - 1).flatten(1))


def make_unet() -> nn.Module:
    """SD1.x's UNet with one level and one residual block: 25.8 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(320,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )


def make_transformer(blocks: int = 4, heads: int = 4) -> nn.Module:
    """SD3's transformer with four blocks of width 256, for one text encoder of the three: 9.4 M
    parameters. A checkpoint has zero columns for the other two (10.5 M)."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=FLOW_COPIES * LATENT_CHANNELS,
        out_channels=FLOW_COPIES * LATENT_CHANNELS,
        num_layers=blocks,
        num_attention_heads=heads,
        attention_head_dim=64,
        joint_attention_dim=WIDTH,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    # Blocks begin as identities and the model as "no velocity" (DiT, adaLN-Zero).
    norms = [
        norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)
    ]
    for linear in (*(norm.linear for norm in norms), model.norm_out.linear, model.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def alphas_cumprod() -> torch.Tensor:
    """Signal variance of each of SD1.x's 1000 time steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


class PatchEncoder(nn.Module):
    """The cheap encoder that defines the latent space: [n, 3, 64, 64] in 0..1 -> [n, 4, 8, 8]."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 16, 8, 4)
        self.b = nn.Conv2d(width, width, 3, 1, 1)
        self.c = nn.Conv2d(width, width, 1)
        self.d = nn.Conv2d(width, LATENT_CHANNELS, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.a(images * 2 - 1))
        h = h + F.relu(self.b(h))
        h = h + F.relu(self.c(h))
        return self.d(h)


class Block(nn.Module):
    """TAESD's residual block."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """TAESD's soft limit of latents to -3..3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


def make_decoder() -> nn.Sequential:
    """TAESD's decoder: latents [n, 4, 8, 8] (not scaled) -> pictures [n, 3, 64, 64]."""
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(LATENT_CHANNELS, 64, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [Block() for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(), nn.Conv2d(64, 3, 3, padding=1))


def make_encoder() -> nn.Sequential:
    """TAESD's encoder: pictures [n, 3, 64, 64] in 0..1 -> latents [n, 4, 8, 8] (not scaled)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), Block()]
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)]
        layers += [Block() for _ in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(64, LATENT_CHANNELS, 3, padding=1))


@torch.no_grad()
def start_near_identity(network: nn.Module) -> nn.Module:
    """Scale the last convolution of every residual block to a tenth, for a calm start."""
    for module in network.modules():
        if isinstance(module, Block):
            module.conv[4].weight.mul_(0.1)
            module.conv[4].bias.zero_()
    return network


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Load a safetensors file of any precision into the network, exactly."""
    network.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return network
