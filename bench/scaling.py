# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow with N, V and D, and where the plans of the fused head cross, beside what the plan predicts.

    python bench/scaling.py                             two minutes; JSON, CSV, Markdown and a plot in runs/bench
    python bench/scaling.py --dtype bf16 --points 9

The prediction of time is that of `plan.linear_plan`: its FLOPs, at the rate of the three bare products timed in the
same rounds. That of memory is its `peak_bytes`, above one copy of the gradients.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from cases import DTYPES, Case, Setting
from compare import Comparison, How
from measure import DISTURBED
from providers import Loss, Provider, eager
from record import Record, Row, machine

import fused_ppl
from fused_ppl import Options, plan

CENTRE = {"N": 512, "V": 16384, "D": 256}
FIELDS = {"N": "num_tokens", "V": "num_classes", "D": "hidden_size"}
PLANS = ("rows", "vocab")


@dataclass(frozen=True)
class Point:
    """One provider at one size, measured and predicted."""

    axis: str
    size: int
    provider: str
    seconds: float
    peak: int
    predicted_seconds: float | None = None
    predicted_peak: int | None = None
    over_rows: float | None = None
    disturbed: bool = False


@dataclass(frozen=True)
class Sweep:
    dtype: str = "fp32"
    device: str = "cpu"
    axes: tuple[str, ...] = tuple(CENTRE)
    points: int = 7
    seconds: float = 1.0  # of each timing


def linear_case(setting: Setting, budget: int | None = None) -> plan.LinearCase:
    case = setting.case
    sizes = (case.num_tokens, case.num_classes, case.hidden_size, setting.itemsize)
    return plan.LinearCase(*sizes, setting.device, (True, True, False), budget)


def budget_of(kind: str, setting: Setting) -> int | None:
    """The largest budget with which the head walks in this way."""
    if kind == "rows":
        return None
    free = linear_case(setting)
    rows = plan.MIN_ROWS[free.place][free.itemsize]
    budget = free.accumulator_bytes + rows * free.num_classes * free.itemsize - 1
    assert plan.linear_kind(linear_case(setting, budget), False) == "vocab"
    return budget


def made_plan(kind: str, setting: Setting) -> plan.LinearPlan:
    return plan.linear_plan(linear_case(setting, budget_of(kind, setting)), kind)


def _ours(setting: Setting, kind: str) -> Loss:
    return functools.partial(fused_ppl.linear_perplexity, options=Options(memory_budget=budget_of(kind, setting)))


def providers() -> list[Provider]:
    # the first has the name that ratios are taken to
    named = zip(("fused_ppl", "fused_ppl, vocab"), PLANS, strict=True)
    return [
        *(Provider(name, functools.partial(_ours, kind=kind), ours=True) for name, kind in named),
        Provider("eager", eager),
    ]


def sizes_of(axis: str, points: int) -> list[int]:
    """Powers of two around the centre."""
    above = points // 3
    return [int(CENTRE[axis] * 2.0**step) for step in range(above + 1 - points, above + 1)]


def sweep(how: Sweep, tick: Callable[[], None]) -> list[Row]:
    rows = []
    for axis in how.axes:
        for size in sizes_of(axis, how.points):
            sizes = {FIELDS[name]: size if name == axis else at for name, at in CENTRE.items()}
            setting = Setting("linear", Case(f"{axis}={size}", **sizes), how.dtype, device=how.device)
            once = How(kinds=("random",), seconds=how.seconds)
            rows += Comparison(setting, providers(), once, lambda share: None).rows()
            tick()
    return rows


def points_of(rows: list[Row], dtype: str, device: str) -> list[Point]:
    found = []
    for bare in (r for r in rows if r.provider == "bare" and r.median):
        axis, size = bare.case.split("=")
        case = Case(bare.case, bare.num_tokens, bare.num_classes, bare.hidden_size)
        setting = Setting("linear", case, dtype, device=device)
        products = 6 * case.num_tokens * case.num_classes * case.hidden_size
        for name in ("fused_ppl", "fused_ppl, vocab", "eager"):
            mine = {r.mode: r for r in rows if (r.case, r.provider) == (bare.case, name)}
            time, peak = mine["both"].median, mine["memory"].peak_bytes
            if time is None or peak is None:
                continue
            over = mine["both"].over_ours
            point = Point(axis, int(size), name, time, peak, over_rows=over[1] if over else None)
            point = replace(point, disturbed=(bare.others or 0.0) > DISTURBED)
            if name != "eager":
                made = made_plan("rows" if name == "fused_ppl" else "vocab", setting)
                point = replace(
                    point,
                    predicted_seconds=made.flops / products * bare.median,
                    predicted_peak=made.peak_bytes - setting.gradient_bytes,
                )
            found.append(point)
    return found


