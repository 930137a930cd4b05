# SPDX-License-Identifier: Apache-2.0
"""Erasure methods of others, written from the formulas of their papers, to be scored beside ours.

W [out, d]: what a projection of cross-attention does to text. Columns [d, n]: embeddings of
targets, of their anchors and of what is retained. All matrices are float64 on the CPU; models take
the result to their own device. Settings are the authors' published ones for the kind of task. Every
peer is given the task's targets with their synonyms, anchors, and what it lists to be kept
(preserve and prior), never the unlisted lists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from captions import TEMPLATES, with_article

from python_shim.diffusers_host import DiffusersDenoiser

GENERIC_CAPTIONS = Path(__file__).resolve().parents[2] / "native" / "data" / "generic_captions.txt"
NULL_TEXT_CENTRES = 3
CAPTION_POSITIONS = 24  # no caption is longer
UCE_EXPANSIONS = {
    "style": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}


# --------------------------------------------------------------------------- formulas


def least_squares_change(
    weight: torch.Tensor,
    targets: torch.Tensor,
    anchors: torch.Tensor,
    retained: torch.Tensor,
    preserve: float,
    ridge: float,
) -> torch.Tensor:
    """UCE (Gandikota et al., WACV 2024, eq. 7): the change of W that solves

    min |W'C - WA|^2 + preserve |W'R - WR|^2 + ridge |W' - W|^2.
    """
    gram = targets @ targets.T + preserve * retained @ retained.T
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, targets @ (weight @ (anchors - targets)).T).T


def adversarial_embeddings(
    edited: Sequence[torch.Tensor],
    original: Sequence[torch.Tensor],
    targets: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    """RECE (Gong et al., ECCV 2024, eq. 8): what the edited layers read as the original ones read C

    min over C' of sum |W'C' - WC|^2 + ridge |C'|^2, over all edited projections.
    """
    gram = sum(new.T @ new for new in edited) + ridge * torch.eye(len(targets)).to(targets)
    mixed = sum(new.T @ old for new, old in zip(edited, original, strict=True))
    return torch.linalg.solve(gram, mixed @ targets)


def null_space(retained: torch.Tensor, threshold: float) -> torch.Tensor:
    """Orthonormal columns along which the retained hardly vary: eigenvalues of R R^T / n below."""
    values, vectors = torch.linalg.eigh(retained @ retained.T / max(retained.shape[1], 1))
    return vectors[:, values < threshold]


def without(basis: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of what a basis spans at right angles to the columns."""
    inside = orthonormal(basis.T @ columns)
    return basis @ torch.linalg.qr(inside, mode="complete").Q[:, inside.shape[1] :]


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of the span of the columns."""
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, values > 1e-8 * values.max()] if values.numel() else left


def null_space_change(
    weight: torch.Tensor,
    targets: torch.Tensor,
    anchors: torch.Tensor,
    retained: torch.Tensor,
    invariant: torch.Tensor,
    threshold: float,
    ridge: float,
) -> torch.Tensor:
    """SPEED (Li et al., ICLR 2026, its closed form W (A - C) C^T P Q M): the change D = D P with

    min |(W + D)C - WA|^2 + ridge |D|^2, D E = 0 for the invariant E. P projects on the null space
    of R. Lagrange's Q is here a smaller null space: its part at right angles to E. Same solution.
    """
    basis = without(null_space(retained, threshold), invariant)
    inside = basis.T @ targets
    gram = inside @ inside.T
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, inside @ (weight @ (anchors - targets)).T).T @ basis.T


def most_shifted(
    weight: torch.Tensor, targets: torch.Tensor, anchors: torch.Tensor, retained: torch.Tensor
) -> torch.Tensor:
    """SPEED's influence filter: the retained that an erasure without any of them shifts most

    (|D r|^2 of at least the mean, D the solution for the mean over the targets with a ridge of 1).
    """
    nothing, ridge = retained[:, :0], float(targets.shape[1])
    change = least_squares_change(weight, targets, anchors, nothing, 0.0, ridge)
    shift = (change @ retained).square().sum(0)
    return retained[:, shift >= shift.mean()]


def augmented(weight: torch.Tensor, retained: torch.Tensor, copies: int) -> torch.Tensor:
    """SPEED's directed augmentation: R, and copies of it with normal noise along the direction of

    text that W passes on least (the right singular vector of its smallest singular value).
    """
    direction = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(copies, 1, retained.shape[1], dtype=weight.dtype, generator=generator)
    copied = retained + direction[:, None] * noise  # [copies, d, n]
    return torch.cat([retained, *copied], 1)


def rotation(
    weight: torch.Tensor,
    targets: torch.Tensor,
    anchors: torch.Tensor,
    kept: torch.Tensor,
    erase: float,
) -> torch.Tensor:
    """OCE (Sun et al., ICML 2026): the orthogonal P of W* = P W that solves the Procrustes problem

    max tr(P M), M = -erase G (I - G_a) + W kept W^T, where G and G_a project on the spans of WC and
    WA: the targets leave what is at right angles to the anchors, everything kept stays.
    """
    target, anchor = orthonormal(weight @ targets), orthonormal(weight @ anchors)
    matrix = weight @ kept @ weight.T - erase * target @ (target.T - target.T @ anchor @ anchor.T)
    left, _, right = torch.linalg.svd(matrix)
    return right.T @ left.T


def without_targets(
    values: torch.Tensor,
    targets: torch.Tensor,
    basis: torch.Tensor,
    sharpness: float,
    middle: float,
    most: float,
) -> torch.Tensor:
    """AdaVD (Wang et al., CVPR 2025): v - s(v) B B^T v for values v [..., out] of tokens

    B [out, r]: orthonormal basis of the targets' values [n, out]. The shift is
    s = most / (1 + exp(-sharpness (cos - middle))) of the token's largest cosine with a target.
    """
    cosine = torch.nn.functional.normalize(values, dim=-1)
    cosine = cosine @ torch.nn.functional.normalize(targets, dim=-1).T
    shift = most * torch.sigmoid(sharpness * (cosine.amax(-1, keepdim=True) - middle))
    return values - shift * (values @ basis @ basis.T)


# --------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Concepts:
    """Phrases of a task: synonyms stand among the targets, every target with its anchor."""

    kind: str
    count: int  # of concepts, without their synonyms
    targets: list[str]
    anchors: list[str]
    retained: list[str]


def concepts_of(task: dict[str, Any]) -> Concepts:
    targets = [phrase for target, more in task["targets"].items() for phrase in (target, *more)]
    retained = [*task.get("preserve", []), *task.get("prior", [])]
    anchors = [task["anchor"]] * len(targets)
    return Concepts(task["kind"], len(task["targets"]), targets, anchors, retained)


def last_position(clip: Any, phrase: str) -> int:
    """Of the last token in front of the end token."""
    return min(len(clip.tokenize(phrase)), clip.window) - 2


def encoded(clip: Any, phrases: Sequence[str]) -> torch.Tensor:
    """Hidden states, float64 [n, window, d] on the CPU."""
    parts = [clip.encode(phrases[start : start + 100]) for start in range(0, len(phrases), 100)]
    return torch.cat([*parts, clip.encode([])]).double().cpu()


def last_tokens(clip: Any, phrases: Sequence[str]) -> torch.Tensor:
    """Embeddings of the phrases at their last subject token, as columns."""
    rows = [
        states[last_position(clip, phrase)]
        for states, phrase in zip(encoded(clip, phrases), phrases, strict=True)
    ]
    return torch.stack(rows, 1) if rows else torch.zeros(clip.width, 0, dtype=torch.float64)


def tails(
    clip: Any, phrases: Sequence[str], anchors: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns from the last subject token on, padding too, of phrases and of their anchors."""
    columns: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    texts = encoded(clip, phrases), encoded(clip, anchors)
    for phrase, anchor, *states in zip(phrases, anchors, *texts, strict=True):
        starts = last_position(clip, phrase), last_position(clip, anchor)
        length = clip.window - max(starts)
        for part, start, rows in zip(columns, starts, states, strict=True):
            part.append(rows[start : start + length].T)
    nothing = torch.zeros(clip.width, 0, dtype=torch.float64)
    return torch.cat([*columns[0], nothing], 1), torch.cat([*columns[1], nothing], 1)


