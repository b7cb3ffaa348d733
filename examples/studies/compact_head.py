# SPDX-License-Identifier: Apache-2.0
"""Does the compact head change what a model learns? The model of train_lm.py, trained until it no longer improves.

"Compact" drops what is small of the gradient of the logits, at a tolerance of 1e-3; "screened" also computes the logits
in bf16 at first (docs/compact.md). The batches and the first weights are the same for all three. Validation gives the
nll, and the entropy of the prediction: if dropping the tail made a model too certain, its entropy would fall below that
of the exact run.

Early in training no step can be compact, because too many columns matter. So the share of compact steps is recorded.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, axes_of, interval, number, shown, where
from torch import Tensor

import fused_ppl

sys.path.append(str(Path(__file__).parents[1]))
from lm_data import Corpus, load_corpus, random_batches, standard_library
from lm_model import GPT

CLASSES, CONTEXT, BATCH, WINDOWS = 16384, 128, 4, 64
ONE_FILE_IN = 5
OPTIONS = {
    "exact": None,
    "compact": fused_ppl.Options(gradient_tolerance=1e-3),
    "screened": fused_ppl.Options(gradient_tolerance=1e-3, screen="bf16"),
}
MEASURED = 20  # times in a run


@functools.cache
def text() -> Corpus:
    return load_corpus(standard_library()[::ONE_FILE_IN], CLASSES, context=CONTEXT, windows=WINDOWS)


def points(quick: bool) -> list[Point]:
    seeds, steps = (1, 20) if quick else (3, 2500)
    return [{"method": method, "steps": steps, "seed": seed} for seed in range(seeds) for method in OPTIONS]


def run(point: Point) -> Point:
    """Validation nll and entropy in nats along the run, and the share of steps that were compact since the last."""
    corpus, options = text(), OPTIONS[point["method"]]
    model = GPT(corpus.vocab_size, context=CONTEXT, dim=96, heads=4, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=point["steps"], pct_start=0.1)
    compact, found = 0, Point(at=[], nll=[], entropy=[], compact=[])
    every = max(1, point["steps"] // MEASURED)
    batches = random_batches(corpus.train, BATCH, CONTEXT, steps=point["steps"], seed=point["seed"])
    for step, tokens in enumerate(batches, start=1):
        target = fused_ppl.next_token_targets(tokens)
        out = fused_ppl.linear_cross_entropy_with_stats(
            model.hidden(tokens), model.embedding.weight, target, options=options
        )
        out.loss.backward()
        compact += out.residual is not None and bool(out.residual > 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % every == 0:
            nll, entropy = validate(model, corpus.validation)
            for name, value in zip(found, (step, nll, entropy, compact / every), strict=True):
                found[name].append(value)
            compact = 0
    return {**found, "last nll": found["nll"][-1], "last entropy": found["entropy"][-1]}


@torch.no_grad()
def validate(model: GPT, windows: Tensor) -> tuple[float, float]:
    """The mean nll and the mean entropy of the predictions."""
    nll, entropy = [], []
    for tokens in windows.split(BATCH):
        hidden, target = model.hidden(tokens), fused_ppl.next_token_targets(tokens)
        out = fused_ppl.linear_cross_entropy_with_stats(hidden, model.embedding.weight, target)
        nll.append(out.nll[target >= 0])
        entropy.append(out.entropy[target >= 0])
    return float(torch.cat(nll).double().mean()), float(torch.cat(entropy).double().mean())


def table(done: list[Point]) -> str:
    lines = [
        "| head | compact steps, last tenth | nll, each seed | minus exact | entropy, each seed | minus exact |",
        "|---|---|---|---|---|---|",
    ]
    exact = {p["seed"]: p for p in where(done, method="exact")}
    for method in OPTIONS:
        own = where(done, method=method)
        share = 100 * sum(sum(p["compact"][-2:]) / 2 for p in own) / len(own)
        cells = [f"{share:.0f} %"]
        for name in ("last nll", "last entropy"):
            more = shown([number(p[name]) - number(exact[p["seed"]][name]) for p in own], "+.4f")
            cells += [", ".join(f"{p[name]:.3f}" for p in own), "" if method == "exact" else more]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(12, 3.8), dpi=110, layout="constrained")
    panels = dict(zip(("nll", "entropy", "compact"), axes_of(figure, 3), strict=True))
    for method, colour in zip(OPTIONS, COLOURS, strict=False):
        own = where(done, method=method)
        steps = own[0]["at"]
        for name, axes in panels.items():
            found = [interval([number(p[name][k]) for p in own]) for k in range(len(steps))]
            means, halves = zip(*found, strict=True)
            axes.errorbar(steps, means, halves, color=colour, label=method, marker="o", ms=3, capsize=2, alpha=0.8)
    units = {"nll": "validation nll, nats a token", "entropy": "entropy of the prediction, nats", "compact": "share"}
    for (name, axes), unit in zip(panels.items(), units.values(), strict=True):
        axes.set_xlabel("steps")
        axes.set_ylabel(unit)
        axes.set_title({"compact": "steps that were compact"}.get(name, name), loc="left", size=10)
    panels["nll"].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{len({p['seed'] for p in done})} seeds, 95 % intervals, tolerance 1e-3, V = {CLASSES}", size=9)
    return figure


STUDY = Study("compact_head", "Does the compact head change what is learned?", points, run, table, plot)
