# SPDX-License-Identifier: Apache-2.0
"""Interrupts and out-of-memory at random points of Concept Set -> Attention Refine -> LoRA Erase ->
LoRA Fuse -> Save: nothing is left behind, and the next run is the run that nothing disturbed.

Every host callback can fail: LACUNA_FAILURES=50 draws fifty failures of each host, and
LACUNA_TEST_SEED=... repeats the one that a failed test names.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_host import FakeDenoiser, FakeImageDecoder, FakeProgress, FakeTextEncoder

from python_shim import loader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forward_checks import Interrupt, state_hash, unharmed

GRADIENTS = ("full", "cached")
MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "grad": nullcontext,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
}
ERRORS = (
    lambda: Interrupt("stop"),
    lambda: KeyboardInterrupt(),
    lambda: torch.OutOfMemoryError("device memory is full: out of memory"),
)


def seeds(default: int) -> list[int]:
    if "LACUNA_TEST_SEED" in os.environ:
        return [int(os.environ["LACUNA_TEST_SEED"])]
    return list(range(int(os.environ.get("LACUNA_FAILURES", default))))


class Trap:
    """Counts the host callbacks of each kind, and raises `error` in one of them."""

    def __init__(self, kind: str = "", at: int = 0, error: BaseException | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self._kind, self._at, self._error = kind, at, error

    def __call__(self, kind: str) -> None:
        self.calls[kind] += 1
        if kind == self._kind and self.calls[kind] == self._at:
            raise self._error


class TrappedProgress(FakeProgress):
    def __init__(self, trap: Trap) -> None:
        super().__init__()
        self._trap = trap

    def report(self, done: int, total: int) -> None:
        self._trap("report")

    def check(self) -> None:
        self._trap("check")

    def status(self, line: str) -> None:
        self._trap("status")

    def preview(self, image: torch.Tensor) -> None:
        self._trap("preview")


class Trapped:
    """A host object; some of its methods walk into the trap before they do their work."""

    def __init__(self, inner: Any, trap: Trap, kinds: dict[str, str]) -> None:
        self._inner, self._trap, self._kinds = inner, trap, kinds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._kinds:
            return found

        def call(*arguments: Any) -> Any:
            self._trap(self._kinds[name])
            return found(*arguments)

        return call


class TrappedDenoiser(Trapped):
    def __init__(self, inner: Any, trap: Trap) -> None:
        super().__init__(inner, trap, {"effective_weight": "effective_weight"})

    def with_weight_deltas(self, deltas: list, strength: float) -> TrappedDenoiser:
        self._trap("patch")
        return TrappedDenoiser(self._inner.with_weight_deltas(deltas, strength), self._trap)

    def with_weight_maps(self, maps: list, strength: float) -> TrappedDenoiser:
        self._trap("patch")
        return TrappedDenoiser(self._inner.with_weight_maps(maps, strength), self._trap)

    def denoise(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor | None,
        tap: Any,
        attention_only: bool,
    ) -> torch.Tensor | None:
        self._trap("denoise")

        def attention(layer: str, query: torch.Tensor, *others: Any) -> torch.Tensor:
            self._trap("attention")  # in the middle of a forward pass
            if query.requires_grad:
                query.register_hook(lambda gradient: self._trap("backward"))
            return tap(layer, query, *others)

        trapped_tap = None if tap is None else attention
        return self._inner.denoise(noisy, sigma, context, pooled, trapped_tap, attention_only)


@dataclass(frozen=True)
class Host:
    model: Any
    clip: Any
    vae: Any
    concepts: dict[str, Any]
    erase: dict[str, Any]
    base_state: Callable[[], str]
    unharmed: Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Outcome:
    fused: dict[str, torch.Tensor]
    preview: torch.Tensor
    losses: list[float]
    calls: Counter[str]


def run_chain(pack: Any, host: Host, gradient: str, trap: Trap) -> Outcome:
    progress = TrappedProgress(trap)
    model = TrappedDenoiser(host.model, trap)
    clip = Trapped(host.clip, trap, {"encode": "encode", "embed": "encode", "tokenize": "tokenize"})
    vae = Trapped(host.vae, trap, {"decode": "decode"})

    def run(node: str, **inputs: Any) -> list:
        return pack.run(node, inputs, progress)

    loaded = {"model": model, "clip": clip}
    concepts = run("LacunaConceptSet", general_prior="none", templates=2, **host.concepts)[0]
    refinement = run("LacunaAttentionRefine", concepts=concepts, method="mace", **loaded)[1]
    loras, preview, loss, _ = run(
        "LacunaLoRAErase", concepts=concepts, refinement=refinement, vae=vae, gradient=gradient,
        width=64, height=64, learning_rate=0.01, suppress_value=0.1 * (gradient == "cached"),
        **host.erase, **loaded,
    )  # fmt: skip
    fused, lora, loras, _ = run("LacunaLoRAFuse", loras=loras, **loaded)
    run("LacunaSaveBundle", loras=loras, filename_prefix="bundle")
    run("LacunaSaveLoRA", lora=lora, filename_prefix="loras/lora")
    weights = {name: fused.effective_weight(name) for name, _, _ in host.model.cross_attention()}
    return Outcome(weights, preview, loss["loss"], trap.calls)


def files_in(folder: Path) -> dict[str, set[bytes]]:
    """Contents by file name, whatever the number that was added to it."""
    files: dict[str, set[bytes]] = {}
    for file in folder.rglob("*"):
        if file.is_file():
            stem, number, ending = file.name.rsplit("_", 2)
            assert number.isdigit() and ending == ".safetensors", f"left behind: {file}"
            files.setdefault(stem, set()).add(file.read_bytes())
    return files


def hash_of(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors.items():
        assert not value.requires_grad and value.grad is None
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def fake() -> Host:
    generator = torch.Generator().manual_seed(5)
    weights = {
        f"{layer}.to_{role}": torch.randn(8, 16, generator=generator)
        for layer in ("first", "second")
        for role in "kv"
    }
    return Host(
        FakeDenoiser(weights=weights), FakeTextEncoder(), FakeImageDecoder(),
        {"concepts": "cat -> fog\nowl -> tree\nship -> water", "preserve": "dog"},
        {"steps": 4, "images": 2, "sampling_steps": 3, "batch": 2},
        lambda: hash_of(weights), nullcontext,
    )  # fmt: skip


@pytest.fixture(scope="module")
def demo_host(demo: Any) -> Host:
    unet = demo[0]._base.unet
    return Host(
        *demo, {"concepts": "hamburger -> apple\nowl -> tree"},
        {"steps": 2, "images": 1, "sampling_steps": 2, "batch": 1, "cfg": 1.0},
        lambda: state_hash(unet), lambda: unharmed(unet),
    )  # fmt: skip


class Undisturbed:
    """Runs that nothing disturbed, by gradient and the caller's mode, and the files they made."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self._folder = host, folder

    @functools.cache  # noqa: B019
    def run(self, gradient: str, mode: str) -> tuple[Outcome, dict[str, set[bytes]]]:
        folder = self._folder / f"{gradient} {mode}"
        with MODES[mode]():
            outcome = run_chain(loader.load().NodePack(str(folder)), self.host, gradient, Trap())
        files = files_in(folder)
        assert files.keys() == {"bundle", "lora"}
        return outcome, files


