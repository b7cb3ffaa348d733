# SPDX-License-Identifier: Apache-2.0
"""What the studies share: points that are run once each, kept as they come, and shown as a table and a picture.

A study names its points, each a few settings and a seed. A point that stands in the record is not run again, so a study
that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import fused_ppl

RESULTS = Path(__file__).parent / "results"
# colours that colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
Point = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A question, the points that answer it, and how the answer is shown."""

    name: str
    question: str
    points: Callable[[bool], list[Point]]  # of a quick run, or of the full one
    run: Callable[[Point], Point]  # what one point gives; it is added to the settings
    table: Callable[[list[Point]], str]  # in Markdown
    plot: Callable[[list[Point]], Figure]

    def finish(self, folder: Path, *, quick: bool) -> str:
        """Run what is missing, and write the record and the picture. Returns the table."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        done = self._load(path, quick)
        asked = self.points(quick)
        missing = [point for point in asked if not any(point.items() <= d.items() for d in done)]
        for point in tqdm(missing, desc=self.name, unit="run", disable=not missing):
            torch.manual_seed(point.get("seed", 0))
            done.append(rounded({**point, **self.run(point)}))
            self._save(path, done, quick)
        done = [d for d in done if any(point.items() <= d.items() for point in asked)]
        self._save(path, done, quick)
        figure = self.plot(done)
        figure.savefig(folder / f"{self.name}.png")
        return self.table(done)

    def _load(self, path: Path, quick: bool) -> list[Point]:
        if not path.exists():
            return []
        record = json.loads(path.read_text())
        if record["quick"] != quick:
            raise SystemExit(
                f"{path} holds a {'quick' if record['quick'] else 'full'} run, and would be overwritten by another "
                "kind. Choose another folder with --out, or delete it."
            )
        found: list[Point] = record["points"]
        return found

    def _save(self, path: Path, points: list[Point], quick: bool) -> None:
        record = {
            "study": self.name,
            "question": self.question,
            "command": f"python examples/studies/run.py {self.name}" + (" --quick" if quick else ""),
            "quick": quick,
            "machine": {"processor": processor(), "threads": torch.get_num_threads()},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "fused_ppl": fused_ppl.__version__,
            },
        }
        lines = ",\n".join("  " + json.dumps(point) for point in points)
        head = json.dumps(record, indent=1)[:-2]
        partial = path.with_suffix(".partial")
        partial.write_text(f'{head},\n "points": [\n{lines}\n ]\n}}\n')
        os.replace(partial, path)


def rounded(point: Point) -> Point:
    """Numbers to seven digits, which is more than two runs agree in; no NaN, which JSON does not know."""
    return {k: _short(v) for k, v in point.items()}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return [_short(v) for v in value]
    return value


def number(value: Any) -> float:
    """A number of a record, where inf and nan are words."""
    return float(value)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def where(points: Sequence[Point], **settings: Any) -> list[Point]:
    return [p for p in points if settings.items() <= p.items()]


def at_best_rate(points: Sequence[Point], score: Callable[[Point], float]) -> list[Point]:
    """The runs of the learning rate with the highest mean score."""
    rates = sorted({p["rate"] for p in points})
    best = max(rates, key=lambda rate: interval([score(p) for p in where(points, rate=rate)])[0])
    return where(points, rate=best)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t; 0 for one value, which has none."""
    if len(values) < 2 or not all(math.isfinite(v) for v in values):
        return statistics.fmean(values), 0.0
    quantile = float(scipy.stats.t.ppf(0.975, len(values) - 1))
    return statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def shown(values: Sequence[float], form: str = ".3f") -> str:
    """The mean of the seeds and its interval, as a cell of a table."""
    mean, half = interval(values)
    return f"{mean:{form}} ± {half:{form.lstrip('+')}}" if half else f"{mean:{form}}".replace("nan", "NaN")


def axes_of(figure: Figure, count: int) -> list[Any]:
    """`count` panels in a row, quiet ones."""
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="0.92")
    return panels
