# SPDX-License-Identifier: Apache-2.0
"""What the machine code of every kernel says without a GPU, beside the peers', and the roofline of named GPUs.

    python bench/static.py [--target sm_90 ...] [--fast] [--check] [--out bench/results/static.json]

Compiles every kernel ahead of time for every launch configuration that launch.py can choose: all options off and all
on for every target, each option alone for sm_90. Numbers are of the machine code; times are a model, never measured.
`--check` prints only what breaks a promise of budgets.py, and fails if anything does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import aot
import budgets
import peers
import roofline
import torch
import triton

MODES = {"off": {}, "all": budgets.OPTIONS["all"]}
PEER_V = (128256, 50257, 151643)
EVEN = {budgets.ODD: 50304, budgets.LARGE: 128256}  # the same program serves odd V


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile."""

    who: str  # "fused_ppl", "Liger" or "cut-cross-entropy"
    kernel: str
    dtype: str
    v: int
    target: str
    options: str = "off"


@cache
def vocabularies(kernel: str, dtype: torch.dtype, warp_size: int, options: str) -> tuple[int, ...]:
    """Odd V, one for each program that the launch configurations lead to; 50257 and 151643 stand for theirs."""
    target = next(name for name, t in aot.TARGETS.items() if t.warp_size == warp_size)
    found: dict[tuple[int, ...], int] = {}
    for v in (
        budgets.ODD,
        budgets.LARGE,
        *(int(2 ** (i / 4)) | 1 for i in range(76)),
    ):  # 1 to 440,000, four in an octave
        _, kwargs = budgets.KERNELS[kernel](dtype, v, target, **_keywords(options))
        found.setdefault((kwargs["K"], kwargs["T"], kwargs["num_warps"]), v)
    return tuple(sorted(found.values()))


def _keywords(options: str) -> dict[str, Any]:
    return dict(MODES.get(options, budgets.OPTIONS.get(options, {})))


def jobs(targets: list[str], fast: bool = False) -> Iterator[Job]:
    for target, kernel, (dtype, name) in itertools.product(targets, budgets.KERNELS, budgets.NAMES.items()):
        if fast:
            yield from (Job("fused_ppl", kernel, name, v, target) for v in EVEN)
            if kernel == "backward" and target == "sm_90":
                yield Job("fused_ppl", kernel, name, budgets.ODD, target, "entropy")
            continue
        for mode in MODES:
            for v in vocabularies(kernel, dtype, aot.TARGETS[target].warp_size, mode):
                yield Job("fused_ppl", kernel, name, v, target, mode)
        for option in budgets.OPTIONS if target == "sm_90" else ():
            # the head's kernel has other threads at the larger V, and so other registers
            for v in EVEN if kernel == "forward_backward" else (budgets.ODD,):
                if option not in MODES:
                    yield Job("fused_ppl", kernel, name, v, target, option)
    for target in () if fast else targets:
        if not peers.missing("liger_kernel"):
            yield from (Job("Liger", "forward_backward", "bf16", v, target) for v in PEER_V)
            yield Job("Liger", "forward_backward", "fp32", budgets.ODD, target)
        if not peers.missing("cut_cross_entropy"):  # which makes the logits itself, and never loads any
            yield from (Job("cut-cross-entropy", kernel, "bf16", 128256, target) for kernel in ("forward", "backward"))


def run(job: Job) -> dict[str, Any]:
    """Compiles a program and reads it."""
    dtype = next(dtype for dtype, name in budgets.NAMES.items() if name == job.dtype)
    if job.who == "fused_ppl":
        found = budgets.report(job.kernel, dtype, job.v, job.target, **_keywords(job.options))
    elif job.who == "Liger":
        found = peers.liger(dtype, job.v, job.target)
    else:
        found = peers.cce(job.kernel, dtype, job.v, job.target)
    record = dataclasses.asdict(job) | {
        "num_warps": found.num_warps,
        "registers": found.registers,
        "shared_bytes": found.shared,
        "warps_per_sm": roofline.occupancy(job.target, found.registers, found.shared, found.num_warps),
        "stack_bytes": found.stack,
        "spills": found.spills,
        "instructions": found.instructions,
        "passes": {},
        "broken": [],
    }
    # the products of cut-cross-entropy's kernels have no loop over logits
    for name, loop in found.passes.items() if job.who != "cut-cross-entropy" else ():
        record["passes"][name] = {
            "instructions_per_logit": loop.per_logit(dtype.itemsize),
            "special_per_logit": loop.mufu / loop.logits(dtype.itemsize),
            "access_bytes": sorted({aot.access_bytes(op) for op in loop.loads + loop.stores}),
            "barriers": loop.barriers,
        }
    if job.who == "fused_ppl":
        record["broken"] = broken(job, dtype, found)
    return record