def invariant_text(clip: Any) -> torch.Tensor:
    """Columns that every picture reads: the start token, and centres of the empty prompt."""
    empty = encoded(clip, [""])[0]
    padding = empty[1:]
    picks = torch.linspace(0, len(padding) - 1, NULL_TEXT_CENTRES).round().long()
    centres = padding[picks]
    for _ in range(10):  # k-means
        nearest = torch.cdist(padding, centres).argmin(1)
        centres = torch.stack([
            padding[nearest == index].mean(0) if (nearest == index).any() else centre
            for index, centre in enumerate(centres)
        ])  # fmt: skip
    return torch.cat([empty[:1], centres]).T


def caption_moment(clip: Any, words: Sequence[str]) -> torch.Tensor:
    """Mean of c c^T [d, d] over the tokens of captions, start and end with them, without padding.

    Half of it from general captions, half from training captions of the demo model about the words:
    it knows few words of the others.
    """
    general = GENERIC_CAPTIONS.read_text(encoding="utf-8").splitlines()[::4]  # 500
    known = [template.format(with_article(word)) for word in words for template in TEMPLATES]
    moments = []
    for texts in filter(None, (general, known)):
        total, count = torch.zeros(clip.width, clip.width, dtype=torch.float64), 0
        for start in range(0, len(texts), 100):
            part = texts[start : start + 100]
            states = clip.encode_start(part, CAPTION_POSITIONS)
            ends = torch.tensor([last_position(clip, text) + 1 for text in part])
            rows = states[torch.arange(CAPTION_POSITIONS) <= ends[:, None]].double().cpu()
            total += rows.T @ rows
            count += len(rows)
        moments.append(total / count)
    return torch.stack(moments).mean(0)


