# SPDX-License-Identifier: Apache-2.0
"""Does the batch size matter more to perplexity than to cross-entropy? Batches of 16 to 1024 tokens, with both losses.

The perplexity of a batch is exp of a noisy mean. So the factor between the two gradients is noisy, too, and a batch
with a high loss counts for more than one with a low loss. The smaller the batch is, the larger is this effect.

The model and the text are those of learning_rate.py. All runs take as many steps, so that large batches see more text.
"""

from __future__ import annotations

from learning_rate import LIMIT, MOST, at_rate, best_rate
from learning_rate import run as run
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, axes_of, interval, shown, where

LOSSES = ("cross-entropy", "perplexity")
TOKENS = (16, 64, 256, 1024)
# clipped AdamW, as the README recommends, and plain SGD
RATES = {("SGD", False): range(-12, 5, 2), ("AdamW", True): range(-14, -3, 2)}
STEPS, SEEDS = 300, 3


def points(quick: bool) -> list[Point]:
    seeds, steps = (1, 10) if quick else (SEEDS, STEPS)
    return [
        {"optimizer": optimizer, "loss": loss, "clipped": clipped, "rate": r, "tokens": n, "steps": steps, "seed": seed}
        for (optimizer, clipped), rates in RATES.items()
        for loss in LOSSES
        for n in TOKENS
        for r in list(rates)[:: 3 if quick else 1]
        for seed in range(seeds)
    ]


def table(done: list[Point]) -> str:
    lines = ["| optimizer | tokens | loss | best rate | nll there |", "|---|---|---|---|---|"]
    for optimizer, clipped in RATES:
        for n in TOKENS:
            for loss in LOSSES:
                own = where(done, optimizer=optimizer, tokens=n, loss=loss)
                rate = best_rate(own)
                name = f"{optimizer}, clipped" if clipped else optimizer
                lines.append(f"| {name} | {n} | {loss} | 2^{rate} | {shown(at_rate(own, rate))} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    for axes, (optimizer, clipped) in zip(axes_of(figure, len(RATES)), RATES, strict=True):
        for loss, colour in zip(LOSSES, COLOURS, strict=False):
            of_sizes = [where(done, optimizer=optimizer, tokens=n, loss=loss) for n in TOKENS]
            rates = [best_rate(own) for own in of_sizes]
            found = [interval(at_rate(own, rate)) for own, rate in zip(of_sizes, rates, strict=True)]
            means, halves = zip(*found, strict=True)
            axes.errorbar(TOKENS, means, halves, color=colour, label=loss, marker="o", ms=4, capsize=3)
            up = loss == "perplexity"
            for n, rate, mean in zip(TOKENS, rates, means, strict=True):
                place = (0, 7 if up else -13)
                axes.annotate(
                    f"2^{rate}", (n, mean), place, textcoords="offset points", ha="center", size=8, color=colour
                )
        axes.set_xscale("log", base=2)
        axes.set_ylim(top=MOST + 0.3)
        axes.set_title(
            f"{optimizer}, {f'norm clipped at {LIMIT:g}' if clipped else 'not clipped'}", loc="left", size=10
        )
        axes.set_xlabel("tokens in a batch")
        axes.set_ylabel("held-out nll, nats a token")
    figure.axes[0].legend(frameon=False, fontsize=8)
    seeds, steps = len({p["seed"] for p in done}), done[0]["steps"]
    figure.suptitle(f"{seeds} seeds, {steps} steps, 95 % intervals, the best learning rate of each is written", size=9)
    return figure


STUDY = Study("batch_size", "Does the batch size matter more to perplexity?", points, run, table, plot)