def broken(job: Job, dtype: torch.dtype, found: aot.Report) -> list[str]:
    """What the program promises and does not keep."""
    if job.options == "entropy" and job.kernel == "backward":
        return budgets.violations(found, budgets.ENTROPY[dtype], dtype.itemsize)
    if job.options != "off" or job.v not in EVEN:
        return budgets.broken_promises(found, _keywords(job.options).get("contiguous", True))
    sources = (aot.source(*budgets.KERNELS[job.kernel](dtype, v, job.target)).hash() for v in (job.v, EVEN[job.v]))
    same = len(set(sources)) == 1
    return budgets.violations(found, budgets.BUDGETS[job.kernel, dtype][job.target], dtype.itemsize) + (
        [] if same else [f"another program than that of V = {EVEN[job.v]}"]
    )


def run_all(targets: list[str], fast: bool) -> list[dict[str, Any]]:
    todo = list(jobs(targets, fast))
    records = []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for record in pool.map(run, todo, chunksize=4):
            records.append(record)
            if sys.stderr.isatty():
                print(f"\r{len(records)} of {len(todo)} programs", end="", file=sys.stderr, flush=True)
    return records


def compared(records: list[dict[str, Any]]) -> list[str]:
    """Our instructions a logit in forward over the best peer's that reads logits, where one is installed."""
    lines = []
    for target, limit in (("sm_90", 0.50), ("sm_100", 0.67)):
        counts: dict[str, list[float]] = {"fused_ppl": [], "Liger": []}
        for r in records:
            wanted = (r["target"], r["dtype"], r["options"], r["v"] in PEER_V) == (target, "bf16", "off", True)
            if wanted and (r["who"], r["kernel"]) in (("fused_ppl", "forward"), ("Liger", "forward_backward")):
                counts[r["who"]].append(r["passes"]["sum"]["instructions_per_logit"])
        if all(counts.values()):
            ratio = max(counts["fused_ppl"]) / min(counts["Liger"])
            lines.append(f"{target}: forward takes {ratio:.2f} of the best peer's instructions (at most {limit})")
            if ratio > limit:
                lines[-1] += ": BROKEN"
    return lines


def table(records: list[dict[str, Any]]) -> str:
    """A row for each pass of each program with all options off or all on."""
    header = ("target", "kernel", "dtype", "V", "options", "instructions / logit", "special / logit", "access",
              "barriers", "registers", "warps of an SM", "shared", "spills")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for r in records:
        name = r["kernel"] if r["who"] == "fused_ppl" else f"{r['who']}, {r['kernel']}"
        for label, p in r["passes"].items() or (("", None),):
            several = f", {label}" if len(r["passes"]) > 1 else ""
            loop = ["", "", "", ""]
            if p is not None:
                widths = " + ".join(map(str, p["access_bytes"])) + " B"
                loop = [f"{p['instructions_per_logit']:.2f}", f"{p['special_per_logit']:.2f}", widths, p["barriers"]]
            cells = (r["target"], name + several, r["dtype"], r["v"], r["options"], *loop, r["registers"],
                     f"{r['warps_per_sm']}", r["shared_bytes"], r["spills"])  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def passes_table() -> str:
    lines = [
        "| perplexity from logits | forward | backward | passes over N x V | counted at |",
        "|---|---|---|---|---|",
    ]
    for who, package in (("fused_ppl", None), ("Liger", "liger_kernel")):
        if package and (reason := peers.missing(package)):
            lines.append(f"| {who} | {reason} | | | |")
            continue
        found = peers.passes(who)
        kinds = {phase: ", ".join(k for p, k, _ in found if p == phase) for phase in ("forward", "backward")}
        places = ", ".join(place for _, _, place in found)
        lines.append(f"| {who} | {kinds['forward']} | {kinds['backward']} | {len(found)} | {places} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=aot.TARGETS, default=list(aot.TARGETS))
    parser.add_argument("--out", type=Path, help="write every record as JSON")
    parser.add_argument("--check", action="store_true", help="print only what breaks a promise")
    parser.add_argument("--fast", action="store_true", help="only ours at V = 50257 and 151643, all options off")
    args = parser.parse_args()
    start = time.time()
    records = run_all(args.target, args.fast)
    lines = compared(records)
    wrong = [
        f"{r['target']} {r['kernel']} {r['dtype']} V = {r['v']}, options {r['options']}: {text}"
        for r in records
        for text in r["broken"]
    ] + [line for line in lines if line.endswith("BROKEN")]
    if args.check:
        sys.exit("\n".join(wrong) or 0)
    print(table([r for r in records if r["options"] in MODES]), passes_table(), sep="\n\n")
    print("\n" + roofline.table(records), "", *lines, sep="\n")
    for package in peers.PACKAGES:
        if reason := peers.missing(package):
            print(reason)
    spilling = sum(bool(r["spills"] or r["stack_bytes"]) for r in records if r["who"] == "fused_ppl")
    print(f"{len(records)} programs in {time.time() - start:.0f} s; {spilling} of ours spill", *wrong, sep="\n")
    if args.out:
        versions = {"triton": triton.__version__, "date": time.strftime("%Y-%m-%d")}
        args.out.write_text(json.dumps({"command": "python bench/static.py", **versions, "rows": records}) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
