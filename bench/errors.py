# SPDX-License-Identifier: Apache-2.0
"""Errors against float64 of eager PyTorch, in the dtype of the logits and from fp32 copies, and of fused_ppl.

    python bench/errors.py --out bench/results/errors.json

Prints the Markdown table of docs/numerics.md. The gradient's error is the largest of a row, over the largest entry of
that row, averaged over the rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from record import machine
from torch import Tensor

import fused_ppl
from fused_ppl import reference, testing
from fused_ppl.spec import LossSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROVIDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eager, same dtype": lambda x, t: F.cross_entropy(x, t).exp(),
    "eager, fp32 copy": lambda x, t: F.cross_entropy(x.float(), t).exp(),
    "fused_ppl": fused_ppl.perplexity,
}


def errors(provider: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> tuple[float, float]:
    """Relative error of the perplexity, and of the gradient."""
    truth, true_gradient = testing.value_and_gradient(
        lambda x: reference.logits_loss(x, target, LossSpec()).perplexity, logits.double()
    )
    value, gradient = testing.value_and_gradient(lambda x: provider(x, target), logits)
    of_rows = (gradient.double() - true_gradient).abs().amax(1) / true_gradient.abs().amax(1)
    return (abs(value.double() - truth) / truth).item(), of_rows.mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(128, 50257), metavar=("N", "V"))
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    n, v = args.shape
    rows = []
    for name, dtype in DTYPES.items():
        for kind in ("random", "peaked"):
            logits = testing.make_logits((n, v), dtype, kind=kind)
            target = logits.float().argmax(1) if kind == "peaked" else testing.make_target((n,), v)
            for provider, loss in PROVIDERS.items():
                value, gradient = errors(loss, logits, target)
                case = {"dtype": name, "logits": kind, "provider": provider}
                rows.append({**case, "perplexity": value, "gradient": gradient})
    print("| dtype | logits | | perplexity | gradient |\n|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['dtype']} | {r['logits']} | {r['provider']} | {r['perplexity']:.1e} | {r['gradient']:.1e} |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"command": "python bench/errors.py", "N": n, "V": v, **machine(), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
