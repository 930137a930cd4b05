# SPDX-License-Identifier: Apache-2.0
"""What one forward pass with an attention tap must do in every host; used by each host's tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

Tensor = torch.Tensor


class Interrupt(BaseException):
    """Newer hosts derive their interrupt from BaseException."""


def request(denoiser: Any, embed: Callable[[list[str]], Any], size: int = 8) -> list[Any]:
    """noisy, sigma, context, pooled of two prompts at two noise levels."""
    context, pooled = embed(["a photo of a cat", "the flag of japan"])
    levels = denoiser.noise_levels[[300, 700]]
    shape = denoiser.latent_shape(8 * size, 8 * size)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, *shape, generator=generator)
    return [noise * (1 + levels.reshape(-1, 1, 1, 1) ** 2).sqrt(), levels, context, pooled]


class PlainAttention:
    """A tap; `added` holds a trainable tensor for the keys of each layer, or nothing."""

    def __init__(self, added: dict[str, Tensor] | None = None) -> None:
        self.added = added or {}
        self.layers: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, layer: str, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        self.layers.append(layer)
        self.shapes.append((*query.shape, *key.shape, *value.shape, heads))
        if layer in self.added:
            key = key + self.added[layer]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (scores @ v).transpose(1, 2).flatten(2)


def layers_of(denoiser: Any) -> list[str]:
    names = [name for name, _, role in denoiser.cross_attention() if role == "key"]
    return [name.removesuffix(".to_k.weight") for name in names]


def state_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def unharmed(module: torch.nn.Module, options: Callable[[], Any] = lambda: None) -> Any:
    """Nothing stays behind: the same weights, no gradient, no hook, no patch."""

    def state() -> list[Any]:
        return [
            [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in module.named_parameters()],
            [
                (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
                for m in module.modules()
            ],
            [id(getattr(m, "processor", None)) for m in module.modules()],
            options(),
        ]

    before = state()
    yield
    assert state() == before
    assert all(p.grad is None for p in module.parameters())


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    worst = float((a.double() - b.double()).abs().max() / b.double().abs().max())
    assert worst < tolerance, f"differs by {worst:.1e} of the largest value"


def check_tap(denoiser: Any, asked: list[Any], module: torch.nn.Module) -> None:
    """A tap that computes plain attention changes nothing, and sees each layer once, in order."""
    plain = denoiser.denoise(*asked, None, False)
    tap, weights = PlainAttention(), state_hash(module)
    with unharmed(module):
        tapped = denoiser.denoise(*asked, tap, False)
    assert state_hash(module) == weights
    assert plain.dtype == torch.float32 and plain.shape == asked[0].shape
    close(tapped, plain, 1e-5)
    assert tap.layers == layers_of(denoiser) and len(tap.layers) >= 4
    for layer, shape in zip(tap.layers, tap.shapes, strict=True):
        inner, width = denoiser.effective_weight(f"{layer}.to_k.weight").shape
        assert width == asked[2].shape[-1]
        assert shape[0] == 2 and shape[2] == inner
        assert shape[3:9] == (2, 77, inner, 2, 77, inner) and inner % shape[9] == 0


def check_attention_only(denoiser: Any, asked: list[Any], module: torch.nn.Module) -> None:
    """Everything up to the last text cross-attention runs, and nothing behind it."""
    whole = denoiser.denoise(*asked, PlainAttention(), False)
    ran: list[str] = []
    handles = [
        m.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, m in module.named_modules()
        if not list(m.children())
    ]
    try:
        denoiser.denoise(*asked, PlainAttention(), False)
        everything, ran[:] = list(ran), []
        tap = PlainAttention()
        assert denoiser.denoise(*asked, tap, True) is None
    finally:
        for handle in handles:
            handle.remove()
    assert tap.layers == layers_of(denoiser)
    last_projection = max(i for i, name in enumerate(everything) if name.endswith("attn2.to_v"))
    assert ran == everything[: last_projection + 1] and len(ran) < len(everything)
    assert denoiser.denoise(*asked, None, True) is None
    assert torch.equal(denoiser.denoise(*asked, PlainAttention(), False), whole)


def tapped_gradients(
    denoiser: Any, asked: list[Any], weighting: Tensor, layers: list[str]
) -> dict[str, Tensor]:
    """Of sum(weighting * clean latent), for a tensor added to the keys of each layer."""
    added = {layer: (0.1 * start_of(denoiser, layer)).requires_grad_() for layer in layers}
    clean = denoiser.denoise(*asked, PlainAttention(added), False)
    assert clean.requires_grad
    (clean * weighting).sum().backward()
    return {layer: tensor.grad for layer, tensor in added.items()}


def check_context_gradient(denoiser: Any, asked: list[Any], module: torch.nn.Module) -> None:
    """The gradient of a text context agrees with a central difference along it."""
    noisy, sigma, context, pooled = asked
    weighting = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(4))

    def weighed(text: Tensor) -> Tensor:
        clean = denoiser.denoise(noisy, sigma, text, pooled, None, False)
        return (clean.double() * weighting.to(clean.device)).sum()

    text = context.clone().requires_grad_()
    with unharmed(module):
        weighed(text).backward()
    length = text.grad.norm()
    assert float(length) > 0
    step = 1e-3 * context.norm() * text.grad / length
    with torch.no_grad():
        slope = (weighed(context + step) - weighed(context - step)) / (2 * step.norm())
    assert float(slope) == pytest.approx(float(length), rel=0.02)


def start_of(denoiser: Any, layer: str) -> Tensor:
    """The same numbers for the host's pass and for the reference."""
    inner = denoiser.effective_weight(f"{layer}.to_k.weight").shape[0]
    generator = torch.Generator().manual_seed(len(layer))
    return torch.randn(2, 77, inner, generator=generator)


