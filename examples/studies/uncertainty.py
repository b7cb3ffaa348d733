# SPDX-License-Identifier: Apache-2.0
"""Perplexity and entropy as uncertainty: which examples to label next, and which documents are damaged.

- Active learning on handwritten digits: in each round the 20 examples with the highest perplexity of the prediction,
  2^H, are labelled, or 20 at random.
- Anomaly detection: functions of Python's sources, a fifth of them with replaced characters. The area under the ROC
  curve says how often a damaged one stands above a whole one, by the numbers that `fused-ppl rank` has.
"""

from __future__ import annotations

import functools
import random
import re
import zlib

import torch
from imbalance import digits
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, axes_of, interval, number, shown, where
from text_model import WindowModel, context_windows, source, windows
from torch import nn

import fused_ppl

START, ADDED = 20, 20  # labels
WAYS = ("highest perplexity", "random")
SHARES = (0.01, 0.03, 0.1, 0.3)  # of the characters
SCORES = ("perplexity", "bits per byte", "entropy", "zlib")
CLASSES, CONTEXT = 1024, 8
HELD_OUT = ("statistics", "textwrap", "shutil", "queue", "zipfile", "smtplib", "difflib", "ftplib")


def points(quick: bool) -> list[Point]:
    seeds, rounds, steps = (2, 2, 30) if quick else (20, 12, 300)
    labels = [
        {"task": "labels", "way": way, "rounds": rounds, "steps": steps, "seed": seed}
        for way in WAYS
        for seed in range(seeds)
    ]
    damage = [
        {"task": "damage", "share": share, "steps": steps, "seed": seed}
        for share in SHARES
        for seed in range(min(seeds, 5))
    ]
    return labels + damage


def run(point: Point) -> Point:
    return label(point) if point["task"] == "labels" else detect(point)


def label(point: Point) -> Point:
    """The test accuracy after each round."""
    inputs, target = digits()
    order = torch.randperm(len(target))
    pool, test = order[:1000], order[1000:]
    known = torch.zeros(len(pool), dtype=torch.bool)
    known[:START] = True
    accuracy = []
    for _ in range(point["rounds"] + 1):
        own = pool[known]
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(point["steps"]):
            fused_ppl.cross_entropy(model(inputs[own]), target[own]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            accuracy.append(float((model(inputs[test]).argmax(1) == target[test]).double().mean()))
            unknown = (~known).nonzero().squeeze(1)
            logits = model(inputs[pool[unknown]])
            entropy = fused_ppl.cross_entropy_with_stats(logits, target[pool[unknown]]).entropy  # of no label
        if point["way"] == "random":
            entropy = torch.rand_like(entropy)
        known[unknown[entropy.topk(ADDED).indices]] = True
    return {"accuracy": accuracy}


@functools.cache
def trained(seed: int, steps: int) -> tuple[WindowModel, object]:
    torch.manual_seed(seed)
    data = windows(CLASSES, context=CONTEXT, held_out=16, without=HELD_OUT)
    model = WindowModel(CLASSES, context=CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        contexts, target = data.batch(512)
        fused_ppl.linear_cross_entropy(model(contexts), model.head.weight, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, data.tokenizer


def detect(point: Point) -> Point:
    """The area under the ROC curve of each score."""
    model, tokenizer = trained(point["seed"], point["steps"])
    generator = random.Random(point["seed"])
    whole = "\n".join(source(name) for name in HELD_OUT)
    texts = [t for t in re.split(r"\n(?=(?:def|class) )", whole) if 300 <= len(t) <= 3000]
    chosen = set(generator.sample(range(len(texts)), len(texts) // 5))
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    for i, text in enumerate(texts):
        if i in chosen:
            letters = "abcdefghijklmnopqrstuvwxyz"
            text = "".join(generator.choice(letters) if generator.random() < point["share"] else c for c in text)
        found = context_windows(tokenizer, text, CONTEXT)
        with torch.no_grad():
            out = fused_ppl.linear_cross_entropy_with_stats(model(found[:, :-1]), model.head.weight, found[:, -1])
        data = text.encode()
        scores["perplexity"].append(float(out.perplexity))
        scores["bits per byte"].append(float(out.nll.sum()) / len(data))  # in any unit
        scores["entropy"].append(float(out.entropy.mean()))
        scores["zlib"].append(len(zlib.compress(data, 9)) / len(data))
    return {name: area(values, chosen) for name, values in scores.items()}


def area(values: list[float], wanted: set[int]) -> float:
    above = sum(
        (values[i] > values[j]) + 0.5 * (values[i] == values[j])
        for i in wanted
        for j in range(len(values))
        if j not in wanted
    )
    return above / (len(wanted) * (len(values) - len(wanted)))


def table(done: list[Point]) -> str:
    lines = ["| labels | " + " | ".join(f"{way}: accuracy, %" for way in WAYS) + " |", "|---|---|---|"]
    rounds = where(done, task="labels")[0]["rounds"]
    for k in sorted({0, 2, 4, 8, rounds} & set(range(rounds + 1))):
        cells = []
        for way in WAYS:
            cells.append(shown([100 * number(p["accuracy"][k]) for p in where(done, task="labels", way=way)], ".1f"))
        lines.append(f"| {START + k * ADDED} | {' | '.join(cells)} |")
    lines += ["", "| characters replaced | " + " | ".join(SCORES) + " |", "|---|---|---|---|---|"]
    for share in SHARES:
        own = where(done, task="damage", share=share)
        cells = []
        for name in SCORES:
            cells.append(shown([number(p[name]) for p in own]))
        lines.append(f"| {100 * share:g} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    left, right = axes_of(figure, 2)
    labels = where(done, task="labels")
    xs = [START + k * ADDED for k in range(labels[0]["rounds"] + 1)]
    for way, colour in zip(WAYS, COLOURS, strict=False):
        own = where(labels, way=way)
        found = [interval([100 * number(p["accuracy"][k]) for p in own]) for k in range(len(xs))]
        means, halves = zip(*found, strict=True)
        left.errorbar(xs, means, halves, color=colour, label=way, marker="o", ms=3, capsize=2)
    left.set_xlabel("labels")
    left.set_ylabel("test accuracy, %")
    left.set_title("which digits to label next", loc="left", size=10)
    for name, colour in zip(SCORES, COLOURS, strict=False):
        found = [interval([number(p[name]) for p in where(done, task="damage", share=s)]) for s in SHARES]
        means, halves = zip(*found, strict=True)
        right.errorbar([100 * s for s in SHARES], means, halves, color=colour, label=name, marker="o", ms=3, capsize=2)
    right.set_xscale("log")
    right.set_xticks([100 * s for s in SHARES], [f"{100 * s:g}" for s in SHARES])
    right.set_xlabel("characters replaced, %")
    right.set_ylabel("area under the ROC curve")
    right.set_title("which functions are damaged", loc="left", size=10)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    seeds = [len({p["seed"] for p in where(done, task=task)}) for task in ("labels", "damage")]
    figure.suptitle(f"{seeds[0]} and {seeds[1]} seeds, 95 % intervals", size=9)
    return figure


STUDY = Study("uncertainty", "Do perplexity and entropy find what a model does not know?", points, run, table, plot)
