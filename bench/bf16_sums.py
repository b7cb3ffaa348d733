# SPDX-License-Identifier: Apache-2.0
"""Does a CPU's bf16 product, which is rounded before it is added to dW, bias the gradient or a training run?

    python bench/bf16_sums.py --out bench/results/bf16_sums.json

A CPU's bf16 product returns bf16. Plan `rows` adds one for each chunk to the float32 dW. "Rounded" is this; "exact"
computes the same products of the same bf16 numbers in float32. Two questions are asked:

- dW of one batch in 1 to 256 chunks: the part of its error along dW itself, which is a bias, and its whole error;
- a small language model on Python's sources, 300 steps of 256 chunks: validation perplexity and entropy at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import record as records
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_ppl
from fused_ppl import plan
from fused_ppl.engines.head import Head

CHUNKS = (1, 4, 16, 64, 256)
TOKENS, CLASSES, SIZE, CONTEXT, STEPS, AVERAGED = 1024, 4096, 128, 4, 300, 50
METHODS = ("rounded", "exact")


def add_exactly(self: Head, out: Tensor, a: Tensor, b: Tensor, fresh: bool = False) -> None:
    out.copy_(a.float() @ b.float()) if fresh else out.addmm_(a.float(), b.float())


@contextlib.contextmanager
def products(method: str, chunks: int) -> Iterator[None]:
    """bf16 products in so many chunks, rounded before they are added or not."""
    rows = TOKENS // chunks
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(plan.MIN_ROWS["cpu"], {2: rows}))
        stack.enter_context(mock.patch.dict(plan.MAX_ROWS, {"cpu": rows}))
        if method == "exact":
            stack.enter_context(mock.patch.object(Head, "add_product", add_exactly))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def gradient(method: str, chunks: int, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    with products(method, chunks):
        loss = fused_ppl.linear_cross_entropy(hidden, weight, target, reduction="sum")
    return torch.autograd.grad(loss, weight)[0].double()


def errors_of_gradient(chunks: int, seed: int) -> dict[str, float]:
    """Relative errors of dW: along dW, and all of it (Frobenius)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, SIZE, generator=generator)
    weight = (torch.randn(CLASSES, SIZE, generator=generator) * 2 / SIZE**0.5).requires_grad_()
    target = torch.randint(CLASSES, (TOKENS,), generator=generator)
    exact = gradient("exact", chunks, hidden, weight, target)
    error = gradient("rounded", chunks, hidden, weight, target) - exact
    return {"along": float((error * exact).sum() / exact.square().sum()), "all": float(error.norm() / exact.norm())}


class Model(nn.Module):
    """The next token from the last CONTEXT tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(CLASSES, SIZE), nn.Linear(SIZE, CLASSES, bias=False)
        self.hidden = nn.Sequential(nn.Linear(CONTEXT * SIZE, 4 * SIZE), nn.GELU(), nn.Linear(4 * SIZE, SIZE))

    def forward(self, windows: Tensor) -> Tensor:
        return self.hidden(self.embedding(windows).flatten(1))


def corpus() -> Tensor:
    """Windows (n, CONTEXT + 1) of tokens of the standard library."""
    from tokenizers import ByteLevelBPETokenizer

    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*.py"))[:100]]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, CLASSES, show_progress=False)
    return torch.tensor(tokenizer.encode("".join(texts)).ids).unfold(0, CONTEXT + 1, 1)


def train(method: str, windows: Tensor, seed: int) -> dict[str, float]:
    """Means over the last validations: perplexity, and entropy of the prediction in nats."""
    torch.manual_seed(seed)
    model, held, chunks = Model(), windows[-8 * TOKENS :: 8], 256
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    perplexity, entropy = [], []
    for step in range(STEPS):
        batch = windows[torch.randint(len(windows) - 8 * TOKENS, (TOKENS,))]
        with products(method, chunks):
            hidden = model(batch[:, :-1])
            loss = fused_ppl.linear_cross_entropy(hidden, model.head.weight, batch[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= STEPS - AVERAGED:
            with torch.no_grad():
                hidden = model(held[:, :-1])
                out = fused_ppl.linear_cross_entropy_with_stats(hidden, model.head.weight, held[:, -1])
            perplexity.append(float(out.perplexity))
            entropy.append(float(out.entropy.mean()))
    return {"perplexity": statistics.mean(perplexity), "entropy": statistics.mean(entropy)}


def table(record: dict[str, Any]) -> str:
    lines = ["| chunks | error along dW | all of it |", "|---|---|---|"]
    for chunks, seeds in record["gradient"].items():
        along = [s["along"] for s in seeds]
        whole = statistics.mean(s["all"] for s in seeds)
        lines.append(f"| {chunks} | {statistics.mean(along):+.1e} ± {spread(along):.0e} | {whole:.1e} |")
    lines += ["", "| training | perplexity, each seed | entropy, each seed, nats |", "|---|---|---|"]
    for method, seeds in record["training"].items():
        cells = [", ".join(f"{s[key]:.3f}" for s in seeds) for key in ("perplexity", "entropy")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    both = zip(*(record["training"][m] for m in METHODS), strict=True)
    gaps = [rounded["entropy"] - exact["entropy"] for rounded, exact in both]
    lines.append(f"\nentropy, rounded - exact: {statistics.mean(gaps):+.4f} ± {spread(gaps):.4f} nats")
    return "\n".join(lines)


def spread(values: list[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    record: dict[str, Any] = {"command": "python bench/bf16_sums.py", **records.machine()}
    record["gradient"] = {c: [errors_of_gradient(c, seed) for seed in range(args.seeds)] for c in CHUNKS}
    windows, training = corpus(), {method: [] for method in METHODS}
    record["training"] = training
    for seed in tqdm(range(args.seeds), unit="seed"):
        for method in METHODS:
            training[method].append(train(method, windows, seed))
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
