# SPDX-License-Identifier: Apache-2.0
"""What LoRA Erase costs: CPU time on one thread, and peak memory of a process of its own.

python benchmarks/lora.py demo SIZE   `cached` against `full` on the demo model: training time and
                                      the objective that both end with; pictures of SIZE pixels
python benchmarks/lora.py sd1 SIZE    SD1.x shapes, random weights: a step of `full`, four concepts
                                      in one batch, against four forward and backward passes of the
                                      bare UNet; peak memory of both gradients
python benchmarks/lora.py cuda SIZE   SD1.x shapes, random float32 weights, a GPU: LoRA Erase as it
                                      comes for four concepts; wall time and peak memory of both

Prints one JSON object. With --measure only that part, in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / part) for part in ("", "tools/demo_model", "tests/shim")]

import expand  # noqa: E402
from fake_host import FakeTextEncoder  # noqa: E402

from python_shim import loader, sd1_names  # noqa: E402
from python_shim.diffusers_host import (  # noqa: E402
    DiffusersDenoiser,
    DiffusersHost,
    _SharedUNet,
)

CONCEPTS = "hamburger -> apple\nowl -> tree\nship -> house\ncar -> rose"
BATCH = 4  # all concepts at once: LoRA Erase's default
EVALUATIONS = 4  # LoraOptions::evaluations: passes that measure before, and again after training
CAPTURES = 4  # LoraOptions::captures: passes of `cached`, in each of refresh + 1 rounds
GRADIENTS = ("full", "cached")
# `full` as it comes. `cached` with fewer and larger steps: half of its time goes into looking.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "cached": {"steps": 25, "learning_rate": 0.01, "refresh": 0},
}
PICTURES = {"images": 4, "sampling_steps": 10}
SHORT = {"steps": 2, "images": 1, "sampling_steps": 1}
SD1_STEPS = 2  # the faster one counts: the first also pays for fresh memory


def cpu_seconds() -> float:
    return time.process_time()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@dataclass(frozen=True)
class Pass:
    """A forward pass in which LoRA Erase looked at the attention."""

    begin: float
    end: float
    with_gradients: bool


class Watched:
    """A host's denoiser that notes when LoRA Erase looks at its attention."""

    def __init__(self, inner: DiffusersDenoiser) -> None:
        self.inner = inner
        self.passes: list[Pass] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def denoise(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor | None,
        tap: Any,
        attention_only: bool,
    ) -> torch.Tensor | None:
        begin = self.clock()
        clean = self.answer(noisy, sigma, context, pooled, tap, attention_only)
        if attention_only:
            self.passes.append(Pass(begin, self.clock(), torch.is_grad_enabled()))
        return clean

    def clock(self) -> float:
        return cpu_seconds()

    def answer(self, *request: Any) -> torch.Tensor | None:
        return self.inner.denoise(*request)


def erase(model: Any, clip: Any, size: int, folder: str, **widgets: Any) -> list[dict]:
    """Trains all concepts as one batch; how each was trained, as LoRA Erase reports it."""
    pack = loader.load().NodePack(folder)
    concepts = pack.run("LacunaConceptSet", {"concepts": CONCEPTS, "general_prior": "none"})[0]
    host = {"model": model, "clip": clip, "concepts": concepts}
    widgets |= {"width": size, "height": size, "batch": BATCH}
    loras = pack.run("LacunaLoRAErase", host | widgets)[0]
    pack.run("LacunaSaveBundle", {"loras": loras, "filename_prefix": "bundle"})
    (bundle,) = Path(folder).glob("bundle_*.safetensors")
    with safe_open(bundle, framework="pt") as file:
        return [json.loads(text) for text in json.loads(file.metadata()["training"])]


# --------------------------------------------------------------------------- demo model


