# SPDX-License-Identifier: Apache-2.0
"""What gpu_acceptance.py does in the place of its steps: a sweep of launch configurations, ncu, compute-sanitizer."""

from __future__ import annotations

import argparse
import csv
import functools
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stalled on memory",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "stalled on arithmetic",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "programs an SM, by registers",
}
# one call of each kernel, at the sizes of gpu_checks
ONE_CALL = """
import torch, gpu_times, gpu_checks
from gpu_device import Card
class Once(Card):
    def milliseconds(self, run):
        run(); self.synchronize(); return (0.0, 0.0, 0.0)
card = Once()
for name in gpu_times.KERNEL_PASSES:
    gpu_times._kernel(card, name, {n}, {v})
"""


def run(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sweep:
        return sweep(args.out, args.minutes * 60, args.dry_run)
    if args.dry_run:
        print("NOT MEASURED: ncu and compute-sanitizer need a GPU.")
        return 0
    return profile(args.out) if args.profile else sanitize(args.out)


# --- the sweep -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    kernel: str
    dtype: torch.dtype
    n: int
    v: int
    vectors: int
    num_warps: int
    slices: int
    ours: bool  # what launch.py chooses

    def __str__(self) -> str:
        return f"{self.vectors} vectors, {self.num_warps} warps, {self.slices} slices"


def candidates(dry: bool) -> Iterator[Tried]:
    """What launch.py chooses, and its neighbours."""
    from fused_ppl.kernels import launch

    shapes = ((4, 131),) if dry else ((8192, 128256), (8192, 50257), (64, 151643))
    for dtype, (n, v) in itertools.product((torch.bfloat16, torch.float32), shapes):
        ours = launch.choose_config(n, v, dtype.itemsize, device_size(dry))
        for vectors, warps, slices in itertools.product((1, 2, 4, 8), (4, 8, 16), (1, 2, 4, 8, 16)):
            chosen = (vectors, warps, slices) == (ours.vectors, ours.num_warps, ours.slices)
            if slices in (1, ours.slices, 2 * ours.slices) and (n * slices < 70000 or chosen):
                yield Tried("nll_forward", dtype, n, v, vectors, warps, slices, chosen)
        yield Tried("nll_forward", dtype, n, v, ours.vectors, ours.num_warps, ours.slices, True)


def device_size(dry: bool) -> Any:
    from fused_ppl.kernels import launch

    return launch.Device(1) if dry else launch.device_size(torch.device("cuda"))


def call(tried: Tried, device: str) -> functools.partial[object]:
    """A forward with this configuration in the place of the one that launch.py chooses."""
    from fused_ppl.backends import triton_rows
    from fused_ppl.kernels import launch
    from fused_ppl.records import TokenInputs
    from fused_ppl.spec import LossSpec

    logits = torch.randn(tried.n, tried.v, device=device).to(tried.dtype)
    tokens = TokenInputs(torch.zeros(tried.n, dtype=torch.long, device=device), None, None)
    threads = tried.num_warps * 32
    tiles = tried.v // (tried.vectors * threads * (16 // tried.dtype.itemsize)) + 1
    per_slice = -(-tiles // tried.slices)
    config = launch.LaunchConfig(tried.vectors, tried.num_warps, threads, per_slice, -(-tiles // per_slice))

    def forward() -> object:
        chosen, triton_rows._config = triton_rows._config, lambda *args, **kwargs: config
        try:
            return triton_rows.nll_forward(logits, tokens, LossSpec(), num_items=None, memory_budget=None)
        finally:
            triton_rows._config = chosen

    return functools.partial(forward)


def compile_one(tried: Tried) -> None:
    """In a process of its own, into Triton's cache; few rows make the same program."""
    call(replace(tried, n=2), "cuda")()


def sweep(out: Path, seconds: float, dry: bool) -> int:
    from gpu_device import Card, StandIn

    start, card = time.perf_counter(), StandIn() if dry else Card()
    tried = list(dict.fromkeys(candidates(dry)))
    tried = tried[:2] if dry else tried
    if not dry:
        with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, tried))
    found: dict[Tried, float] = {}
    for one in tried:
        if time.perf_counter() - start > seconds:
            break
        found[one] = card.milliseconds(call(one, str(card.device)))[1]
    text = sweep_table(found, len(tried))
    print(text)
    if not dry:
        (out / "gpu_sweep.md").write_text(text)
    return 0


def sweep_table(found: dict[Tried, float], wanted: int) -> str:
    lines = [f"{len(found)} of {wanted} configurations timed.", ""]
    lines += ["| kernel | N, V | dtype | ours | ms | best | ms | ours / best |", "|---|---|---|---|---|---|---|---|"]
    key = lambda t: (t.kernel, t.dtype, t.n, t.v)  # noqa: E731
    for group in dict.fromkeys(map(key, found)):
        some = {t: ms for t, ms in found.items() if key(t) == group}
        best = min(some, key=some.__getitem__)
        ours = next((t for t in some if t.ours), None)
        cells = [group[0], f"{group[2]}, {group[3]}", str(group[1]).removeprefix("torch.")]
        cells += ["not timed", ""] if ours is None else [str(ours), f"{some[ours]:.4f}"]
        cells += [str(best), f"{some[best]:.4f}", "" if ours is None else f"{some[ours] / some[best]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --- ncu -----------------------------------------------------------------------------------------------------------


def profile(out: Path) -> int:
    if shutil.which("ncu") is None:
        print("NOT MEASURED: ncu is not on the PATH. It comes with the CUDA toolkit.")
        return 0
    program = ONE_CALL.format(n=8192, v=128256)
    command = ["ncu", "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS), "--kernel-name", "regex:nll_",
               "--launch-count", "6", sys.executable, "-c", program]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT / "bench", capture_output=True, text=True, check=False, env=_environment())
    text = profile_table(done.stdout)
    print(text if text else done.stdout[-2000:] + done.stderr[-2000:])
    (out / "gpu_profile.md").write_text(text or done.stdout + done.stderr)
    return 0 if text else 1


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def profile_table(printed: str) -> str:
    """The last launch of each kernel, from what `ncu --csv` prints; nothing where it prints no table."""
    begin = printed.find('"ID"')
    if begin < 0:
        return ""
    values: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(printed[begin:])):
        if row.get("Metric Name") in METRICS:
            name = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            values.setdefault(row["Kernel Name"].split("(")[0], {})[METRICS[row["Metric Name"]]] = name
    lines = ["| kernel | " + " | ".join(METRICS.values()) + " |", "|" + "---|" * (1 + len(METRICS))]
    for kernel, of in values.items():
        lines.append("| " + " | ".join([kernel, *(of.get(title, "") for title in METRICS.values())]) + " |")
    return "\n".join(lines) + "\n"


# --- compute-sanitizer ---------------------------------------------------------------------------------------------


def sanitize(out: Path) -> int:
    if shutil.which("compute-sanitizer") is None:
        print("NOT CHECKED: compute-sanitizer is not on the PATH. It comes with the CUDA toolkit.")
        return 0
    errors, lines = 0, ["| tool | errors |", "|---|---|"]
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=nll_", sys.executable, "-c",
                   ONE_CALL.format(n=3, v=5003)]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT / "bench", capture_output=True, text=True, check=False, env=_environment()
        )
        count = sanitizer_errors(done.stdout + done.stderr)
        errors += count != 0
        lines.append(f"| {tool} | {'no summary' if count is None else count} |")
        print(lines[-1], flush=True)
    (out / "gpu_sanitize.md").write_text("\n".join(lines) + "\n")
    return 1 if errors else 0


def sanitizer_errors(printed: str) -> int | None:
    """The number in compute-sanitizer's summary, or None where it prints none."""
    found = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", printed)
    return None if found is None else int(found[1] or found[2])
