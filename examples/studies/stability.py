# SPDX-License-Identifier: Apache-2.0
"""Training from random weights in float32, bf16 and fp16: where does perplexity overflow, and what helps?

At the beginning the perplexity is about V, and more if the weights are large. Its gradient is as many times that of
the cross-entropy. In fp16 a gradient above 65504 is inf. GradScaler multiplies the loss by 65536 at its start, and
skips steps until the scale fits. `max_nll` continues the perplexity along its tangent above exp(max_nll).

A head with too large weights stands for a bad start: a new vocabulary, a wrong scale, damaged weights. At 64 times the
usual size the first nll is 14 nats. At 512 times it is above 88.7 nats, where exp overflows in float32, too.
"""

from __future__ import annotations

import functools
import math

import torch
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, axes_of, interval, number, shown, where
from text_model import WindowModel, Windows, windows
from torch import Tensor

import fused_ppl

CLASSES, TOKENS = 4096, 256
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = ("cross-entropy", "perplexity", "perplexity, max_nll")
SIZES = {"usual": 1.0, "64 times": 64.0, "512 times": 512.0}
MAX_NLL = 6.0


@functools.cache
def text() -> Windows:
    return windows(CLASSES, context=8, held_out=1024)


def points(quick: bool) -> list[Point]:
    seeds, steps = (1, 10) if quick else (3, 200)
    ways = [("float32", False), ("bf16", False), ("fp16", False), ("fp16", True)]
    return [
        {"dtype": dtype, "scaled": scaled, "loss": loss, "head": size, "steps": steps, "seed": seed}
        for dtype, scaled in ways
        for loss in LOSSES
        for size in SIZES
        for seed in range(seeds)
    ]


def loss_of(point: Point, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    if point["loss"] == "cross-entropy":
        return fused_ppl.linear_cross_entropy(hidden, weight, target)
    max_nll = MAX_NLL if "max_nll" in point["loss"] else None
    return fused_ppl.linear_perplexity(hidden, weight, target, max_nll=max_nll)


def run(point: Point) -> Point:
    """The held-out nll, the first perplexity, and the steps whose gradient was not finite."""
    data, model, dtype = text(), WindowModel(CLASSES, context=8), DTYPES[point["dtype"]]
    with torch.no_grad():
        model.head.weight.mul_(SIZES[point["head"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=point["scaled"])
    skipped, first = 0, math.nan
    for step in range(point["steps"]):
        contexts, target = data.batch(TOKENS)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = loss_of(point, model(contexts), model.head.weight, target)
        first = float(loss.detach()) if step == 0 else first
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        skipped += not math.isfinite(float(norm))
        if point["scaled"] or math.isfinite(float(norm)):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    with torch.no_grad():
        nll = fused_ppl.linear_cross_entropy(model(data.held_out[:, :-1]), model.head.weight, data.held_out[:, -1])
    return {"nll": float(nll), "first loss": first, "not finite": skipped}


def table(done: list[Point]) -> str:
    lines = [
        f"| head | dtype | first perplexity | {' | '.join(f'{loss}: nll' for loss in LOSSES)} |",
        "|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        for dtype, scaled in dict.fromkeys((p["dtype"], p["scaled"]) for p in done):
            own = where(done, head=size, dtype=dtype, scaled=scaled)
            first = max(number(p["first loss"]) for p in where(own, loss="perplexity"))
            cells = [f"{dtype}, GradScaler" if scaled else dtype, f"{first:.3g}"]
            for loss in LOSSES:
                of_loss = where(own, loss=loss)
                skipped = sum(p["not finite"] for p in of_loss) / len(of_loss)
                words = f", {skipped:.0f} steps not finite" if skipped else ""
                cells.append(shown([number(p["nll"]) for p in of_loss]) + words)
            lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
    ways = list(dict.fromkeys((p["dtype"], p["scaled"]) for p in done))
    for axes, size in zip(axes_of(figure, len(SIZES)), SIZES, strict=True):
        for i, (loss, colour) in enumerate(zip(LOSSES, COLOURS, strict=False)):
            found = [
                interval([number(p["nll"]) for p in where(done, head=size, dtype=d, scaled=s, loss=loss)])
                for d, s in ways
            ]
            means, halves = zip(*found, strict=True)
            xs = [k + (i - 1) * 0.2 for k in range(len(ways))]
            axes.errorbar(xs, means, halves, color=colour, label=loss, linestyle="", marker="o", ms=5, capsize=3)
            for x, mean in zip(xs, means, strict=True):
                if not math.isfinite(mean):
                    place = (x, 0.94)
                    axes.annotate("NaN", place, xycoords=("data", "axes fraction"), ha="center", size=8, color=colour)
        axes.axhline(math.log(CLASSES), color="0.5", linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xticks(range(len(ways)), [f"{d},\nGradScaler" if s else d for d, s in ways])
        axes.set_title(f"weights of the head: {size}{' the usual' * (size != 'usual')}", loc="left", size=10)
        axes.set_ylabel("held-out nll, nats a token")
    figure.axes[0].legend(frameon=False, fontsize=8)
    seeds, steps = len({p["seed"] for p in done}), done[0]["steps"]
    figure.suptitle(f"{seeds} seeds, {steps} steps, AdamW, clipped; dotted: a uniform prediction", size=9)
    return figure


STUDY = Study("stability", "Where does perplexity overflow, and what helps?", points, run, table, plot)
