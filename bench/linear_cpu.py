# SPDX-License-Identifier: Apache-2.0
"""Perplexity through an LM head on a CPU, forward + backward: time over the bare matrix products, and peak memory.

    python bench/linear_cpu.py --out bench/results/linear_cpu.json
    python bench/linear_cpu.py --memory --out bench/results/linear_memory.json

The first interleaves the providers and divides by the three products alone (logits, dh, dW, outputs freshly
allocated). The second measures peak resident memory of fused_ppl and of eager, each in a fresh process, above inputs
and one copy of the gradients, beside the plan's prediction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ppl
from fused_ppl import plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target).exp()


def eager_fp32(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target).exp()


def torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, options=options).exp()


def losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    found = {
        "fused_ppl": fused_ppl.linear_perplexity,
        "eager": eager,
        "eager, fp32 logits": eager_fp32,
        "torch.compile": torch.compile(eager),
        "torch.compile, fp32 logits": torch.compile(eager_fp32),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy, chunked"] = torch_chunked
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        print("cut-cross-entropy: not installed (pip install cut-cross-entropy)", file=sys.stderr)
    else:
        found["cut-cross-entropy, torch_compile"] = lambda h, w, t: linear_cross_entropy(
            h, w, t, impl="torch_compile"
        ).exp()
    return found


def make_inputs(n: int, v: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) * 2 / d**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def step(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))


def bare_products(hidden: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    hidden, weight = hidden.detach(), weight.detach()
    return torch.mm(hidden, weight.t()), torch.mm(gradient, weight), torch.mm(gradient.t(), hidden)


def time_all(args: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    for dtype in args.dtype:
        hidden, weight, target = make_inputs(*args.shape, DTYPES[dtype])
        gradient = torch.randn(args.shape[0], args.shape[1]).to(DTYPES[dtype])
        functions: dict[str, Callable[[], object]] = {
            "bare": lambda h=hidden, w=weight, g=gradient: bare_products(h, w, g)
        }
        for name, loss in losses().items():
            if args.provider and not any(wanted in name for wanted in args.provider):
                continue
            functions[name] = lambda loss=loss, h=hidden, w=weight, t=target: step(loss, h, w, t)
        seconds = measure.interleaved(functions, args.rounds)
        for name in functions:
            row: dict[str, object] = {"dtype": dtype, "provider": name, "seconds": statistics.median(seconds[name])}
            row["over_bare"] = measure.paired_ratio(seconds[name], seconds["bare"])
            row["ours_over_it"] = measure.bootstrap_ratio(seconds["fused_ppl"], seconds[name])
            rows.append(row)
    return rows


def peak_of(provider: str, shape: tuple[int, int, int], dtype: str) -> int:
    """Above inputs and one copy of the gradients, in a fresh process: freed memory hides from the next measurement."""
    command = [sys.executable, __file__, "--peak-of", provider, "--dtype", dtype, "--shape", *map(str, shape)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    n, v, d = shape
    return int(result.stdout.split()[-1]) - (n * d + v * d) * DTYPES[dtype].itemsize


def memory_all(args: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    n, v, d = args.shape
    for dtype in args.dtype:
        size = DTYPES[dtype].itemsize
        made = plan.linear_plan(plan.LinearCase(n, v, d, size, "cpu", (True, True, False)), "rows")
        # forward holds a chunk and the fp32 gradients; backward those, the copy that is taken off, and the buffer of
        # the chunk, which waits, unless the gradient of the weight has just its size
        gradients, chunk = (n * d + v * d) * size, made.temporary_bytes
        waiting = 0 if v * d * size <= chunk <= v * d * size * 5 // 4 else chunk
        predicted = max(chunk + made.saved_bytes - gradients, made.saved_bytes + waiting)
        base = peak_of("eager", (n, v, d), dtype)
        for provider in ("eager", "fused_ppl"):
            peak = base if provider == "eager" else peak_of(provider, (n, v, d), dtype)
            row: dict[str, object] = {"dtype": dtype, "provider": provider, "bytes": peak, "over_eager": peak / base}
            rows.append(row | ({"predicted": predicted, "plan": made.explain()} if provider == "fused_ppl" else {}))
    return rows


def time_table(record: dict[str, Any]) -> str:
    lines = [
        f"N={record['N']}, V={record['V']}, D={record['D']}, {record['threads']} threads, {record['processor']}, "
        f"torch {record['torch']}, {record['date']}, {record['rounds']} interleaved rounds",
        "",
        "| dtype | | forward + backward | over the bare products | fused_ppl over it, with the 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        low, median, high = row["ours_over_it"]
        lines.append(
            f"| {row['dtype']} | {row['provider']} | {row['seconds']:.2f} s | {row['over_bare']:.2f} | "
            f"{median:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def memory_table(record: dict[str, Any]) -> str:
    lines = [
        f"N={record['N']}, V={record['V']}, D={record['D']}, {record['processor']}, torch {record['torch']}, "
        f"{record['date']}",
        "",
        "| dtype | | peak | over eager | the plan's prediction |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        predicted = f"{row['predicted'] / 2**20:.0f} MiB" if "predicted" in row else ""
        lines.append(
            f"| {row['dtype']} | {row['provider']} | {row['bytes'] / 2**20:.0f} MiB | {row['over_eager']:.1%} | "
            f"{predicted} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "V", "D"))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--provider", nargs="+", help="only those whose name contains one of these; fused_ppl is needed"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory in the place of time")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = args.shape or ([4096, 128256, 512] if args.memory else [2048, 50304, 768])
    if args.peak_of:
        loss = {"eager": eager, "fused_ppl": fused_ppl.linear_perplexity}[args.peak_of]
        step(loss, *make_inputs(64, 997, 64, DTYPES[args.dtype[0]]))
        inputs = make_inputs(*args.shape, DTYPES[args.dtype[0]])
        print(measure.peak_resident(lambda: step(loss, *inputs)))
        return
    rows = memory_all(args) if args.memory else time_all(args)
    case = {"command": "python bench/linear_cpu.py" + " --memory" * args.memory, "rounds": args.rounds}
    case |= dict(zip("NVD", args.shape, strict=True))
    record = {**case, **measure.machine(), "rows": rows}
    print(memory_table(record) if args.memory else time_table(record))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
