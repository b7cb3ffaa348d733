# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the divergence of two heads on a CPU, forward + backward, over the four bare matrix products.

    python bench/divergence.py --dtype fp32 --out bench/results/divergence.json --plot bench/results/divergence.png

The products are those of both heads and of the two gradients, into memory that is there already. "TRL" is the function
of its DistillationTrainer. It computes the logits again in backward, and twice in forward for a mixture. Full logits
are plain PyTorch. Rounds are interleaved. Memory is that of a second step in a fresh process, beyond the inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import record as records
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ppl
from fused_ppl import plan

SHAPE = {"N": 1024, "V": 50304, "D": 768, "D of the teacher": 1024}
BETAS = {"forward": 0.0, "reverse": 1.0, "jensen_shannon": 0.5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARE = "4 products"


def make_inputs(dtype: str) -> tuple[Tensor, ...]:
    """Hidden states and weight of the student, and of the teacher."""
    generator = torch.Generator().manual_seed(0)
    n, v, d, other = SHAPE.values()
    shapes = ((n, d), (v, d), (n, other), (v, other))
    scales = (1.0, 2 / d**0.5, 1.0, 2 / other**0.5)
    tensors = [(torch.randn(s, generator=generator) * c).to(DTYPES[dtype]) for s, c in zip(shapes, scales, strict=True)]
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]


def ours(direction: str, *tensors: Tensor) -> Tensor:
    return fused_ppl.linear_kl_divergence(*tensors, direction=direction)


def trl(direction: str, *tensors: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, weight, teacher, teacher_weight = tensors
    value, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, teacher_weight, None, BETAS[direction])
    return value.mean()


def full_logits(direction: str, *tensors: Tensor) -> Tensor:
    student, weight, teacher, teacher_weight = tensors
    log_p = (student @ weight.T).float().log_softmax(-1)
    log_q = (teacher @ teacher_weight.T).float().log_softmax(-1)
    if direction == "forward":
        return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    if direction == "reverse":
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return sum(F.kl_div(log_m, log, log_target=True, reduction="batchmean") for log in (log_p, log_q)) / 2


METHODS: dict[str, Callable[..., Tensor]] = {"fused_ppl": ours, "TRL": trl, "full logits": full_logits}


def step(method: str, direction: str, tensors: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(METHODS[method](direction, *tensors), tensors[:2])


def products(tensors: tuple[Tensor, ...]) -> Callable[[], object]:
    student, weight, teacher, teacher_weight = (t.detach() for t in tensors)
    logits, gradient = (torch.randn(student.shape[0], weight.shape[0]).to(student.dtype) for _ in range(2))
    dhidden, dweight = torch.empty_like(student), torch.empty_like(weight)

    def run() -> object:
        torch.mm(student, weight.t(), out=logits)
        torch.mm(teacher, teacher_weight.t(), out=logits)
        torch.mm(gradient, weight, out=dhidden)
        return torch.mm(gradient.t(), student, out=dweight)

    return run


def timed(dtype: str, direction: str, *, rounds: int, methods: list[str]) -> list[dict[str, Any]]:
    tensors = make_inputs(dtype)
    functions = {BARE: products(tensors)} | {m: step(m, direction, tensors) for m in methods}
    seconds = measure.interleaved({who: lambda f=f: f for who, f in functions.items()}, rounds=rounds)
    rows = [{"dtype": dtype, "direction": direction, "who": who, "seconds": seconds[who]} for who in functions]
    for row in rows[1:]:
        row["peak_bytes"] = measure.in_fresh_process(_peak, row["who"], direction, dtype, torch.get_num_threads())
    return rows


def _peak(method: str, direction: str, dtype: str, threads: int) -> int:
    torch.set_num_threads(threads)
    tensors = make_inputs(dtype)
    small = tuple(t[:8].detach().requires_grad_() for t in tensors)
    step(method, direction, small)()  # loads the code
    run = step(method, direction, tensors)
    meter = measure.ResidentMeter()
    run()
    meter.reset()
    kept = run()  # the second, as a training loop has it
    peak = meter.peak()
    del kept
    return peak


def planned_bytes(dtype: str) -> int:
    n, v, d, other = SHAPE.values()
    size = DTYPES[dtype].itemsize
    case = plan.LinearCase(n, v, d, size, "cpu", (True, True, False), teacher_size=other, teacher_itemsize=size)
    return plan.linear_plan(case, "rows").peak_bytes


def table(record: dict[str, Any]) -> str:
    shape = ", ".join(f"{name} = {size}" for name, size in record["shape"].items())
    lines = [
        f"{shape}, {record['threads']} threads, {record['processor']}, torch {record['torch']}, {record['date']}, "
        f"{len(record['rows'][0]['seconds'])} interleaved rounds",
        "",
        "| dtype | direction | | forward + backward | over the bare products, with the 95 % interval | memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        same = [r for r in record["rows"] if (r["dtype"], r["direction"]) == (row["dtype"], row["direction"])]
        low, median, high = measure.bootstrap_ratio(row["seconds"], same[0]["seconds"])
        memory = f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""
        if row["who"] == "fused_ppl":
            memory += f" (plan {planned_bytes(row['dtype']) / 2**20:.0f})"
        times = f"{statistics.median(row['seconds']):.2f} s | {median:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {row['dtype']} | {row['direction']} | {row['who']} | {times} | {memory} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    import plots  # imported here, because only a plot needs matplotlib

    panels: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        panels.setdefault(f"{row['dtype']}, {row['direction']}", {})[row["who"]] = statistics.median(row["seconds"])
    n, v, d, other = record["shape"].values()
    plots.bars(panels, f"Divergence of two heads, N={n}, V={v}, D={d} and {other}, {record['processor']}", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--direction", nargs="+", choices=BETAS, default=list(BETAS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--plot", type=Path, help="draw it, as PNG")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    record = {"command": "python bench/divergence.py", "shape": SHAPE, **records.machine(), "rows": rows}
    for dtype in args.dtype:
        for direction in args.direction:
            rows += timed(dtype, direction, rounds=args.rounds, methods=args.method)
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
