# SPDX-License-Identifier: Apache-2.0
"""Does perplexity as a loss help rare classes? Images and texts with a long tail, beside cross-entropy.

The gradient of the perplexity is that of the cross-entropy times one number for the whole batch. So a rare class gets
no more of it, and only the step size differs. Class weights change the gradient of each example; "weighted" takes
weights in inverse proportion to the counts, in both losses.

Each loss takes the learning rate that is best for it on validation data, with AdamW. "Tail" is the mean accuracy of the
three rarest classes, "balanced" that of all classes.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, at_best_rate, axes_of, interval, number, shown, where
from text_model import source
from torch import Tensor, nn

import fused_ppl

LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": fused_ppl.cross_entropy,
    "perplexity": fused_ppl.perplexity,
    "cross-entropy, weighted": fused_ppl.cross_entropy,
    "perplexity, weighted": fused_ppl.perplexity,
}
RATES = (-12, -10, -8, -6, -4)  # powers of 2
MODULES = (
    *("argparse", "tarfile", "typing", "turtle", "inspect", "pydoc", "subprocess", "doctest", "pickle", "threading"),
)
FEATURES, LONGEST, SHORTEST, TAIL = 512, 60, 4, 3
METRICS = ("accuracy", "balanced", "tail")
Split = tuple[Tensor, Tensor]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """8 x 8 images of handwritten digits, which the wheel of scikit-learn carries."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


@functools.cache
def functions() -> tuple[Tensor, Tensor]:
    """Pieces of ten modules of the standard library; the class is the module. Features are hashed counts of words."""
    rows, labels = [], []
    for label, name in enumerate(MODULES):
        lines = source(name).split("\n")
        for i in range(0, len(lines) - 8, 8):
            row = torch.zeros(FEATURES)
            for word in re.findall(r"\w+", "\n".join(lines[i : i + 8])):
                row[zlib.crc32(word.encode()) % FEATURES] += 1
            rows.append(row.sqrt())
            labels.append(label)
    return torch.stack(rows), torch.tensor(labels)


DATA = {"digits": digits, "modules": functions}


def splits(data: str, seed: int) -> tuple[Split, Split, Split]:
    """Training examples with a long tail, and as many validation and test examples of each class."""
    inputs, labels = DATA[data]()
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    order = torch.randperm(classes, generator=generator)  # which class is rare differs from seed to seed
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for rank, label in enumerate(order.tolist()):
        own = (labels == label).nonzero().squeeze(1)
        own = own[torch.randperm(len(own), generator=generator)]
        count = round(LONGEST * (SHORTEST / LONGEST) ** (rank / (classes - 1)))
        for part, chosen in zip(parts, (own[:20], own[20:40], own[40 : 40 + count]), strict=True):
            part.append(chosen)
    validation, test, train = (torch.cat(part) for part in parts)
    return (inputs[train], labels[train]), (inputs[validation], labels[validation]), (inputs[test], labels[test])


def points(quick: bool) -> list[Point]:
    seeds, steps = (2, 20) if quick else (10, 400)
    return [
        {"data": data, "loss": loss, "rate": rate, "steps": steps, "seed": seed}
        for data in DATA
        for loss in LOSSES
        for rate in (RATES[1:3] if quick else RATES)
        for seed in range(seeds)
    ]


def run(point: Point) -> Point:
    (inputs, labels), validation, test = splits(point["data"], point["seed"])
    classes = int(test[1].max()) + 1
    counts = torch.bincount(labels, minlength=classes)
    model = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0 ** point["rate"])
    weight = counts.sum() / (classes * counts) if "weighted" in point["loss"] else None
    for _ in range(point["steps"]):
        chosen = torch.randint(len(labels), (64,))
        LOSSES[point["loss"]](model(inputs[chosen]), labels[chosen], weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"chosen by": measures(model, validation, counts)["balanced"], **measures(model, test, counts)}


@torch.no_grad()
def measures(model: nn.Module, split: Split, counts: Tensor) -> dict[str, float]:
    right = (model(split[0]).argmax(1) == split[1]).double()
    of_class = torch.stack([right[split[1] == label].mean() for label in range(len(counts))])
    share = counts / counts.sum()  # as if the test examples had the counts of training
    rarest = counts.argsort()[:TAIL]
    return {
        "accuracy": float((share * of_class).sum()),
        "balanced": float(of_class.mean()),
        "tail": float(of_class[rarest].mean()),
    }


def chosen(done: list[Point], data: str, loss: str) -> list[Point]:
    """The runs of the learning rate with the best balanced validation accuracy."""
    return at_best_rate(where(done, data=data, loss=loss), lambda p: number(p["chosen by"]))


def table(done: list[Point]) -> str:
    lines = [
        "| data | loss | rate | accuracy, % | balanced, % | tail, % | tail, minus that of cross-entropy |",
        "|---|---|---|---|---|---|---|",
    ]
    for data in DATA:
        reference = {p["seed"]: number(p["tail"]) for p in chosen(done, data, "cross-entropy")}
        for loss in LOSSES:
            own = chosen(done, data, loss)
            cells = [shown([100 * number(p[metric]) for p in own], ".1f") for metric in METRICS]
            more = [100 * (number(p["tail"]) - reference[p["seed"]]) for p in own]
            cells.append("" if loss == "cross-entropy" else shown(more, "+.1f"))
            lines.append(f"| {data} | {loss} | 2^{own[0]['rate']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    for axes, data in zip(axes_of(figure, len(DATA)), DATA, strict=True):
        for i, (loss, colour) in enumerate(zip(LOSSES, COLOURS, strict=False)):
            own = chosen(done, data, loss)
            found = [interval([100 * number(p[metric]) for p in own]) for metric in METRICS]
            xs = [k + (i - 1.5) * 0.18 for k in range(len(METRICS))]
            means, halves = zip(*found, strict=True)
            axes.errorbar(xs, means, halves, color=colour, label=loss, linestyle="", marker="o", ms=5, capsize=3)
        axes.set_xticks(range(len(METRICS)), ["all, as in training", "all classes alike", "three rarest"])
        axes.set_title(data, loc="left", size=10)
        axes.set_ylabel("accuracy, %")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{len({p['seed'] for p in done})} seeds, 95 % intervals, {LONGEST} to {SHORTEST} examples a class", size=9
    )
    return figure


STUDY = Study("imbalance", "Does perplexity as a loss help rare classes?", points, run, table, plot)