def exponent(points: list[Point], what: Callable[[Point], float]) -> float:
    """The slope of a straight line through the upper half of the points, both axes logarithmic."""
    upper = sorted(points, key=lambda p: p.size)[len(points) // 2 :]
    xs, ys = [math.log(p.size) for p in upper], [math.log(max(1e-9, what(p))) for p in upper]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def crossover(points: list[Point], axis: str) -> str:
    """Where the vocabulary plan and the rows plan take the same time; the plan predicts a ratio of 8/6, and none."""
    ours = sorted((p for p in points if p.axis == axis and p.provider == "fused_ppl, vocab"), key=lambda p: p.size)
    ratios = ", ".join(f"{p.size}: {p.over_rows:.2f}" for p in ours if p.over_rows)
    sides = [(p.size, (p.over_rows or 1.0) > 1.0) for p in ours]
    flips = [(a, b) for (a, slower), (b, then) in itertools.pairwise(sides) if slower != then]
    where = "; ".join(f"between {axis} = {a} and {b}" for a, b in flips) or "nowhere in this range"
    return f"time of the vocabulary plan over the rows plan, by {axis} ({ratios}): they cross {where}."


def table(points: list[Point]) -> str:
    lines = [
        "| | plan | fwd + bwd | predicted | deviation | peak memory | predicted | deviation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        time, peak = f"{p.seconds * 1e3:.3g} ms", f"{p.peak / 2**20:.0f} MiB"
        cells = [f"{p.axis} = {p.size}", {"fused_ppl": "rows", "fused_ppl, vocab": "vocab"}.get(p.provider, "eager")]
        if p.predicted_seconds is None or p.predicted_peak is None:
            cells += [time, "", "", peak, "", ""]
        else:
            time += " (disturbed)" if p.disturbed else ""
            cells += [time, f"{p.predicted_seconds * 1e3:.3g} ms", f"{p.seconds / p.predicted_seconds - 1:+.0%}"]
            cells += [peak, f"{p.predicted_peak / 2**20:.0f} MiB", f"{p.peak / p.predicted_peak - 1:+.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(points: list[Point]) -> list[str]:
    """How each grows, how far the predictions are off, and where the plans cross."""
    whole, points = points, [p for p in points if not p.disturbed]
    words = [
        f"{len(whole) - len(points)} of {len(whole)} times were disturbed by other programs, and are left out below."
    ]
    words = words if len(whole) > len(points) else []
    for axis in dict.fromkeys(p.axis for p in points):
        for name in dict.fromkeys(p.provider for p in points):
            mine = [p for p in points if (p.axis, p.provider) == (axis, name)]
            if len(mine) > 2:
                time, peak = exponent(mine, lambda p: p.seconds), exponent(mine, lambda p: p.peak)
                words.append(f"{name}: time grows as {axis}^{time:.2f}, memory as {axis}^{peak:.2f}.")
        words.append(crossover(points, axis))
    for what, pairs in (
        ("time", [(p.seconds, p.predicted_seconds) for p in points if p.predicted_seconds]),
        ("memory", [(p.peak, p.predicted_peak) for p in points if p.predicted_peak]),
    ):
        off = sorted(measured / predicted - 1 for measured, predicted in pairs)
        if off:
            words.append(
                f"{what} over the plan's prediction: median {off[len(off) // 2]:+.0%}, {off[0]:+.0%} to {off[-1]:+.0%}."
            )
    return words


def write(record: Record, points: list[Point], folder: Path, name: str) -> list[Path]:
    record.save(folder, name)
    path = folder / f"{name}.md"
    m = record.machine
    device = m.get("gpu") or f"{m['processor']}, {m['threads']} threads"
    head = f"{device}, torch {m['torch']}, commit {m['commit']}, {m['date']}"
    centre = ", ".join(f"{k} = {v}" for k, v in CENTRE.items())
    text = [f"{head}: `{record.command}`. Around {centre}; {record.settings['dtype']}.", "", table(points), ""]
    path.write_text("\n".join([*text, *(f"- {words}" for words in summary(points))]) + "\n")
    try:
        import plots
    except ImportError as error:
        print(f"no plot: {error} (pip install matplotlib)")
        return [path]
    return [path, plots.scaling(points, head, folder / f"{name}.png")]


def run(folder: Path, name: str, command: str, how: Sweep) -> list[Path]:
    from rich.progress import Progress

    record = Record(command, machine(how.device), {**asdict(how), **CENTRE})
    with Progress() as progress:
        bar = progress.add_task("scaling", total=len(how.axes) * how.points)
        record.rows += sweep(how, lambda: progress.advance(bar))
    found = points_of(record.rows, how.dtype, how.device)
    print("\n".join(summary(found)))
    return write(record, found, folder, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--points", type=int, default=7, help="of each sweep (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each timing (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
    parser.add_argument("--name", default="scaling", help="of the files there (%(default)s)")
    args = parser.parse_args()
    command = f"python bench/scaling.py --dtype {args.dtype} --points {args.points}"
    how = Sweep(args.dtype, args.device, tuple(CENTRE), args.points, args.seconds)
    for path in run(args.out, args.name, command, how):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