# --------------------------------------------------------------------------- edited models

Change = Callable[[torch.Tensor], torch.Tensor]


def projections(model: Any, roles: Sequence[str]) -> dict[str, torch.Tensor]:
    """The effective weights of cross-attention by their names, float64 on the CPU."""
    return {
        name: model.effective_weight(name).double().cpu()
        for name, _, role in model.cross_attention()
        if role in roles
    }


def changed(model: Any, change: Change, roles: Sequence[str]) -> Any:
    """The model with a change added to every projection of these roles."""
    changes = [
        (name, change(weight).float(), None) for name, weight in projections(model, roles).items()
    ]
    return model.with_weight_deltas(changes, 1.0)


def edit_ucerepo(model: Any, clip: Any, concepts: Concepts) -> Any:
    """UCE as its authors set it up: keys and values, the last subject token of the bare phrases.

    Their defaults: erase scale 1, preserve scale 1, lambda 0.5, no expansion of the phrases.
    """
    targets, anchors, retained = (
        last_tokens(clip, phrases)
        for phrases in (concepts.targets, concepts.anchors, concepts.retained)
    )
    return changed(
        model,
        lambda weight: least_squares_change(weight, targets, anchors, retained, 1.0, 0.5),
        ("key", "value"),
    )


def edit_rece(model: Any, clip: Any, concepts: Concepts) -> Any:
    """RECE on top of UCE as its paper has it: keys and values, all positions from the last subject
    token on, lambda_1 = lambda_2 = 0.1 (preserve, ridge).

    Every round finds embeddings that bring the concepts back, and erases those from the weights so
    far. Theirs: styles ridge 1e-3, 1 round; explicit 1e-1, 2 rounds (their unsafe concepts);
    objects 1e-3, 1 round (their setting for objects that UCE finds difficult).
    """
    ridge, rounds = {"style": (1e-3, 1), "explicit": (1e-1, 2)}.get(concepts.kind, (1e-3, 1))
    targets, anchors = tails(clip, concepts.targets, concepts.anchors)
    retained = tails(clip, concepts.retained, concepts.retained)[0]
    original = projections(model, ("key", "value"))
    edited, found = dict(original), targets
    for number in range(rounds + 1):  # the first is UCE's own
        if number:
            found = adversarial_embeddings([*edited.values()], [*original.values()], targets, ridge)
        edited = {
            name: weight + least_squares_change(weight, found, anchors, retained, 0.1, 0.1)
            for name, weight in edited.items()
        }
    changes = [(name, (edited[name] - original[name]).float(), None) for name in original]
    return model.with_weight_deltas(changes, 1.0)


def edit_speed(model: Any, clip: Any, concepts: Concepts) -> Any:
    """SPEED: values only, the last subject token of the bare phrases, the start token and the empty
    prompt invariant.

    Theirs for a few concepts (instances, styles): threshold 1e-1, ridge 1, filtered; for ten and
    more (celebrities): threshold 1e-4, ridge 0.05, no filter. Ten augmented copies always. Their
    ridge stands beside the mean over the targets, so that it is n times that beside the sum.
    Ours: explicit concepts are a few concepts, too (theirs had no retain set there); 3 centres of
    the empty prompt from evenly spaced starts.
    """
    many = concepts.count >= 10
    threshold, ridge = (1e-4, 0.05) if many else (1e-1, 1.0)
    ridge *= len(concepts.targets)
    targets, anchors, retained = (
        last_tokens(clip, phrases)
        for phrases in (concepts.targets, concepts.anchors, concepts.retained)
    )
    invariant = invariant_text(clip)

    def change(weight: torch.Tensor) -> torch.Tensor:
        kept = retained
        if not many and kept.shape[1]:
            kept = most_shifted(weight, targets, anchors, kept)
        kept = augmented(weight, kept, copies=10)
        return null_space_change(weight, targets, anchors, kept, invariant, threshold, ridge)

    return changed(model, change, ("value",))