def measure_demo(size: int, gradient: str) -> dict:
    folder = REPOSITORY / "build" / "bench"
    host = DiffusersHost(
        expand.write_checkpoint(folder), output_directory=folder, cache_directory=folder / "cache"
    )
    model, clip, _ = host.load_checkpoint("")
    watched = Watched(model)
    begin = cpu_seconds()
    with tempfile.TemporaryDirectory() as output:
        trained = erase(
            watched, clip, size, output, gradient=gradient, **PICTURES, **SETTINGS[gradient]
        )
    total = cpu_seconds() - begin

    before, steps, after = (
        watched.passes[:EVALUATIONS],
        watched.passes[EVALUATIONS:-EVALUATIONS],
        watched.passes[-EVALUATIONS:],
    )
    if gradient == "full":
        assert all(one.with_gradients for one in steps)
        assert not any(one.with_gradients for one in before + after), "not those that measure"
    else:
        assert len(steps) == CAPTURES * (SETTINGS[gradient]["refresh"] + 1)
    count = len(trained)
    return {
        "training_cpu_s": after[0].begin - before[-1].end,
        "drawing_cpu_s": before[0].begin - begin,  # and reading prompts: the same for both
        "total_cpu_s": total,
        "forward_passes": len(steps),
        "loss_before": sum(how["mass_before"] for how in trained) / count,
        "loss_after": sum(how["mass_after"] for how in trained) / count,
    }


def compare_demo(size: int) -> dict:
    full, cached = (measured("demo", size, gradient) for gradient in GRADIENTS)
    return {
        "full": full,
        "cached": cached,
        "cached_over_full_cpu": cached["training_cpu_s"] / full["training_cpu_s"],
        "cached_over_full_total_cpu": cached["total_cpu_s"] / full["total_cpu_s"],
        "cached_over_full_loss": cached["loss_after"] / full["loss_after"],
    }


# --------------------------------------------------------------------------- SD1.x shapes


def random_unet() -> torch.nn.Module:
    """SD1.x' UNet with lively random weights, in no more memory than it needs."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.to_empty(device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.7 * weight[0].numel() ** -0.5)
            else:
                weight.fill_(float(name.endswith("weight")))
    return unet.eval().requires_grad_(False)


class BarePasses:
    """Forward and backward through the UNet alone, with a rank-1 pair on every key and value
    projection: what anything that trains such pairs has to pay."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self._unet = unet
        self._pairs: list[torch.Tensor] = []
        self._projections = [
            module
            for name, module in unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v"))
        ]
        for module in self._projections:
            rows, width = module.weight.shape
            self._pairs += [torch.zeros(rows, 1), torch.randn(1, width)]
        for parameter in self._pairs:
            parameter.requires_grad_()

    def cpu_seconds(self, noisy: torch.Tensor, context: torch.Tensor) -> float:
        """One sample after the other."""
        pairs = zip(self._pairs[::2], self._pairs[1::2], strict=True)
        handles = [
            module.register_forward_hook(
                lambda _module, inputs, out, up=up, down=down: out + inputs[0] @ down.T @ up.T
            )
            for module, (up, down) in zip(self._projections, pairs, strict=True)
        ]
        begin = cpu_seconds()
        for i in range(noisy.shape[0]):
            noise = self._unet(noisy[i : i + 1], torch.tensor(300), context[i : i + 1]).sample
            torch.autograd.grad(noise.square().mean(), self._pairs)
        spent = cpu_seconds() - begin
        for handle in handles:
            handle.remove()
        return spent


