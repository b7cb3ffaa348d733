# SPDX-License-Identifier: Apache-2.0
"""How far is the perplexity of a sample from that of the whole data set?

The exponential of a noisy mean is too high in the mean: if the mean nll of a sample has the variance s^2 / n, then

    E exp(mean) ~ PPL * (1 + s^2 / (2 n)),    and    exp(mean - s^2 / (2 n))    takes the bias out to first order.

s^2 is the variance of the nll of independent tokens. Neighbouring tokens are alike, so for stretches of text it is
estimated from blocks. Streaming adds S and M over all batches and has no such error; the average of the perplexities of
batches keeps the bias of one batch, however many there are.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from study import COLOURS, Point, Study, axes_of, interval, number, shown, where
from text_model import WindowModel, windows

import fused_ppl

CLASSES, TOKENS, STEPS = 1024, 512, 300
SIZES, BLOCK = (64, 256, 1024, 4096, 16384), 64
WAYS = ("single tokens", "one stretch")
ESTIMATES = ("exp of the mean", "corrected", "average of batches")
AVERAGED = 16  # batches, each of n / 16 tokens


@functools.cache
def nlls(seed: int, steps: int) -> NDArray[np.float64]:
    """The nll of each held-out token, in the order of the text, by a model that was trained with this seed."""
    torch.manual_seed(seed)
    data = windows(CLASSES, context=8, held_out=2**30)
    model = WindowModel(CLASSES, context=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        contexts, target = data.batch(TOKENS)
        fused_ppl.linear_cross_entropy(model(contexts), model.head.weight, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = []
    with torch.no_grad():
        for part in data.held_out.split(8192):
            hidden = model(part[:, :-1])
            parts.append(fused_ppl.linear_cross_entropy(hidden, model.head.weight, part[:, -1], reduction="none"))
    return torch.cat(parts).double().numpy()


def points(quick: bool) -> list[Point]:
    seeds, steps, draws = (2, 20, 200) if quick else (5, STEPS, 4000)
    return [
        {"way": way, "tokens": n, "seed": seed, "steps": steps, "draws": draws}
        for seed in range(seeds)
        for way in WAYS
        for n in SIZES
    ]


def run(point: Point) -> Point:
    """Bias and standard deviation of each estimate, relative to the perplexity of all tokens."""
    nll, generator = nlls(point["seed"], point["steps"]), np.random.default_rng(point["seed"])
    n, truth = point["tokens"], math.exp(nll.mean())
    found = {name: np.empty(point["draws"]) for name in ESTIMATES}
    for i in range(point["draws"]):
        if point["way"] == "single tokens":
            sample = nll[generator.integers(len(nll), size=n)]
            of_mean = sample.var(ddof=1) / n
        else:
            start = generator.integers(len(nll) - n + 1)
            sample = nll[start : start + n]
            blocks = sample.reshape(-1, BLOCK).mean(1)
            # one block has no variance between blocks, and its tokens are taken as independent
            of_mean = blocks.var(ddof=1) / len(blocks) if len(blocks) > 1 else sample.var(ddof=1) / n
        batches = sample.reshape(AVERAGED, -1).mean(1)
        found["exp of the mean"][i] = math.exp(sample.mean())
        found["corrected"][i] = math.exp(sample.mean() - of_mean / 2)
        found["average of batches"][i] = np.exp(batches).mean()
    result: Point = {"perplexity": truth}
    for name, values in found.items():
        result[f"{name}, bias"] = float(values.mean() / truth - 1)
        result[f"{name}, deviation"] = float(values.std() / truth)
    return result


def table(done: list[Point]) -> str:
    heads = " | ".join(f"{name}: bias, %" for name in ESTIMATES)
    lines = [f"| sample | tokens | {heads} | deviation of one sample |", "|---|---|---|---|---|---|"]
    for way in WAYS:
        for n in SIZES:
            own = where(done, way=way, tokens=n)
            cells = []
            for name in ESTIMATES:
                cells.append(shown([100 * number(p[f"{name}, bias"]) for p in own], "+.2f"))
            deviation, _ = interval([number(p["exp of the mean, deviation"]) for p in own])
            lines.append(f"| {way} | {n} | {' | '.join(cells)} | {100 * deviation:.1f} % |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    panels = axes_of(figure, len(WAYS))
    for axes, way in zip(panels, WAYS, strict=True):
        for name, colour in zip(ESTIMATES, COLOURS, strict=False):
            of_sizes = [[number(p[f"{name}, bias"]) for p in where(done, way=way, tokens=n)] for n in SIZES]
            means, halves = zip(*(interval(values) for values in of_sizes), strict=True)
            percent, errors = [100 * m for m in means], [100 * h for h in halves]
            axes.errorbar(SIZES, percent, errors, color=colour, label=name, marker="o", ms=4, capsize=2)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"sample: {way}", loc="left", size=10)
        axes.set_xlabel("tokens of the sample")
    panels[0].set_ylabel("bias of the perplexity, %")
    panels[0].legend(frameon=False, fontsize=8)
    seeds = len({p["seed"] for p in done})
    figure.suptitle(f"{seeds} models, {done[0]['draws']} samples each, 95 % intervals over models", size=9)
    return figure


STUDY = Study(
    "sampling",
    "How far is the perplexity of a sample from that of the whole data set?",
    points,
    run,
    table,
    plot,
)
