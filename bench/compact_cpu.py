# SPDX-License-Identifier: Apache-2.0
"""Time of the compact fused head on a CPU, forward + backward, over the three bare matrix products of its dtype: into
memory that is there already ("bare"), and as `h @ w.T` would do it, which asks for fresh memory ("bare, fresh").

    python bench/compact_cpu.py --out bench/results/compact_cpu.json

Interleaved rounds. A share of 1/8 of the columns is kept; times do not depend on what the logits hold.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import record as records
import torch
from torch import Tensor

import fused_ppl
from fused_ppl import Options, plan

BARE = ("bare", "bare, fresh")  # into memory that is there, and as `h @ w.T` does it, into fresh memory
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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


def make_inputs(n: int, v: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) * 2 / d**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def run(case: Case, rounds: int, share: float) -> list[dict[str, Any]]:
    n, v, d, dtype, providers = case
    hidden, weight, target = make_inputs(n, v, d, DTYPES[dtype])
    gradient = torch.randn(n, v).to(DTYPES[dtype])
    h, w = hidden.detach(), weight.detach()

    logits, dhidden, dweight = (torch.empty_like(t) for t in (gradient, h, w))

    def bare() -> object:
        torch.mm(h, w.t(), out=logits)
        torch.mm(gradient, w, out=dhidden)
        return torch.mm(gradient.t(), h, out=dweight)

    def fresh() -> object:
        return torch.mm(h, w.t()), torch.mm(gradient, w), torch.mm(gradient.t(), h)

    def step(options: Options) -> object:
        loss = fused_ppl.linear_cross_entropy(hidden, weight, target, options=options)
        return torch.autograd.grad(loss, (hidden, weight))

    functions: dict[str, Callable[[], object]] = {"bare": bare, "bare, fresh": fresh}
    functions |= {who: functools.partial(step, options_of(who, share)) for who in providers}
    seconds = measure.interleaved({who: lambda f=f: f for who, f in functions.items()}, rounds=rounds)
    return [describe(case, who, seconds[who], share) for who in functions]


def describe(case: Case, who: str, seconds: list[float], share: float) -> dict[str, Any]:
    n, v, d, dtype, _ = case
    row: dict[str, Any] = {"N": n, "V": v, "D": d, "dtype": dtype, "who": who, "seconds": seconds}
    if who not in (*BARE, "rows"):
        asked = plan.Compact(None, share, options_of(who, share).screen)
        size = DTYPES[dtype].itemsize
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
        "| N, V, D | dtype | | forward + backward | over the bare products, with the 95 % interval | over fresh ones |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        beside = {r["who"]: r for r in record["rows"] if all(r[k] == row[k] for k in ("V", "dtype"))}
        (low, median, high), (_, fresh, _) = (
            measure.bootstrap_ratio(row["seconds"], beside[who]["seconds"]) for who in BARE
        )
        shape = f"{row['N']}, {row['V']}, {row['D']}"
        seconds = f"{statistics.median(row['seconds']):.2f} s | {median:.2f} ({low:.2f} to {high:.2f}) | {fresh:.2f}"
        lines.append(f"| {shape} | {row['dtype']} | {row['who']} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--share", type=float, default=1 / 8, help="of the columns that are kept (%(default)s)")
    parser.add_argument("--case", type=int, nargs="+", choices=range(len(CASES)), default=list(range(len(CASES))))
    parser.add_argument("--out", type=Path, help="write the record as JSON, after the rounds that are in it")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    for case in args.case:
        rows = merge(run(CASES[case], args.rounds, args.share), rows)
        record = {"command": "python bench/compact_cpu.py", "share": args.share}
        record |= {**records.machine(), "rows": rows}
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
