# SPDX-License-Identifier: Apache-2.0
"""Time of fused_ppl and torch.compile on a CPU, alone and while other programs run.

    python bench/loaded.py --out bench/results/loaded.json

Three loads: nothing, one busy process for each core, and two programs that multiply matrices in as many threads as
there are cores. Rounds are interleaved, so that both methods meet the same load. Ratios are medians of each round's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import record as records
import torch
import torch.nn.functional as F

import fused_ppl

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUSY = "while True: pass"
PRODUCTS = "import torch; a = torch.randn(2000, 2000)\nwhile True: a @ a"
LOADS = {
    "quiet": [],
    "busy process a core": [BUSY] * torch.get_num_threads(),
    "two programs of many threads": [PRODUCTS] * 2,
}
SETTLE = 2.0  # seconds until the other programs are at work


@contextlib.contextmanager
def load(programs: list[str]) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        time.sleep(SETTLE if running else 0)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@torch.compile
def compiled_logits(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), target).exp()


@torch.compile
def compiled_head(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), target).exp()


LOSSES: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "logits": {"fused_ppl": fused_ppl.perplexity, "torch.compile": compiled_logits},
    "head": {"fused_ppl": fused_ppl.linear_perplexity, "torch.compile": compiled_head},
}


def make_inputs(op: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    n, v, d = shape
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(v, (n,), generator=generator)
    if op == "logits":
        return [(3 * torch.randn(n, v, generator=generator)).to(dtype)], target
    hidden, weight = torch.randn(n, d, generator=generator), 0.05 * torch.randn(v, d, generator=generator)
    return [hidden.to(dtype), weight.to(dtype)], target


def calls(op: str, mode: str, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    inputs, target = make_inputs(op, shape, dtype)
    leaves = [t.requires_grad_(mode == "forward + backward") for t in inputs]

    def call(loss: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            value = loss(*leaves, target)
            return torch.autograd.grad(value, leaves) if value.requires_grad else value

        return run

    return {who: call(loss) for who, loss in LOSSES[op].items()}


def table(record: dict[str, Any]) -> str:
    n, v, d = record["shape"]
    lines = [
        f"N={n}, V={v}, D={d}, {record['threads']} threads, {record['processor']}, torch {record['torch']}, "
        f"{record['date']}, {len(record['rows'][0]['seconds']['fused_ppl'])} interleaved rounds",
        "",
        "| over torch.compile, with the 95 % interval | " + " | ".join(LOADS) + " |",
        "|---|" + "---|" * len(LOADS),
    ]
    rows = {(r["op"], r["mode"], r["dtype"], r["load"]): r["seconds"] for r in record["rows"]}
    for op, mode, dtype in dict.fromkeys(key[:3] for key in rows):
        cells = []
        for name in LOADS:
            seconds = rows.get((op, mode, dtype, name))
            if seconds is None:
                cells.append("")
                continue
            low, median, high = measure.bootstrap_ratio(seconds["fused_ppl"], seconds["torch.compile"])
            cells.append(
                f"{statistics.median(seconds['fused_ppl']) * 1e3:.0f} ms, {median:.2f} ({low:.2f} to {high:.2f})"
            )
        lines.append(f"| {op}, {mode}, {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 50257, 256), metavar=("N", "V", "D"))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--load", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    record = {"command": "python bench/loaded.py", "shape": list(args.shape), **records.machine(), "rows": rows}
    modes = ("forward", "forward + backward")
    for op, mode, dtype in itertools.product(LOSSES, modes, args.dtype):
        functions = calls(op, mode, tuple(args.shape), DTYPES[dtype])
        prepare = {who: lambda f=f: f for who, f in functions.items()}
        measure.interleaved(prepare, rounds=1)  # compiled before the load starts
        for name in args.load:
            with load(LOADS[name]):
                seconds = measure.interleaved(prepare, rounds=args.rounds)
            rows.append({"op": op, "mode": mode, "dtype": dtype, "load": name, "seconds": seconds})
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(table(record).splitlines()[-1], flush=True)
    print(table(record))


if __name__ == "__main__":
    main()