@dataclass(frozen=True)
class RotationScales:
    """OCE's scales of erasure, captions, retained phrases and the identity."""

    erase: float
    captions: float
    retained: float
    identity: float = 10.0
    expanded: bool = False  # the phrases also stand in UCE's prompts


def rotation_scales(kind: str, count: int) -> RotationScales:
    """The authors' launch settings: style, nudity, one object, and 10, 50, 100 celebrities."""
    if kind == "style":
        return RotationScales(500, 10, 1, expanded=True)
    if kind == "explicit":
        return RotationScales(3000, 20, 0, expanded=True)
    if count < 10:
        return RotationScales(2000, 10, 0, expanded=True)
    if count < 50:
        return RotationScales(3500, 50, 5)
    return RotationScales(1500, 70, 2.5) if count < 100 else RotationScales(800, 70, 2)


def edit_orthogonal(model: Any, clip: Any, concepts: Concepts) -> Any:
    """OCE: values only (as its authors run it), the last subject token, `rotation_scales`.

    Deviations: the general prior K0 is `caption_moment` instead of COCO's 30,000 captions; the
    anchors are the task's (theirs are "tree" or "sky").
    """
    scales = rotation_scales(concepts.kind, concepts.count)
    frames = ["{}"]
    if scales.expanded:
        frames += UCE_EXPANSIONS["style" if concepts.kind == "style" else "object"]
    targets, anchors = (
        last_tokens(clip, [frame.format(phrase) for phrase in phrases for frame in frames])
        for phrases in (concepts.targets, dict.fromkeys(concepts.anchors))
    )
    retained = last_tokens(clip, concepts.retained)
    kept = scales.captions * caption_moment(clip, concepts.retained)
    kept += scales.retained * retained @ retained.T
    kept.diagonal().add_(scales.identity)

    def change(weight: torch.Tensor) -> torch.Tensor:
        return rotation(weight, targets, anchors, kept, scales.erase) @ weight - weight

    return changed(model, change, ("value",))


@dataclass(frozen=True)
class ValueErasingDenoiser(DiffusersDenoiser):
    """A denoiser whose text values lose the targets token by token, while it runs."""

    erased: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def _inputs_mapped(self) -> Iterator[None]:
        handles = []

        def hook(erase: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda _module, _inputs, values: erase(values)

        try:
            for name, erase in self.erased.items():
                path = self._base.module_names[name].removesuffix(".weight")
                module = self._base.unet.get_submodule(path)
                handles.append(module.register_forward_hook(hook(erase)))
            with super()._inputs_mapped():
                yield
        finally:
            for handle in handles:
                handle.remove()


def value_eraser(targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """AdaVD for values [batch, tokens, out] of one layer; targets: values [n, out].

    Theirs: a = 100, b = 0.93, c = 2.
    """
    basis = orthonormal(targets.T)

    def erase(values: torch.Tensor) -> torch.Tensor:
        erased = without_targets(values, targets.to(values), basis.to(values), 100.0, 0.93, 2.0)
        return torch.cat([values[:, :1], erased[:, 1:]], 1)  # the start token is everybody's

    return erase


def edit_adavd(model: Any, clip: Any, concepts: Concepts) -> Any:
    """AdaVD: at inference, on the values of every layer and step, for every token but the start.

    A target is its last subject token at all positions, as the authors duplicate it. Ours: with
    several targets a token loses the span of all of them (their Gram-Schmidt), with the shift of
    the nearest one; the empty prompt passes through the same hook.
    """
    targets = last_tokens(clip, concepts.targets)
    erased = {
        name: value_eraser((weight @ targets).T)
        for name, weight in projections(model, ("value",)).items()
    }
    return ValueErasingDenoiser(model._base, model._changes, model._input_maps, erased)


EDITS = {
    "speed": edit_speed,
    "orthogonal": edit_orthogonal,
    "rece": edit_rece,
    "ucerepo": edit_ucerepo,
    "adavd": edit_adavd,
}


def edit(method: str, model: Any, clip: Any, task: dict[str, Any]) -> Any:
    """The model after a peer's edit for the task's concepts."""
    return EDITS[method](model, clip, concepts_of(task))
