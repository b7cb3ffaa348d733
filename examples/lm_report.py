# SPDX-License-Identifier: Apache-2.0
"""The report of one or more runs: a JSON file, a plot of the curves, and a table."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lm_data import Corpus
from lm_measure import Run, machine, versions
from matplotlib.figure import Figure
from rich.table import Table

# colour-blind readers can tell these colours apart; dashes show curves that lie on top of each other
STYLES = {
    "perplexity": ("#0072B2", "-"),
    "cross_entropy": ("#D55E00", (0, (6, 3))),
    "torch": ("#009E73", (0, (1.5, 2))),
    "compact": ("#CC79A7", (0, (4, 2))),
    "screened": ("#E69F00", (0, (2, 2))),
}
COLUMNS = ("loss", "perplexity", "bits/\ntoken", "bits/\nbyte", "tokens\nper s", "peak\nMB", "train\ns")


class Report:
    """Collects the runs and writes them to `out`, at every validation, so that an interrupted run is kept."""

    def __init__(self, out: Path, arguments: dict[str, Any], corpus: Corpus, unigram: float) -> None:
        self.json_path, self.plot_path = out / "run.json", out / "curves.png"
        self.corpus, self.unigram = corpus, unigram
        arguments = {name: jsonable(value) for name, value in arguments.items()}
        self.facts = {"arguments": arguments, "versions": versions(), "machine": machine(arguments["device"])}
        self.runs: list[Run] = []
        out.mkdir(parents=True, exist_ok=True)

    def start(self, loss: str, tokens_per_step: int) -> Run:
        self.runs.append(Run(loss, tokens_per_step))
        return self.runs[-1]

    def save_json(self) -> None:
        """Write a temporary file and rename it, so that a reader never sees an incomplete file."""
        corpus = {name: value for name, value in vars(self.corpus).items() if not isinstance(value, torch.Tensor)}
        corpus |= {"train_tokens": len(self.corpus.train), "validation_tokens": self.corpus.validation.numel()}
        runs = [{**asdict(run), "summary": run.summary()} for run in self.runs]
        record = {**self.facts, "corpus": corpus, "unigram_perplexity": self.unigram, "runs": runs}
        partial = self.json_path.with_suffix(".json.partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.json_path)

    def save_plot(self) -> None:
        figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        for run in self.runs:
            draw_run(axes, run)
        axes.axhline(self.unigram, color="0.35", linewidth=1, linestyle=(0, (8, 4)))
        label = f"unigram model: {self.unigram:,.1f}"
        axes.text(
            0.99,
            self.unigram,
            label,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            color="0.35",
            bbox={"facecolor": "white", "edgecolor": "none"},
        )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("training tokens")
        axes.set_ylabel("perplexity")
        legend = "faint: each batch   line: running mean   dots: held-out text"
        axes.set_title(legend, loc="left", color="0.35", size=10)
        figure.suptitle(f"Perplexity, vocabulary of {self.corpus.vocab_size:,}", x=0.01, ha="left", weight="bold")
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if self.runs:
            axes.legend(frameon=False)
        figure.savefig(self.plot_path)

    def table(self) -> Table:
        """Return a table of at most 80 columns of text."""
        table = Table(title="Held-out text at the end of training")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "loss" else "right")
        for run in self.runs:
            s = run.summary()
            table.add_row(
                run.loss if run.finished else f"{run.loss} (stopped)",
                number(s["validation_perplexity"], ",.1f"),
                number(s["bits_per_token"], ".3f"),
                number(s["bits_per_byte"], ".3f"),
                number(s["tokens_per_second"], ",.0f"),
                number(s["memory_peak_mb"], ",.0f"),
                number(s["train_seconds"], ",.0f"),
            )
        table.add_section()
        table.add_row("unigram model", number(self.unigram, ",.1f"), style="dim")
        table.add_row("uniform model", number(self.corpus.vocab_size, ",.1f"), style="dim")
        return table

    def verdict(self) -> str:
        """Return a sentence about the first run."""
        last = self.runs[0].summary()["validation_perplexity"] if self.runs else None
        if last is None:
            return "No validation was reached."
        side = "below" if last < self.unigram else "not below"
        return f"{self.runs[0].loss}: validation perplexity {last:,.1f}, {side} the unigram model's {self.unigram:,.1f}"


def draw_run(axes: Any, run: Run) -> None:
    """Draw the batches as a faint line, their running mean as a strong line, and validations as points."""
    colour, line = STYLES[run.loss]
    tokens = [step["tokens"] for step in run.steps]
    perplexity = [step["perplexity"] for step in run.steps]
    held_out = [point["perplexity"] for point in run.validation]
    label = f"{run.loss} (held-out: {held_out[-1]:,.1f})" if held_out else run.loss
    axes.plot(tokens, perplexity, color=colour, linewidth=0.8, alpha=0.25)
    axes.plot(tokens, running_mean(perplexity), color=colour, linestyle=line, linewidth=1.8, label=label)
    validated_at = [point["tokens"] for point in run.validation]
    axes.plot(validated_at, held_out, "o", color=colour, markeredgecolor="white", markersize=7, zorder=3, clip_on=False)


def running_mean(perplexity: list[float], reach: int = 4) -> list[float]:
    """Return the geometric mean over each step and `reach` steps on both sides, which is exp of the mean nll."""
    logs = torch.tensor(perplexity, dtype=torch.float64).log()
    return [logs[max(i - reach, 0) : i + reach + 1].mean().exp().item() for i in range(len(logs))]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def jsonable(value: Any) -> Any:
    """Return the value with paths as text."""
    if isinstance(value, list):
        return [jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
