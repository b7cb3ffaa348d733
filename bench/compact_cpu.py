# SPDX-License-Identifier: Apache-2.0
"""Time of the compact fused head on a CPU, forward + backward, over the three bare matrix products of its dtype.

    python bench/compact_cpu.py --out bench/results/compact_cpu.json

Interleaved rounds. A share of 1/8 of the columns is kept; times do not depend on what the logits hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linear_cpu
import measure
import torch

import fused_ppl
from fused_ppl import Options, plan

Case = tuple[int, int, int, str, tuple[str, ...]]  # N, V, D, dtype, and who runs
CASES: tuple[Case, ...] = (
    (2048, 128256, 1024, "fp32", ("rows", "compact", "screen bf16", "screen int8")),
    (2048, 50304, 768, "fp32", ("rows", "compact", "screen bf16", "screen int8")),
    (2048, 128256, 1024, "bf16", ("rows", "compact")),
    (2048, 50304, 768, "bf16", ("rows", "compact")),
)


def options_of(who: str, share: float) -> Options:
    if who == "rows":
        return Options()
    return Options(gradient_columns=share, screen=who.removeprefix("screen ") if who.startswith("screen") else None)


def run(case: Case, rounds: int, share: float) -> list[dict[str, Any]]:
    n, v, d, dtype, providers = case
    hidden, weight, target = linear_cpu.make_inputs(n, v, d, linear_cpu.DTYPES[dtype])
    gradient = torch.randn(n, v).to(linear_cpu.DTYPES[dtype])
    functions: dict[str, Callable[[], object]] = {"bare": lambda: linear_cpu.bare_products(hidden, weight, gradient)}
    for who in providers:
        options = options_of(who, share)
        functions[who] = lambda o=options: linear_cpu.step(
            lambda *inputs: fused_ppl.linear_cross_entropy(*inputs, options=o), hidden, weight, target
        )
    seconds = measure.interleaved(functions, rounds, warmup=2)
    return [describe(case, who, seconds[who], share) for who in functions]


def describe(case: Case, who: str, seconds: list[float], share: float) -> dict[str, Any]:
    n, v, d, dtype, _ = case
    row: dict[str, Any] = {"N": n, "V": v, "D": d, "dtype": dtype, "who": who, "seconds": seconds}
    if who not in ("bare", "rows"):
        asked = plan.Compact(None, share, options_of(who, share).screen)
        size = linear_cpu.DTYPES[dtype].itemsize
        shape = plan.LinearCase(n, v, d, size, "cpu", (True, True, False), None, asked)
        row["plan"] = plan.linear_plan(shape, "compact").explain()
    return row


def merge(rows: list[dict[str, Any]], older: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rounds of an earlier run come before those of this one; cases that it alone has are kept."""
    found = {(row["V"], row["dtype"], row["who"]): row for row in older}
    for row in rows:
        key = (row["V"], row["dtype"], row["who"])
        found[key] = {**row, "seconds": found.get(key, {"seconds": []})["seconds"] + row["seconds"]}
    return sorted(found.values(), key=lambda row: (row["dtype"] != "fp32", -row["V"]))


def table(record: dict[str, Any]) -> str:
    rounds = [len(row["seconds"]) for row in record["rows"]]
    lines = [
        f"K = V/{1 / record['share']:.0f}, {record['threads']} threads, {record['processor']}, "
        f"torch {record['torch']}, {record['date']}, {min(rounds)} interleaved rounds",
        "",
        "| N, V, D | dtype | | forward + backward | over the bare products, with the 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        (bare,) = (r for r in record["rows"] if r["who"] == "bare" and all(r[k] == row[k] for k in ("V", "dtype")))
        low, median, high = measure.bootstrap_ratio(row["seconds"], bare["seconds"])
        shape = f"{row['N']}, {row['V']}, {row['D']}"
        seconds = f"{statistics.median(row['seconds']):.2f} s | {median:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {shape} | {row['dtype']} | {row['who']} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--share", type=float, default=1 / 8, help="of the columns that are kept (%(default)s)")
    parser.add_argument("--case", type=int, nargs="+", choices=range(len(CASES)), default=list(range(len(CASES))))
    parser.add_argument("--out", type=Path, help="write the record as JSON, after the rounds that are in it")
    args = parser.parse_args()
    rows = []
    for case in args.case:
        rows += run(CASES[case], args.rounds, args.share)
    if args.out and args.out.exists():
        rows = merge(rows, json.loads(args.out.read_text())["rows"])
    record = {"command": "python bench/compact_cpu.py", "share": args.share}
    record |= {**measure.machine(), "rows": rows}
    print(table(record))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