def reference_gradients(
    denoiser: Any,
    layers: list[str],
    copies: dict[str, torch.nn.Module],
    clean: Callable[[], Tensor],
    weighting: Tensor,
) -> dict[str, Tensor]:
    """Plain autograd in double precision. `copies`: the to_k layer of each name in a copied model;
    `clean`: a forward pass of that copy."""
    added = {layer: (0.1 * start_of(denoiser, layer)).double().requires_grad_() for layer in layers}
    for layer, tensor in added.items():
        copies[layer].register_forward_hook(lambda _m, _i, out, tensor=tensor: out + tensor)
    (clean() * weighting.double()).sum().backward()
    return {layer: tensor.grad for layer, tensor in added.items()}


def check_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for layer, gradient in expected.items():
        assert float(gradient.abs().max()) > 0
        close(ours[layer], gradient, 1e-3)


def check_exceptions(
    denoiser: Any,
    asked: list[Any],
    module: torch.nn.Module,
    options: Callable[[], Any] = lambda: None,
) -> None:
    """The object raised in a tap comes out, and the next pass is not affected."""
    before, weights = denoiser.denoise(*asked, None, False), state_hash(module)
    last = len(layers_of(denoiser))
    for error, stop_at, attention_only in (
        (Interrupt("stop"), 1, False),
        (torch.OutOfMemoryError("full"), last, False),
        (KeyError("x"), last, True),
    ):
        tap = PlainAttention()

        def failing(*call: Any, tap: Any = tap, at: int = stop_at, error: Any = error) -> Tensor:
            attended = tap(*call)
            if len(tap.layers) == at:
                raise error
            return attended

        with unharmed(module, options), pytest.raises(type(error)) as caught:
            denoiser.denoise(*asked, failing, attention_only)
        assert caught.value is error and len(tap.layers) == stop_at
    assert torch.equal(denoiser.denoise(*asked, None, False), before)
    assert state_hash(module) == weights


def sided(denoiser: Any, key: torch.Tensor | None, value: torch.Tensor | None) -> list[Any]:
    """Maps for the keys and the values of all cross-attention layers; None leaves a side alone."""
    layers = denoiser.cross_attention()
    return [
        ([(name, 0, 0) for name, _, kind in layers if kind == role], delta, None)
        for role, delta in (("key", key), ("value", value))
        if delta is not None
    ]
