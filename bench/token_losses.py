# SPDX-License-Identifier: Apache-2.0
"""Time of losses of tokens over the fused head on a CPU, forward + backward: PPO with clipping and an entropy bonus.

    python bench/token_losses.py --out bench/results/token_losses.json --plot bench/results/token_losses.png

The bare matrix products that each method needs at least stand beside it, into memory that is there already: three for
`linear_token_loss`, four for `linear_log_probs`, which computes the logits again in backward. "TRL" is the function of
its trainers with the same loss, and "full logits" is plain PyTorch. Rounds are interleaved.
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
from torch import Tensor

import fused_ppl

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARE = {"linear_token_loss": "3 products", "linear_cross_entropy": "3 products"}  # "4 products" of all others
TRL_CHUNK = 8192  # columns, the default of TRL
Inputs = dict[str, Tensor]


def ppo(log_prob: Tensor, entropy: Tensor, advantage: Tensor, old: Tensor) -> Tensor:
    ratio = (log_prob - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - 0.01 * entropy


def make_inputs(n: int, v: int, d: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) * 2 / d**0.5).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), generator=generator)
    with torch.no_grad():
        old = fused_ppl.linear_log_probs(hidden, weight, target).log_prob
        old += 0.2 * torch.randn(n, generator=generator)
    return {"hidden": hidden, "weight": weight, "target": target, "advantage": torch.randn(n), "old": old}


def token_loss(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, old: Tensor) -> Tensor:
    return fused_ppl.linear_token_loss(hidden, weight, target, ppo, advantage, old)


def log_probs(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, old: Tensor) -> Tensor:
    values = fused_ppl.linear_log_probs(hidden, weight, target)
    return ppo(values.log_prob, values.entropy, advantage, old).mean()


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, old: Tensor) -> Tensor:
    return fused_ppl.linear_cross_entropy(hidden, weight, target)


def trl(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, old: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    log_prob, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
    )
    return ppo(log_prob, entropy, advantage, old).mean()


def full_logits(hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, old: Tensor) -> Tensor:
    logp = (hidden @ weight.T).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return ppo(logp.gather(1, target[:, None])[:, 0], entropy, advantage, old).mean()


METHODS: dict[str, Callable[..., Tensor]] = {
    "linear_token_loss": token_loss,
    "linear_log_probs": log_probs,
    "linear_cross_entropy": cross_entropy,
    "TRL": trl,
    "full logits": full_logits,
}


def products(inputs: Inputs, count: int) -> Callable[[], object]:
    """The three or four products of the dtype, into memory that is there."""
    h, w = inputs["hidden"].detach(), inputs["weight"].detach()
    gradient = torch.randn(h.shape[0], w.shape[0]).to(h.dtype)
    logits, dhidden, dweight = (torch.empty_like(t) for t in (gradient, h, w))

    def run() -> object:
        for _ in range(count - 2):
            torch.mm(h, w.t(), out=logits)
        torch.mm(gradient, w, out=dhidden)
        return torch.mm(gradient.t(), h, out=dweight)

    return run


def steps(inputs: Inputs, methods: list[str]) -> dict[str, Callable[[], object]]:
    def step(method: str) -> Callable[[], object]:
        def run() -> object:
            return torch.autograd.grad(METHODS[method](**inputs), (inputs["hidden"], inputs["weight"]))

        return run

    return {"3 products": products(inputs, 3), "4 products": products(inputs, 4)} | {m: step(m) for m in methods}


def measured(shape: tuple[int, int, int], dtype: str, *, rounds: int, methods: list[str]) -> list[dict[str, Any]]:
    functions = steps(make_inputs(*shape, DTYPES[dtype]), methods)
    seconds = measure.interleaved({who: lambda f=f: f for who, f in functions.items()}, rounds=rounds)
    return [{"dtype": dtype, "who": who, "seconds": seconds[who]} for who in functions]


def ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """The time of a row over that of its bare products, with the 95 % interval around the median."""
    bare = row["who"] if "products" in row["who"] else BARE.get(row["who"], "4 products")
    beside = next(r for r in rows if (r["dtype"], r["who"]) == (row["dtype"], bare))
    return measure.bootstrap_ratio(row["seconds"], beside["seconds"])


def table(record: dict[str, Any]) -> str:
    n, v, d = record["shape"]
    lines = [
        f"N={n}, V={v}, D={d}, {record['threads']} threads, {record['processor']}, torch {record['torch']}, "
        f"{record['date']}, {len(record['rows'][0]['seconds'])} interleaved rounds",
        "",
        "| dtype | | forward + backward | over its bare products, with the 95 % interval |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        low, median, high = ratio(row, record["rows"])
        value = f"{statistics.median(row['seconds']):.2f} s | {median:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {row['dtype']} | {row['who']} | {value} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    import plots  # imported here, because only a plot needs matplotlib

    panels: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        panels.setdefault(row["dtype"], {})[row["who"]] = statistics.median(row["seconds"])
    n, v, d = record["shape"]
    plots.bars(panels, f"PPO with an entropy bonus, N={n}, V={v}, D={d}, {record['processor']}", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", type=int, nargs=3, default=(2048, 50304, 768), metavar=("N", "V", "D"))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--plot", type=Path, help="draw it, as PNG")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    record = {"command": "python bench/token_losses.py", "shape": list(args.shape), **records.machine(), "rows": rows}
    for dtype in args.dtype:
        rows += measured(tuple(args.shape), dtype, rounds=args.rounds, methods=args.method)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
