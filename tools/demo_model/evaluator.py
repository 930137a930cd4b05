# SPDX-License-Identifier: Apache-2.0
"""The evaluator: says what a picture of the demo model shows, in which style, or which flag it is.

    judge = Evaluator.load()
    judge.probabilities(images)["object"]   # [n, names], images float [n, height, width, 3] in 0..1
    judge.names["object"]                   # the names of the columns

    DemoDetector().score(images, ["dog"])           # [n, 1], for the detector of Evaluate Erasure

It needs torch and safetensors only. Generator and evaluator were trained on the same artwork.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / "demo_model" / "evaluator.safetensors"
SIZE = 64
HEADS = ("object", "style", "flag")
NOTHING = "nothing"  # last column of the object and flag heads: none of the names


def _layer(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class EvaluatorNetwork(nn.Module):
    """A small convolutional network with one linear head per question."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _layer(3, 32, 2),
            _layer(32, 64, 2),
            _layer(64, 96, 1),
            _layer(96, 128, 2),
            _layer(128, 128, 1),
            _layer(128, 96, 2),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.heads = nn.ModuleDict({head: nn.Linear(96 * 16, n) for head, n in counts.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits per head of images [n, 3, SIZE, SIZE] in 0..1."""
        features = self.trunk(images * 2 - 1)
        return {name: head(features) for name, head in self.heads.items()}


class Evaluator:
    """A trained network and the names of its columns."""

    def __init__(self, network: EvaluatorNetwork, names: dict[str, list[str]]) -> None:
        self._network = network.eval().requires_grad_(False)
        self.names = names

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Evaluator:
        """Read the file that `save` wrote."""
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["names"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        network = EvaluatorNetwork({head: len(column) for head, column in names.items()})
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        )
        return cls(network, names)

    def save(self, path: Path) -> None:
        """Write weights (float16) and names."""
        weights = {
            key: value.half().contiguous() if value.is_floating_point() else value
            for key, value in self._network.state_dict().items()
        }
        save_file(weights, path, metadata={"format": "pt", "names": json.dumps(self.names)})
        path.chmod(0o644)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Probabilities [n, names] per head of images [n, height, width, 3] in 0..1."""
        pixels = images.float().permute(0, 3, 1, 2)
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        logits = [self._network(part.contiguous()) for part in pixels.split(256)]
        return {head: torch.cat([part[head] for part in logits]).softmax(-1) for head in self.names}

    def named(self, images: torch.Tensor) -> dict[str, list[str]]:
        """The likeliest name of every image, per head."""
        return {
            head: [self.names[head][int(column)] for column in values.argmax(-1)]
            for head, values in self.probabilities(images).items()
        }


class DemoDetector:
    """The evaluator as a detector of Evaluate Erasure (see python_shim/detector.py).

    A score is the probability of the name against its strongest rival, p / (p + q): at least 0.5
    exactly where the evaluator names it. "twemoji style" is asked for as "twemoji".
    """

    name = "Lacuna demo evaluator"

    def __init__(self, path: Path = WEIGHTS) -> None:
        self._judge = Evaluator.load(path)
        self.version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]

    def score(self, images: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Scores [n, names] of images [n, height, width, 3] in 0..1; NaN for unknown names."""
        probabilities = self._judge.probabilities(images)
        scores = torch.full((len(images), len(names)), float("nan"), dtype=torch.float64)
        for column, name in enumerate(names):
            plain = name.strip().lower().removesuffix(" style")
            for head, known in self._judge.names.items():
                if plain in known and plain != NOTHING:
                    values = probabilities[head].double()
                    own = values[:, known.index(plain)].clone()
                    values[:, known.index(plain)] = -1
                    scores[:, column] = own / (own + values.amax(-1))
        return scores