@pytest.fixture(scope="module")
def with_fake(fake: Host, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(fake, tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def with_demo(demo_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(demo_host, tmp_path_factory.mktemp("demo"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same sums in the same order, run after run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_failure(undisturbed: Undisturbed, folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    gradient, mode = draw.choice(GRADIENTS), draw.choice(tuple(MODES))
    error = draw.choice(ERRORS)()
    expected, expected_files = undisturbed.run(gradient, mode)
    kind = draw.choice(sorted(expected.calls))
    at = draw.randint(1, expected.calls[kind])
    print(f"seed {seed}: {error!r} in {kind} {at} of {expected.calls[kind]}, {gradient}, {mode}")

    host = undisturbed.host
    before = host.base_state()
    pack = loader.load().NodePack(str(folder))
    with MODES[mode]():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with host.unharmed(), pytest.raises(type(error)) as caught:
            run_chain(pack, host, gradient, Trap(kind, at, error))
        assert caught.value is error
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
        assert host.base_state() == before
        for stem, contents in files_in(folder).items():
            assert contents == expected_files[stem], f"{stem} is not whole"

        with host.unharmed():
            again = run_chain(pack, host, gradient, Trap())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    assert host.base_state() == before
    assert files_in(folder) == expected_files
    assert again.losses == expected.losses
    assert torch.equal(again.preview, expected.preview)
    for name, weight in expected.fused.items():
        assert torch.equal(again.fused[name], weight), name
    # What was finished before the failure is not done again.
    assert again.calls["denoise"] <= expected.calls["denoise"]


@pytest.mark.parametrize("seed", seeds(12))
def test_failures(with_fake: Undisturbed, tmp_path: Path, seed: int) -> None:
    check_failure(with_fake, tmp_path, seed)


@pytest.mark.parametrize("seed", seeds(1))
def test_failures_of_a_real_model(with_demo: Undisturbed, tmp_path: Path, seed: int) -> None:
    check_failure(with_demo, tmp_path, seed)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_trap_is_in_every_callback(with_fake: Undisturbed, gradient: str) -> None:
    calls = with_fake.run(gradient, "grad")[0].calls
    kinds = {"report", "check", "status", "preview", "encode", "tokenize", "decode", "denoise",
             "attention", "effective_weight", "patch"}  # fmt: skip
    assert set(calls) == kinds | ({"backward"} if gradient == "full" else set())
