# SPDX-License-Identifier: Apache-2.0
"""Runs every benchmark and writes build/bench.json (`make bench`).

Each figure comes from its own process, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]

CASES = [("sd1", 1), ("sd1", 10), ("sd1", 100), ("sdxl", 1), ("sdxl", 10), ("sdxl", 100)]
FUSION_CASES = [1, 10, 100]
PREFLIGHT_CASES = [("sd1", 10), ("sd1", 100), ("sdxl", 10)]
LORA_DEMO_SIZE = 64
LORA_SD1_SIZES = [256, 384]


def run_binary(binary: Path, *arguments: str) -> dict:
    output = subprocess.run([binary, *arguments], check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def run_closed_form(binary: Path, family: str, concepts: int) -> dict:
    return run_binary(binary, family, str(concepts))[f"n{concepts}"]


def run_fusion(binary: Path) -> dict:
    fusion: dict = {}
    for concepts in FUSION_CASES:
        figures = run_binary(binary, str(concepts))[f"n{concepts}"]
        fusion[f"n{concepts}"] = figures
        print(
            f"fusion {concepts:3d} concepts: {figures['cpu_s']:.2f} CPU s, "
            f"+{figures['peak_extra_mb']:.0f} MB ({figures['bundle_mb']:.0f} MB bundle), add one "
            f"{figures['add_one_cpu_ms']:.0f} CPU ms, strength "
            f"{figures['strength_cpu_ms']:.0f} CPU ms, error {figures['rel_error_of_change']:.1e}",
            flush=True,
        )
    fusion["add_one_ms"] = fusion[f"n{FUSION_CASES[-1]}"]["add_one_cpu_ms"]
    return fusion


def run_preflight(binary: Path, quick: bool) -> dict:
    preflight: dict = {}
    for family, concepts in PREFLIGHT_CASES[:1] if quick else PREFLIGHT_CASES:
        figures = run_binary(binary, family, str(concepts))[f"n{concepts}"]
        preflight.setdefault(family, {})[f"n{concepts}"] = figures
        print(
            f"preflight {family} {concepts:3d} concepts: {figures['cpu_s']:.2f} CPU s without text "
            f"encoding ({figures['texts']} texts), +{figures['peak_extra_mb']:.0f} MB",
            flush=True,
        )
    return preflight


def run_lora(case: str, size: int) -> dict:
    command = [sys.executable, REPOSITORY / "benchmarks" / "lora.py", case, str(size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def run_loras(quick: bool) -> dict:
    """The stable keys of SD1.x shapes are those of the first size."""
    demo = run_lora("demo", LORA_DEMO_SIZE)
    full, cached = demo["full"], demo["cached"]
    print(
        f"lora demo: cached {cached['training_cpu_s']:.2f} CPU s, full "
        f"{full['training_cpu_s']:.2f} ({1 / demo['cached_over_full_cpu']:.1f} x); objective "
        f"{full['loss_before']:.3f}, cached {cached['loss_after']:.3f}, full "
        f"{full['loss_after']:.3f}",
        flush=True,
    )
    lora = {key: demo[key] for key in ("cached_over_full_cpu", "cached_over_full_loss")}
    lora["demo"] = demo
    for size in [] if quick else LORA_SD1_SIZES:
        figures = run_lora("sd1", size)
        full, cached = figures["full"], figures["cached"]
        print(
            f"lora sd1 {size} px: a step of four concepts {full['step_cpu_s']:.1f} CPU s, "
            f"{figures['full_over_plain']:.3f} of the bare passes; peak full "
            f"{full['peak_mb']:.0f} MB, cached {cached['peak_mb']:.0f} MB, model "
            f"{full['model_mb']:.0f} MB",
            flush=True,
        )
        lora.setdefault("full_over_plain", figures["full_over_plain"])
        lora.setdefault("full_peak_mb", full["peak_mb"])
        lora.setdefault("cached_peak_mb", cached["peak_mb"])
        lora[f"sd1_{size}"] = figures
    return lora


def import_ms() -> float:
    """Cost of loading the extension and its schemas after torch, in milliseconds."""
    code = (
        "import sys, time, torch; sys.path.insert(0, sys.argv[1]); t = time.perf_counter();"
        "from python_shim import loader; loader.load().NodePack().schemas();"
        "print(1e3 * (time.perf_counter() - t))"
    )
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", code, str(REPOSITORY)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for _ in range(5)
    ]
    return statistics.median(runs)


def commit() -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--binaries", type=Path, required=True, help="folder of the built binaries")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build" / "bench.json")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="SD1.x with 1 and 10 concepts, LoRAs of the demo model only",
    )
    arguments = parser.parse_args()

    closed_form: dict[str, dict] = {}
    for family, concepts in CASES[:2] if arguments.quick else CASES:
        started = time.time()
        figures = run_closed_form(arguments.binaries / "lacuna_bench_closed_form", family, concepts)
        closed_form.setdefault(family, {})[f"n{concepts}"] = figures
        print(
            f"{family} {concepts:3d} concepts: {figures['cpu_s']:.2f} CPU s, naive "
            f"{figures['naive_cpu_s']:.0f} ({figures['naive_over_ours']:.0f} x), batched "
            f"{figures['batched_cpu_s']:.0f} ({figures['batched_over_ours']:.0f} x), dense "
            f"{figures['dense_cpu_s']:.2f}, +{figures['peak_extra_mb']:.0f} MB, error "
            f"{figures['rel_error']:.1e}  [{time.time() - started:.0f} s]",
            flush=True,
        )
    closed_form["resolve_ms"] = closed_form["sd1"]["n10"]["resolve_cpu_ms"]
    report = {
        "protocol": {
            "commit": commit(),
            "machine": f"{os.cpu_count()} x {processor()}, {platform.system()}",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "seeds": "synthetic embeddings, seed 1 + concept; LoRA Erase: training seed 0",
            "command": "make bench",
        },
        "closed_form": closed_form,
        "fusion": run_fusion(arguments.binaries / "lacuna_bench_fusion"),
        "preflight": run_preflight(arguments.binaries / "lacuna_bench_evaluation", arguments.quick),
        "lora": run_loras(arguments.quick),
        "host": {"import_ms": import_ms()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"import {report['host']['import_ms']:.0f} ms; written to {arguments.out}")


if __name__ == "__main__":
    main()
