# SPDX-License-Identifier: Apache-2.0
"""Does a model that was trained on perplexity transfer better? Code first, then prose, with both losses in both places.

A model learns Python's sources, and then the prose of Python's reference (`pydoc_data/topics.py`). Held-out perplexity
is measured on both domains before and after. AdamW, with clipping; the learning rate of both phases is the one with the
lowest nll of held-out code, for each loss that code was learned with.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, at_best_rate, axes_of, interval, number, shown, where
from text_model import WindowModel, Windows, prose, sources, tokenizer_of, windows_of

import fused_ppl

CLASSES, CONTEXT, TOKENS = 1024, 8, 512
LOSSES = {"cross-entropy": fused_ppl.linear_cross_entropy, "perplexity": fused_ppl.linear_perplexity}
DOMAINS = ("code", "prose")
RATES = (-10, -9, -8, -7)  # powers of 2


@functools.cache
def text() -> dict[str, Windows]:
    """Both domains in one vocabulary, trained on both."""
    parts = {"code": sources(), "prose": prose()}
    tokenizer = tokenizer_of([t for texts in parts.values() for i, t in enumerate(texts) if i % 10], CLASSES)
    return {name: windows_of(texts, tokenizer, context=CONTEXT, held_out=4096) for name, texts in parts.items()}


def points(quick: bool) -> list[Point]:
    seeds, first, second = (1, 20, 10) if quick else (5, 600, 150)
    return [
        {"first": a, "second": b, "rate": rate, "steps": first, "tuned": second, "seed": seed}
        for a, b in itertools.product(LOSSES, LOSSES)
        for rate in (RATES[1:2] if quick else RATES)
        for seed in range(seeds)
    ]


def run(point: Point) -> Point:
    """Held-out nll of both domains, before and after the second domain."""
    model, found = WindowModel(CLASSES, context=CONTEXT), {}
    for phase, domain, steps in (("first", "code", point["steps"]), ("second", "prose", point["tuned"])):
        optimizer = torch.optim.AdamW(model.parameters(), lr=2.0 ** point["rate"])
        for _ in range(steps):
            contexts, target = text()[domain].batch(TOKENS)
            LOSSES[point[phase]](model(contexts), model.head.weight, target).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for name in DOMAINS:
            found[f"{name}, {'before' if phase == 'first' else 'after'}"] = held_out(model, text()[name])
    return found


@torch.no_grad()
def held_out(model: WindowModel, data: Windows) -> float:
    hidden = model(data.held_out[:, :-1])
    return float(fused_ppl.linear_cross_entropy(hidden, model.head.weight, data.held_out[:, -1]))


def chosen(done: list[Point], **settings: str) -> list[Point]:
    """The runs of the learning rate with the lowest nll of held-out code."""
    return at_best_rate(where(done, **settings), lambda p: -number(p["code, before"]))


COLUMNS = ("code, before", "prose, before", "prose, after", "code, after")


def table(done: list[Point]) -> str:
    heads = " | ".join(f"nll of {c}" for c in COLUMNS)
    lines = [f"| on code | on prose | rate | {heads} |", "|---|---|---|---|---|---|---|"]
    for a, b in itertools.product(LOSSES, LOSSES):
        own = chosen(done, first=a, second=b)
        cells = [shown([number(p[column]) for p in own]) for column in COLUMNS]
        lines.append(f"| {a} | {b} | 2^{own[0]['rate']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    (axes,) = axes_of(figure, 1)
    for i, ((a, b), colour) in enumerate(zip(itertools.product(LOSSES, LOSSES), COLOURS, strict=False)):
        found = [interval([number(p[c]) for p in chosen(done, first=a, second=b)]) for c in COLUMNS]
        means, halves = ([math.e**m for m, _ in found], [math.e**m * h for m, h in found])
        xs = [k + (i - 1.5) * 0.16 for k in range(len(COLUMNS))]
        axes.errorbar(xs, means, halves, color=colour, label=f"{a}, then {b}", linestyle="", marker="o", capsize=3)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    axes.set_yscale("log")
    axes.set_yticks([50, 100, 200, 400], ["50", "100", "200", "400"])
    axes.minorticks_off()
    axes.set_ylabel("held-out perplexity")
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{len({p['seed'] for p in done})} seeds, 95 % intervals", size=9)
    return figure


STUDY = Study("transfer", "Does training on perplexity transfer better between domains?", points, run, table, plot)