class Timed(Watched):
    """Watches the wall clock of a device that works on its own."""

    def clock(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()


class OnlyTraining(Watched):
    """Runs the passes that train. What this benchmark does not measure is answered without one:
    pictures that are drawn, and the objective of random weights before and after."""

    def __init__(
        self, inner: DiffusersDenoiser, training_passes: int, bare: BarePasses | None = None
    ) -> None:
        super().__init__(inner)
        self.called: list[float] = []  # when each look at the attention began, and ...
        self.bare: list[float] = []  # ... what bare passes on the same input cost before that
        self._training = range(EVALUATIONS, EVALUATIONS + training_passes)
        self._bare = bare

    def answer(self, *request: Any) -> torch.Tensor | None:
        noisy, _, _, _, tap, attention_only = request
        if not attention_only:
            return torch.zeros_like(noisy)
        if len(self.passes) in self._training:
            return self.inner.denoise(*request)
        layer = self.inner.cross_attention()[0][0].removesuffix(".to_k.weight")
        width = self.inner.effective_weight(f"{layer}.to_k.weight").shape[0]
        rows = (noisy[0, 0].numel(), 77, 77)
        tap(layer, *(torch.zeros(noisy.shape[0], n, width) for n in rows), 8)
        return None

    def denoise(
        self, noisy: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, *others: Any
    ) -> torch.Tensor | None:
        self.called.append(cpu_seconds())
        if self._bare is not None and torch.is_grad_enabled():
            scaled = noisy / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt()
            self.bare.append(self._bare.cpu_seconds(scaled, context))
        return super().denoise(noisy, sigma, context, *others)


def measure_sd1(size: int, gradient: str) -> dict:
    unet = random_unet()
    base = DiffusersDenoiser(_SharedUNet(unet, sd1_names.unet_to_ldm(unet.state_dict())))
    model_mb = resident_mb()
    full = gradient == "full"
    model = OnlyTraining(base, SD1_STEPS if full else CAPTURES, BarePasses(unet) if full else None)
    with tempfile.TemporaryDirectory() as output:
        erase(
            model, FakeTextEncoder(768), size, output, gradient=gradient, steps=SD1_STEPS,
            refresh=0, images=1, sampling_steps=1, cfg=1.0, mask_from="none",
        )  # fmt: skip
    figures = {"model_mb": model_mb, "peak_mb": peak_mb()}
    training = model.passes[EVALUATIONS:-EVALUATIONS]
    called = model.called[-len(model.passes) :][EVALUATIONS + 1 :]
    if full:
        ends = called[: len(training)]  # of a step: when the next pass is asked for
        ours = [end - one.begin for one, end in zip(training, ends, strict=True)]
        figures |= {"step_cpu_s": min(ours), "four_bare_passes_cpu_s": min(model.bare)}
    else:
        layers = model.passes[-EVALUATIONS].begin - training[-1].end
        figures |= {
            "capture_cpu_s": min(one.end - one.begin for one in training),
            "step_cpu_s": layers / SD1_STEPS,
        }
    return figures


def compare_sd1(size: int) -> dict:
    full, cached = (measured("sd1", size, gradient) for gradient in GRADIENTS)
    return {
        "full": full,
        "cached": cached,
        "full_over_plain": full["step_cpu_s"] / full["four_bare_passes_cpu_s"],
    }


def measure_cuda(size: int, gradient: str) -> dict:
    """LoRA Erase as it comes, four concepts: wall time of each part, memory of the device."""
    unet = random_unet().cuda()
    model = Timed(DiffusersDenoiser(_SharedUNet(unet, sd1_names.unet_to_ldm(unet.state_dict()))))
    with tempfile.TemporaryDirectory() as output:  # a run that pays for loading kernels
        erase(model, FakeTextEncoder(768), size, output, gradient=gradient, **SHORT)
    model.passes.clear()
    torch.cuda.reset_peak_memory_stats()
    model_mb = torch.cuda.memory_allocated() / 2**20
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        erase(model, FakeTextEncoder(768), size, output, gradient=gradient)
    total = time.perf_counter() - begin
    before, after = model.passes[:EVALUATIONS], model.passes[-EVALUATIONS:]
    concepts = CONCEPTS.count("->")
    return {
        "device": torch.cuda.get_device_name(),
        "seconds_per_concept": total / concepts,
        "of_which_training": (after[0].begin - before[-1].end) / concepts,
        "model_mb": model_mb,
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20,
    }


# --------------------------------------------------------------------------- command line


def measured(case: str, size: int, gradient: str) -> dict:
    """In a process of its own."""
    command = [sys.executable, __file__, case, str(size), "--measure", gradient]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("demo", "sd1", "cuda"))
    parser.add_argument("size", type=int, help="width and height of the pictures, in pixels")
    parser.add_argument("--measure", choices=GRADIENTS, help="only this, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case, size, gradient = arguments.case, arguments.size, arguments.measure
    if gradient is not None:
        measure = {"demo": measure_demo, "sd1": measure_sd1, "cuda": measure_cuda}[case]
        figures = measure(size, gradient)
    elif case == "cuda":
        figures = {gradient: measured(case, size, gradient) for gradient in GRADIENTS}
    else:
        figures = (compare_demo if case == "demo" else compare_sd1)(size)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
