# SPDX-License-Identifier: Apache-2.0
"""What a float32 chunk of logits would gain a head in bf16, as torch 2.15's linear_cross_entropy has on a GPU.

    python bench/chunk_dtype.py --out bench/results/chunk_dtype.json

A bf16 product rounds the logits of a chunk. Errors of nll (largest of a token, in nats, and of their mean) and of the
gradients (relative, Frobenius) against float64 of the same bf16 inputs. fused_ppl takes the target's logit from a
float32 dot product; "float32 chunk" also has all others from a float32 product, in twice the bytes. "torch's way" is a
bf16 chunk that the target's logit is read from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import record as records
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ppl

INPUTS = ("random", "confident")


def make_inputs(kind: str, n: int, v: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16. "confident": a row of the weight stands out, by about ten nats, and is the target."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) / d**0.5
    target = torch.randint(v, (n,), generator=generator)
    if kind == "confident":
        hidden += weight[target] * 18
    return hidden.bfloat16(), weight.bfloat16(), target


def full(hidden: Tensor, weight: Tensor, target: Tensor, *, logits: torch.dtype, gradient: torch.dtype) -> list[Tensor]:
    """nll, dh and dW: logits rounded to one dtype, their gradient to another, products summed in float32 or wider."""
    wide = torch.float64 if logits == torch.float64 else torch.float32
    h, w = hidden.to(wide), weight.to(wide)
    z = (h @ w.t()).to(logits).to(wide)
    nll = F.cross_entropy(z, target, reduction="none")
    g = (z.softmax(1) - F.one_hot(target, len(weight)).to(wide)).to(gradient).to(wide)
    return [nll, g @ w, g.t() @ h]


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    with torch.no_grad():
        nll = fused_ppl.linear_cross_entropy(hidden, weight, target, reduction="none")
    leaves = [t.float().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_ppl.linear_cross_entropy(*leaves, target, reduction="sum")
    return [nll, *torch.autograd.grad(loss, leaves)]


def rows(kind: str, n: int, v: int, d: int) -> list[dict[str, Any]]:
    inputs = make_inputs(kind, n, v, d)
    truth = full(*inputs, logits=torch.float64, gradient=torch.float64)
    found = {
        "fused_ppl, bf16 chunk": (2, ours(*inputs)),
        "float32 chunk": (4, full(*inputs, logits=torch.float32, gradient=torch.bfloat16)),
        "torch's way, bf16 chunk": (2, full(*inputs, logits=torch.bfloat16, gradient=torch.bfloat16)),
    }
    result = []
    for who, (size, values) in found.items():
        nll = values[0].double() - truth[0]
        gradients = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(values[1:], truth[1:], strict=True)]
        errors = {"token": nll.abs().max().item(), "mean": abs(nll.mean().item())}
        result.append({"inputs": kind, "who": who, "bytes": size, **errors, "gradients": gradients})
    return result


def table(record: dict[str, Any]) -> str:
    lines = ["| inputs | | bytes a logit | nll of a token | mean nll | dh, dW |", "|---|---|---|---|---|---|"]
    for r in record["rows"]:
        gradients = ", ".join(f"{e:.1e}" for e in r["gradients"])
        errors = f"{r['token']:.1e} | {r['mean']:.1e} | {gradients}"
        lines.append(f"| {r['inputs']} | {r['who']} | {r['bytes']} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 50304, 768), metavar=("N", "V", "D"))
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    found = [row for kind in INPUTS for row in rows(kind, *args.shape)]
    record = {"command": "python bench/chunk_dtype.py", "shape": args.shape, **records.machine(), "rows": found}
    print(table(record))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
