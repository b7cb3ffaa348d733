# SPDX-License-Identifier: Apache-2.0
"""The plots of a record: time, memory, share of the roofline, and error against time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from record import Record
from record_tables import Line, Tables, as_accurate, tables

TITLES = {"logits": "logits", "linear": "head"}

# colours that stay apart for colour-blind readers; ours are blue, the reference grey
COLOURS = {
    "fused_ppl": "#0072B2",
    "fused_ppl, in place": "#56B4E9",
    "fused_ppl, 32 MiB": "#56B4E9",
    "fused_ppl, backend torch": "#56B4E9",
    "eager": "#999999",
    "eager, fp32 logits": "#555555",
    "torch.compile": "#E69F00",
    "torch.compile, fp32 logits": "#D55E00",
    "F.linear_cross_entropy, chunked": "#CC79A7",
    "cut-cross-entropy": "#009E73",
    "cut-cross-entropy, torch_compile": "#009E73",
    "Liger": "#F0E442",
    "quack": "#000000",
}
MARKERS = {"bf16": "o", "fp32": "s", "fp16": "^"}


def write(record: Record, folder: Path, name: str) -> list[Path]:
    found = tables(record.rows)
    made = []
    for what, draw in (
        ("summary", summary),
        ("time", time),
        ("memory", memory),
        ("roofline", roofline),
        ("error", error),
    ):
        figure = draw(record, found)
        if figure is not None:
            made.append(folder / f"{name}_{what}.png")
            figure.savefig(made[-1], dpi=110)
    return made


def summary(record: Record, found: Tables) -> Figure | None:
    """A row for each comparison, a dot for each provider: time over ours, and memory. Hollow: less accurate."""
    keys = [key for key, lines in found.items() if any(line.provider == "fused_ppl" and line.timed for line in lines)]
    if not keys:
        return None
    figure = Figure(figsize=(11, 1.7 + 0.27 * len(keys)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shown: dict[str, Any] = {}
    for y, key in enumerate(keys):
        ours = next(line for line in found[key] if line.provider == "fused_ppl")
        for line in found[key]:
            if line.provider == "bare" or not line.timed or not line.timed[0].over_ours:
                continue
            colour = COLOURS.get(line.provider, "#777777")
            fill = colour if line.ours or as_accurate(line, ours) else "white"
            how = {"marker": "D" if line.ours else "o", "color": colour, "markerfacecolor": fill, "linestyle": "none"}
            how |= {"markersize": 7, "zorder": 4 if line.provider == "fused_ppl" else 3}
            (shown[line.provider],) = left.plot(line.timed[0].over_ours[1], y, **how)
            if line.peak is not None:
                right.plot(line.peak / 2**20, y, **how)
    left.set_yticks(
        range(len(keys)), [f"{'logits' if op == 'logits' else 'head'}, {case}, {dtype}" for op, case, dtype in keys]
    )
    left.invert_yaxis()
    left.set(xscale="log", xlabel="forward + backward, time over fused_ppl's")
    left.axvline(1, color="#0072B2", linewidth=1, zorder=1)
    left.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    left.xaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:.0e}"[0] in "25" else "")
    right.set(xscale="symlog", xlabel="peak memory above inputs and gradients, MiB")
    right.set_xscale("symlog", linthresh=10)
    right.set_xticks([-1000, -100, -10, 0, 10, 100, 1000], ["-1000", "-100", "-10", "0", "10", "100", "1000"])
    for axis in (left, right):
        axis.grid(True, axis="both", color="0.92")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    names = sorted(shown, key=lambda name: (not name.startswith("fused_ppl"), name))
    figure.legend(
        [_key(shown[n]) for n in names], names, loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.suptitle(
        f"left of the line is faster than fused_ppl; hollow: less accurate\n{subtitle(record)}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def _key(handle: Any) -> Any:
    return Line2D([], [], color=handle.get_color(), marker=handle.get_marker(), linestyle="none")


def time(record: Record, found: Tables) -> Figure | None:
    def value(line: Line) -> float | None:
        return line.timed[0].median * 1e3 if line.timed and line.timed[0].median else None

    return _bars(record, found, value, "forward + backward, ms", lambda ms: f"{ms:,.3g}" if ms < 1000 else f"{ms:,.0f}")


def memory(record: Record, found: Tables) -> Figure | None:
    def value(line: Line) -> float | None:
        return None if line.peak is None or line.provider == "bare" else line.peak / 2**20

    return _bars(
        record, found, value, "peak memory above inputs and gradients, MiB", lambda mib: f"{mib:,.0f}", signed=True
    )


def roofline(record: Record, found: Tables) -> Figure | None:
    def value(line: Line) -> float | None:
        over = line.timed[0].over_bare if line.timed and line.provider != "bare" else None
        return 100 / over if over else None

    return _bars(
        record, found, value, "share of the roofline, %: bare products or bytes that must move, over the time",
        lambda share: f"{share:.0f}", least_first=False,
    )  # fmt: skip


def _bars(
    record: Record,
    found: Tables,
    value: Callable[[Line], float | None],
    label: str,
    form: Callable[[float], str],
    *,
    signed: bool = False,
    least_first: bool = True,
) -> Figure | None:
    """A panel for each op, case and dtype, the best on top, each bar with its number."""
    panels = {}
    for key, lines in found.items():
        pairs = [(line.provider, v) for line in lines if (v := value(line)) is not None and line.provider != "bare"]
        if pairs:
            panels[key] = sorted(pairs, key=lambda pair: pair[1] if least_first else -pair[1])
    if not panels:
        return None
    columns = list(dict.fromkeys((op, dtype) for op, _, dtype in panels))
    cases = list(dict.fromkeys(case for _, case, _ in panels))
    heights = [max(len(panels.get((op, case, dtype), ())) for op, dtype in columns) for case in cases]
    size = (4.6 * len(columns), 0.9 + sum(0.24 * h + 0.55 for h in heights))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(cases), len(columns), squeeze=False, height_ratios=[h + 1 for h in heights])
    for i, case in enumerate(cases):
        for j, (op, dtype) in enumerate(columns):
            axis, pairs = axes[i][j], panels.get((op, case, dtype))
            if pairs is None:
                axis.set_visible(False)
                continue
            _panel(axis, pairs, form, signed)
            axis.set_title(f"{TITLES[op]}, {case}, {dtype}", fontsize=9, loc="left", weight="bold")
    figure.suptitle(f"{label}\n{subtitle(record)}", fontsize=10, x=0.01, ha="left")
    return figure


def _panel(axis: Axes, pairs: list[tuple[str, float]], form: Callable[[float], str], signed: bool) -> None:
    names, values = [name for name, _ in pairs], [v for _, v in pairs]
    bars = axis.barh(range(len(pairs)), values, color=[COLOURS.get(name, "#777777") for name in names], height=0.75)
    axis.bar_label(bars, [form(v) for v in values], fontsize=8, padding=2)
    axis.set_yticks(range(len(pairs)), names, fontsize=8)
    for text in axis.get_yticklabels():
        text.set_fontweight("bold" if text.get_text().startswith("fused_ppl") else "normal")
    axis.invert_yaxis()
    axis.margins(x=0.18)
    if signed:
        axis.axvline(0, color="0.3", linewidth=0.8)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_xticks([])


def error(record: Record, found: Tables) -> Figure | None:
    """Error of the gradient against time: down and to the left is better."""
    ops = list(dict.fromkeys(op for op, _, _ in found))
    points = [
        (op, dtype, line)
        for (op, _, dtype), lines in found.items()
        for line in lines
        if line.errors() and line.timed and line.timed[0].over_ours
    ]
    if not points:
        return None
    figure = Figure(figsize=(6.2 * len(ops), 4.6), layout="constrained")
    for axis, op in zip(figure.subplots(1, len(ops), squeeze=False)[0], ops, strict=True):
        labelled: set[str] = set()
        for which, dtype, line in points:
            if which == op:
                _point(axis, line, dtype, labelled)
        axis.set(xscale="log", yscale="log", xlabel="time over fused_ppl's", ylabel="error of the gradient, relative")
        axis.axvline(1, color="0.8", zorder=0)
        axis.set_title(
            {"logits": "from logits", "linear": "through the LM head"}[op], fontsize=10, loc="left", weight="bold"
        )
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axis.xaxis.set_minor_formatter(lambda v, _: f"{v:g}" if str(f"{v:.0e}")[0] in "25" else "")
        axis.grid(True, which="major", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, loc="best")
    shapes = ", ".join(
        f"{mark}: {dtype}" for dtype, mark in (("bf16", "circle"), ("fp32", "square"), ("fp16", "triangle"))
    )
    figure.suptitle(
        f"error against time; left and down is better ({shapes})\n{subtitle(record)}", fontsize=10, x=0.01, ha="left"
    )
    return figure


def _point(axis: Axes, line: Line, dtype: str, labelled: set[str]) -> None:
    over, errors = line.timed[0].over_ours, line.errors()
    assert over is not None and errors is not None
    label: Any = None if line.provider in labelled else line.provider
    labelled.add(line.provider)
    axis.plot(
        over[1], errors[1], MARKERS[dtype], color=COLOURS.get(line.provider, "#777777"), label=label,
        markersize=9 if line.ours else 7, markeredgecolor="white", alpha=0.9,
    )  # fmt: skip


def subtitle(record: Record) -> str:
    m = record.machine
    device = m.get("gpu") or f"{m['processor']}, {m['threads']} threads"
    return f"{device}, torch {m['torch']}, {m['date']}"


def scaling(points: list[Any], subtitle: str, path: Path) -> Path:
    """Time above memory, against N, V and D; what the plan predicts is dashed."""
    axes_of = list(dict.fromkeys(p.axis for p in points))
    names = list(dict.fromkeys(p.provider for p in points))
    colours = dict(zip(names, ("#0072B2", "#56B4E9", "#999999"), strict=False))
    figure = Figure(figsize=(4.2 * len(axes_of), 6.4), layout="constrained")
    grid = figure.subplots(2, len(axes_of), squeeze=False, sharex="col", sharey="row")
    for column, axis in enumerate(axes_of):
        for name in names:
            mine = sorted((p for p in points if (p.axis, p.provider) == (axis, name)), key=lambda p: p.size)
            sizes = [p.size for p in mine]
            label = {"fused_ppl": "fused_ppl, rows (default)"}.get(name, name)
            for row, (measured, predicted) in enumerate(
                (
                    (
                        [p.seconds * 1e3 for p in mine],
                        [p.predicted_seconds and p.predicted_seconds * 1e3 for p in mine],
                    ),
                    ([p.peak / 2**20 for p in mine], [p.predicted_peak and p.predicted_peak / 2**20 for p in mine]),
                )
            ):
                grid[row][column].plot(sizes, measured, "o-", color=colours[name], label=label, markersize=4)
                if all(v is not None for v in predicted):
                    grid[row][column].plot(sizes, predicted, "--", color=colours[name], linewidth=1)
    for row, label in enumerate(("forward + backward, ms", "peak memory, MiB")):
        grid[row][0].set_ylabel(label, fontsize=9)
        for column, axis in enumerate(axes_of):
            panel = grid[row][column]
            panel.set(xscale="log", yscale="log")
            panel.xaxis.set_major_formatter(lambda v, _: f"{v:g}" if v < 1024 else f"{v / 1024:g}k")
            panel.set_xticks(sorted({p.size for p in points if p.axis == axis}))
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
            panel.grid(True, which="major", color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
            if row:
                panel.set_xlabel(axis)
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"the fused head against N, V and D; memory above inputs and gradients; dashed: predicted\n{subtitle}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=110)
    return path


def bars(panels: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Seconds of each method, in a panel for each kind of run: bare products in grey, ours in blue."""
    figure = Figure(figsize=(4.2 * len(panels), 2.9))
    for i, (name, seconds) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        methods = list(seconds)[::-1]
        ours = {who: COLOURS["fused_ppl"] for who in methods if who == "fused_ppl" or who.startswith("linear_")}
        bare = {who: COLOURS["eager"] for who in methods if who.endswith("products")}
        colours = [{**ours, **bare}.get(who, COLOURS["torch.compile"]) for who in methods]
        axes.bar_label(axes.barh(methods, [seconds[who] for who in methods], color=colours), fmt="%.2f s", padding=3)
        axes.margins(x=0.3)
        axes.set(title=name, xlabel="seconds, forward + backward")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
