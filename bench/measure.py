# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: interleaved rounds, medians of paired ratios, peak memory in a fresh process."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each function in each round; every round runs all of them, so that a drift of the machine hits all."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(seconds: list[float], base: list[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def bootstrap_ratio(seconds: list[float], base: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """The median of the ratios round by round, with its 95 % bootstrap interval: (low, median, high)."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[draws // 40], statistics.median(ratios), medians[-draws // 40]


def peak_resident(function: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises at its highest while the function runs.

    Call it in a fresh process, with the inputs made and the code warmed up on a small input. Linux only.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    kept = function()
    peak = _status("VmHWM") - before
    del kept
    return peak


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only.")


def machine() -> dict[str, object]:
    """What a record needs to be worth quoting: processor, threads, versions, date."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
