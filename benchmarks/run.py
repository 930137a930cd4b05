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
    parser.add_argument("--quick", action="store_true", help="SD1.x with 1 and 10 concepts only")
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
            "seeds": "synthetic embeddings, seed 1 + concept",
            "command": "make bench",
        },
        "closed_form": closed_form,
        "fusion": run_fusion(arguments.binaries / "lacuna_bench_fusion"),
        "host": {"import_ms": import_ms()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"import {report['host']['import_ms']:.0f} ms; written to {arguments.out}")


if __name__ == "__main__":
    main()
