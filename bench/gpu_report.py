# SPDX-License-Identifier: Apache-2.0
"""How gpu_acceptance.py writes down what it found: a record as JSON and as Markdown, and a picture of the times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gpu_times import Timing

TITLES = {
    "kernels": "The kernels against the roofline",
    "logits": "Perplexity from logits, bf16",
    "head": "Perplexity through an LM head, bf16",
}


def markdown(record: dict[str, Any], timings: list[Timing]) -> str:
    failed = sum(c["status"] == "failed" for c in record["checks"])
    skipped = sum(c["status"] == "skipped" for c in record["checks"])
    lines = [
        f"# {record['card']['name']}",
        "",
        f"`{record['command']}`, {record['date']}, torch {record['torch']}, triton {record['triton']}, fused_ppl "
        f"{record['fused_ppl']}. {len(record['checks'])} checks: {failed} failed, {skipped} skipped.",
        "",
        "| check | | found | s |",
        "|---|---|---|---|",
    ]
    lines += [f"| {c['name']} | {c['status']} | {c['detail']} | {c['seconds']:.1f} |" for c in record["checks"]]
    for group, title in TITLES.items():
        rows = [t for t in timings if t.group == group]
        if rows:
            lines += ["", f"## {title}", "", _note(group, record), ""]
            lines += ["| N, V | | mode | ms (20 % to 80 %) | achieved | share |", "|---|---|---|---|---|---|"]
            lines += [_row(t) for t in rows]
    return "\n".join(lines) + "\n"


def _note(group: str, record: dict[str, Any]) -> str:
    if group == "head":
        return "Share: the time of the matrix products alone, over this one. L2 is flushed before each call."
    passes = (
        "1 pass over N * V forward, 3 forward + backward" if group == "logits" else "what the kernel reads and writes"
    )
    return (
        f"Share: the time that the bytes that must move take, over this one. Bytes: {passes}. Bandwidth: "
        f"{record['roofline']}; a copy reaches {record['copy_bandwidth'] / 1e12:.3f} TB/s. "
        "L2 is flushed before each call."
    )


def _row(t: Timing) -> str:
    shape = ", ".join(map(str, t.shape))
    if t.milliseconds is None:
        return f"| {shape} | {t.provider} | {t.note} | | | |"
    low, middle, high = t.milliseconds
    rate = f"{t.bytes / middle / 1e6:.0f} GB/s" if t.bytes else f"{t.flops / middle / 1e9:.0f} TFLOP/s"
    share = "" if t.share is None else f"{t.share:.0%}"
    return f"| {shape} | {t.provider} | {t.mode} | {middle:.3f} ({low:.3f} to {high:.3f}) | {rate} | {share} |"


def picture(path: Path, record: dict[str, Any], timings: list[Timing]) -> None:
    """Bars of the median times, a panel for each group and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [t for t in timings if t.milliseconds is not None]
    panels = list(dict.fromkeys((t.group, t.shape) for t in timed))
    heights = [sum((t.group, t.shape) == panel for t in timed) for panel in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1.2 * len(panels) + 0.3 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for (group, shape), axis in zip(panels, axes[:, 0], strict=True):
        rows = [t for t in timed if (t.group, t.shape) == (group, shape)][::-1]
        middle = [t.milliseconds[1] for t in rows]
        spread = [
            [t.milliseconds[1] - t.milliseconds[0] for t in rows],
            [t.milliseconds[2] - t.milliseconds[1] for t in rows],
        ]
        ours = ["tab:blue" if t.provider.startswith(("fused_ppl", "nll_")) else "tab:gray" for t in rows]
        axis.barh([f"{t.provider}  {t.mode}" for t in rows], middle, xerr=spread, color=ours)
        axis.set_title(f"{TITLES[group]}: {', '.join(map(str, shape))}", fontsize=9)
        axis.set_xlabel("ms", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{record['card']['name']}, {record['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(folder: Path, name: str, record: dict[str, Any], timings: list[Timing]) -> list[Path]:
    """The files that were written; the picture only where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / f"{name}.json", folder / f"{name}.md"]
    whole = {**record, "timings": [dataclasses.asdict(t) for t in timings]}
    made[0].write_text(json.dumps(whole, indent=1) + "\n")
    made[1].write_text(markdown(record, timings))
    try:
        picture(folder / f"{name}.png", record, timings)
        made.append(folder / f"{name}.png")
    except ImportError as error:
        print(f"No picture: {error} (pip install matplotlib).")
    return made
