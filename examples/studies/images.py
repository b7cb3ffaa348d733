# SPDX-License-Identifier: Apache-2.0
"""Is perplexity a loss for images? Digits, and scenes of digits in which each pixel has a class, beside cross-entropy.

With K classes the perplexity is about K at the beginning, and it tends to 1 as a model learns its data. So the factor
between the two gradients is at most about ten here, and near one at the end. In a scene most pixels are background,
which is easy. Then the mean over pixels is small, and the factor is near one, long before the digits are learned. The
first gradients of the perplexity are the longest, and AdamW remembers them, unless they are clipped.

Each loss takes the learning rate that is best for it on validation data, of each optimizer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from imbalance import Split, digits
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, at_best_rate, axes_of, interval, number, shown, where
from torch import Tensor, nn

import fused_ppl

LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": fused_ppl.cross_entropy,
    "perplexity": fused_ppl.perplexity,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
    "AdamW, clipped": torch.optim.AdamW,
}
LIMIT = 1.0  # of the norm of the gradient, where it is clipped
# powers of 2
RATES = {"SGD, momentum": (-8, -6, -4, -2), "AdamW": (-10, -8, -6, -4), "AdamW, clipped": (-10, -8, -6, -4)}
TASKS = {"digits": "accuracy, %", "scenes": "mean IoU of the ten digits, %"}
CLASSES, SIDE, DIGITS_OF_A_SCENE, INK = 10, 24, 3, 0.3
BACKGROUND = CLASSES  # the class of a pixel without ink


def digit_splits(seed: int) -> tuple[Split, Split, Split]:
    """Images (n, 1, 8, 8) for training, validation and test."""
    inputs, target = digits()
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    parts = order.split((1000, 297, len(order) - 1297))
    train, validation, test = ((inputs[part].view(-1, 1, 8, 8), target[part]) for part in parts)
    return train, validation, test


def scenes(split: Split, count: int, seed: int) -> Split:
    """Scenes (n, 1, 24, 24) of three digits, and the class of each pixel (n, 24, 24)."""
    images, target = split
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.zeros(count, 1, SIDE, SIDE)
    pixels = torch.full((count, SIDE, SIDE), BACKGROUND)
    for i in range(count):
        for _ in range(DIGITS_OF_A_SCENE):
            chosen = int(torch.randint(len(target), (1,), generator=generator))
            top, left = torch.randint(SIDE - 8, (2,), generator=generator).tolist()
            place = (slice(top, top + 8), slice(left, left + 8))
            image = images[chosen, 0]
            inputs[i, 0][place] = image
            pixels[i][place] = torch.where(image > INK, target[chosen], BACKGROUND)
    return inputs, pixels


@functools.cache
def data(task: str, seed: int) -> tuple[Split, Split, Split]:
    train, validation, test = digit_splits(seed)
    if task == "digits":
        return train, validation, test
    return scenes(train, 1000, seed), scenes(validation, 100, seed + 1), scenes(test, 200, seed + 2)


def network(task: str) -> nn.Module:
    """Logits (n, 10) of images, or (n, 11, 24, 24) of scenes."""
    if task == "digits":
        body = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES))
    layers: list[nn.Module] = []
    for channels, dilation in ((1, 1), (16, 2), (16, 4)):
        layers += [nn.Conv2d(channels, 16, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, CLASSES + 1, 3, padding=1))


def rates_of(task: str, optimizer: str) -> tuple[int, ...]:
    """In a scene, the smallest rate learns nothing in these steps."""
    return RATES[optimizer][1:] if task == "scenes" else RATES[optimizer]


def points(quick: bool) -> list[Point]:
    seeds, steps = (2, 10) if quick else (5, 400)
    return [
        {"task": task, "optimizer": optimizer, "loss": loss, "rate": rate, "steps": steps, "seed": seed}
        for task in TASKS
        for optimizer in OPTIMIZERS
        for loss in LOSSES
        for rate in (RATES[optimizer][1:3] if quick else rates_of(task, optimizer))
        for seed in range(seeds)
    ]


def run(point: Point) -> Point:
    """The score on validation and test data, and the first and the last perplexity of training."""
    (inputs, target), validation, test = data(point["task"], point["seed"])
    model = network(point["task"])
    optimizer = OPTIMIZERS[point["optimizer"]](model.parameters(), lr=2.0 ** point["rate"])
    perplexities = []
    for _ in range(point["steps"]):
        chosen = torch.randint(len(target), (32,))
        logits = model(inputs[chosen])
        loss = LOSSES[point["loss"]](logits, target[chosen])
        loss.backward()
        limit = LIMIT if "clipped" in point["optimizer"] else math.inf
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        perplexities.append(float(loss.detach() if point["loss"] == "perplexity" else loss.detach().exp()))
        optimizer.step()
        optimizer.zero_grad()
    last = perplexities[-20:]
    return {
        "chosen by": score_of(model, validation, point["task"]),
        "score": score_of(model, test, point["task"]),
        "first perplexity": perplexities[0],
        "last perplexity": sum(last) / len(last),
    }


@torch.no_grad()
def score_of(model: nn.Module, split: Split, task: str) -> float:
    """Accuracy, or intersection over union, the mean over the ten digits."""
    predicted, target = model(split[0]).argmax(1), split[1]
    if task == "digits":
        return float((predicted == target).double().mean())
    both = [((predicted == k) & (target == k)).sum() / ((predicted == k) | (target == k)).sum() for k in range(CLASSES)]
    return float(torch.stack(both).double().mean())


def chosen(done: list[Point], **settings: str) -> list[Point]:
    """The runs of the learning rate with the best validation score."""
    return at_best_rate(where(done, **settings), lambda p: number(p["chosen by"]))


def table(done: list[Point]) -> str:
    lines = [
        "| task | optimizer | loss | best rate | score, % | minus cross-entropy | perplexity, first and last |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for optimizer in OPTIMIZERS:
            asked = {"task": task, "optimizer": optimizer}
            reference = {p["seed"]: number(p["score"]) for p in chosen(done, **asked, loss="cross-entropy")}
            for loss in LOSSES:
                own = chosen(done, **asked, loss=loss)
                score = shown([100 * number(p["score"]) for p in own], ".1f")
                more = shown([100 * (number(p["score"]) - reference[p["seed"]]) for p in own], "+.1f")
                first, last = (interval([number(p[f"{k} perplexity"]) for p in own])[0] for k in ("first", "last"))
                cells = (score, "" if loss == "cross-entropy" else more, f"{first:.1f}, {last:.2f}")
                lines.append(f"| {task} | {optimizer} | {loss} | 2^{own[0]['rate']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(13, 6.4), dpi=110, layout="constrained")
    for row, (task, unit) in zip(figure.subfigures(2, 1), TASKS.items(), strict=True):
        for axes, optimizer in zip(axes_of(row, len(OPTIMIZERS)), OPTIMIZERS, strict=True):
            for loss, colour in zip(LOSSES, COLOURS, strict=False):
                own = where(done, task=task, optimizer=optimizer, loss=loss)
                rates = sorted({p["rate"] for p in own})
                found = [interval([100 * number(p["score"]) for p in own if p["rate"] == r]) for r in rates]
                means, halves = zip(*found, strict=True)
                axes.errorbar(
                    [2.0**r for r in rates], means, halves, color=colour, label=loss, marker="o", ms=4, capsize=3
                )
            axes.set_xscale("log", base=2)
            axes.set_ylim(0, 102)
            axes.set_title(f"{task}, {optimizer}", loc="left", size=10)
            axes.set_xlabel("learning rate")
            axes.set_ylabel(unit)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"test score, {len({p['seed'] for p in done})} seeds, 95 % intervals, {done[0]['steps']} steps", size=9
    )
    return figure


STUDY = Study("images", "Is perplexity a loss for images and segmentation?", points, run, table, plot)
