# SPDX-License-Identifier: Apache-2.0
"""Perplexity from logits on a CPU, forward + backward: time against eager PyTorch, and peak memory.

    python bench/logits_cpu.py --out bench/results/logits_cpu.json

Prints a Markdown table for docs/measured.md. Eager is `F.cross_entropy(x.float(), t).exp()`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ppl

PROVIDERS = ("eager", "torch.compile", "fused_ppl", "fused_ppl, in place")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_inputs(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, v, generator=generator) * 3).to(dtype)
    return logits, torch.randint(v, (n,), generator=generator)


def eager(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float(), target).exp()


def step(provider: str, logits: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """One forward + backward; returns the gradient of the logits."""
    if provider == "fused_ppl, in place":
        options = fused_ppl.Options(inplace_backward=True)

        made = logits.detach().requires_grad_().clone()  # not a leaf, as the logits of a model are not

        def in_place() -> Tensor:
            return torch.autograd.grad(fused_ppl.perplexity(made, target, options=options), made)[0]

        return in_place
    loss_of = {"eager": eager, "torch.compile": torch.compile(eager), "fused_ppl": fused_ppl.perplexity}[provider]

    def out_of_place() -> Tensor:
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(loss_of(x, target), x)[0]

    return out_of_place


def peak(provider: str, dtype: str, n: int, v: int) -> int:
    """In a fresh process, because freed memory hides from the next measurement."""
    command = [sys.executable, __file__, "--peak-of", provider, "--dtype", dtype, "--shape", str(n), str(v)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_here(provider: str, dtype: str, n: int, v: int) -> int:
    warm_logits, warm_target = make_inputs(64, 997, DTYPES[dtype])
    step(provider, warm_logits, warm_target)()
    logits, target = make_inputs(n, v, DTYPES[dtype])
    run = step(provider, logits, target)
    return measure.peak_resident(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 50257), metavar=("N", "V"))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--peak-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    n, v = args.shape
    if args.peak_of:
        print(peak_here(args.peak_of, args.dtype[0], n, v))
        return

    rows = []
    for dtype in args.dtype:
        functions = {}
        for provider in PROVIDERS:
            # each provider has its own logits: the one in place destroys them, at the same cost every time
            functions[provider] = step(provider, *make_inputs(n, v, DTYPES[dtype]))
        seconds = measure.interleaved(functions, args.rounds, warmup=2)
        gradient = n * v * DTYPES[dtype].itemsize
        for provider in PROVIDERS:
            rows.append(
                {
                    "dtype": dtype,
                    "provider": provider,
                    "seconds": statistics.median(seconds[provider]),
                    "ratio": measure.paired_ratio(seconds[provider], seconds["eager"]),
                    "peak_beyond_gradient": peak(provider, dtype, n, v) - gradient,
                }
            )
    case = {"command": "python bench/logits_cpu.py", "N": n, "V": v, "rounds": args.rounds}
    record = {**case, **measure.machine(), "rows": rows}
    print(table(record))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict) -> str:
    lines = [
        f"N={record['N']}, V={record['V']}, {record['threads']} threads, {record['processor']}, "
        f"torch {record['torch']}, {record['date']}, {record['rounds']} interleaved rounds",
        "",
        "| dtype | | forward + backward | over eager, median of rounds | peak memory beyond one gradient |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['dtype']} | {row['provider']} | {row['seconds'] * 1e3:.0f} ms | {row['ratio']:.2f} | "
            f"{row['peak_beyond_gradient'] / 2**20:+.0f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
