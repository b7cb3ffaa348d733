# SPDX-License-Identifier: Apache-2.0
"""Which learning rates of cross-entropy carry over to perplexity, under SGD, momentum and AdamW, clipped or not?

The gradient of the perplexity is PPL times that of the cross-entropy, at every step. So under SGD the learning rate is
multiplied by PPL, about V at the beginning and less later. AdamW divides the factor out again, but for its history.
Clipping by norm removes it while the norm is above the limit. "perplexity / own value" divides the loss by its detached
value, and has the gradient of the cross-entropy exactly.

A model of 8 tokens of context learns Python's own sources. The result of a run is the cross-entropy of held-out text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, at_best_rate, axes_of, interval, number, shown, where
from text_model import WindowModel, Windows, windows
from torch import Tensor

import fused_ppl

CLASSES, TOKENS, HELD_OUT = 1024, 512, 4096
LIMIT = 1.0  # of the norm of the gradient, where it is clipped
MOST = math.log(CLASSES)  # nats, the loss of a uniform prediction
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": fused_ppl.linear_cross_entropy,
    "perplexity": fused_ppl.linear_perplexity,
    "perplexity, max_nll": functools.partial(fused_ppl.linear_perplexity, max_nll=2.0),
    "perplexity / own value": fused_ppl.linear_perplexity,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}
RATES = {"SGD": range(-12, 5, 2), "momentum": range(-14, 1, 2), "AdamW": range(-14, -3, 2)}  # powers of 2
STEPS, SEEDS = 300, 3


@functools.cache
def text() -> Windows:
    return windows(CLASSES, context=8, held_out=HELD_OUT)


def points(quick: bool) -> list[Point]:
    seeds, steps = (1, 20) if quick else (SEEDS, STEPS)
    return [
        {"optimizer": optimizer, "loss": loss, "clipped": clipped, "rate": rate, "steps": steps, "seed": seed}
        for optimizer in OPTIMIZERS
        for loss in LOSSES
        for clipped in (False, True)
        for rate in list(RATES[optimizer])[:: 3 if quick else 1]
        for seed in range(seeds)
    ]


def run(point: Point) -> Point:
    """Train, and return the held-out cross-entropy in nats; inf if a gradient was not finite."""
    data, model = text(), WindowModel(CLASSES, context=8)
    optimizer = OPTIMIZERS[point["optimizer"]](model.parameters(), lr=2.0 ** point["rate"])
    loss_of, norms = LOSSES[point["loss"]], []
    for _ in range(point["steps"]):
        contexts, target = data.batch(point.get("tokens", TOKENS))
        loss = loss_of(model(contexts), model.head.weight, target)
        if point["loss"] == "perplexity / own value":
            loss = loss / loss.detach()
        loss.backward()
        limit = LIMIT if point["clipped"] else math.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        if not math.isfinite(norms[-1]):
            return {"nll": math.inf, "first_norm": norms[0], "last_norm": norms[-1]}
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        nll = fused_ppl.linear_cross_entropy(model(data.held_out[:, :-1]), model.head.weight, data.held_out[:, -1])
    return {"nll": float(nll) if math.isfinite(nll) else math.inf, "first_norm": norms[0], "last_norm": norms[-1]}


def at_rate(done: list[Point], rate: int) -> list[float]:
    """The nll of each seed."""
    return [number(p["nll"]) for p in where(done, rate=rate)]


def best_rate(done: list[Point]) -> int:
    """The power of 2 with the lowest mean nll."""
    return int(at_best_rate(done, lambda p: -number(p["nll"]))[0]["rate"])


def carried(done: list[Point], rate: int) -> str:
    """What this loss gets at the best rate of the cross-entropy."""
    values = at_rate(done, rate)
    return "diverges" if max(values) > MOST else shown(values)


def table(done: list[Point]) -> str:
    lines = [
        "| optimizer | clipped | loss | best rate | nll there | nll at the best rate of cross-entropy |",
        "|---|---|---|---|---|---|",
    ]
    for optimizer in OPTIMIZERS:
        for clipped in (False, True):
            of_both = where(done, optimizer=optimizer, clipped=clipped)
            reference = best_rate(where(of_both, loss="cross-entropy"))
            for loss in LOSSES:
                own = where(of_both, loss=loss)
                rate = best_rate(own)
                cells = f"2^{rate} | {shown(at_rate(own, rate))} | {carried(own, reference)}"
                lines.append(f"| {optimizer} | {'yes' if clipped else 'no'} | {loss} | {cells} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(12, 6.4), dpi=110, layout="constrained")
    rows = figure.subfigures(2, 1)
    for row, clipped in zip(rows, (False, True), strict=True):
        for axes, optimizer in zip(axes_of(row, len(OPTIMIZERS)), OPTIMIZERS, strict=True):
            for loss, colour in zip(LOSSES, COLOURS, strict=False):
                own = where(done, optimizer=optimizer, loss=loss, clipped=clipped)
                xs, ys, errors = [], [], []
                for rate in sorted({p["rate"] for p in own}):
                    mean, half = interval(at_rate(own, rate))
                    xs.append(2.0**rate)
                    ys.append(min(mean, MOST + 0.5))
                    errors.append(half if mean < MOST else 0)
                style = (0, (4, 2)) if loss == "perplexity / own value" else "-"
                axes.errorbar(xs, ys, errors, color=colour, label=loss, linestyle=style, marker="o", ms=3, capsize=2)
            axes.axhline(MOST, color="0.5", linewidth=1, linestyle=(0, (1, 2)))
            axes.set_xscale("log", base=2)
            axes.set_ylim(top=MOST + 0.7)
            axes.set_title(
                f"{optimizer}, {f'norm clipped at {LIMIT:g}' if clipped else 'not clipped'}", loc="left", size=10
            )
            axes.set_xlabel("learning rate")
        row.axes[0].set_ylabel("held-out nll, nats a token")
    rows[0].axes[-1].legend(frameon=False, fontsize=8, loc="upper center")
    seeds, steps = len({p["seed"] for p in done}), done[0]["steps"]
    title = f"{seeds} seeds, {steps} steps, 95 % intervals. Dotted: a uniform prediction; worse is cut off"
    figure.suptitle(title, size=9)
    return figure


STUDY = Study(
    "learning_rate",
    "Which learning rates of cross-entropy carry over to perplexity?",
    points,
    run,
    table,
    plot,
)
