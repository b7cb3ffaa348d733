# SPDX-License-Identifier: Apache-2.0
"""How gpu_acceptance.py writes down what it has found so far: JSON, Markdown, and at the end a picture.

Every file is replaced as a whole, so that a run that is killed leaves a report of all steps before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_times import BARE
from roofline import CARDS as DATA_SHEETS

Record = dict[str, Any]
TITLES = {
    "kernels": "The kernels alone, bf16",
    "logits": "Losses from logits, bf16",
    "head": "Losses through an LM head, bf16",
    "plans": "Plans of our head, bf16",
    "dtypes": "Perplexity from logits in other dtypes",
    "options": "What each option of cross_entropy costs, bf16",
    "rows": "Perplexity of few rows, bf16",
    "training": "A training step of a Hugging Face model, bf16",
}
# words of a card's name -> bytes a second, from its data sheet; the first that fits
CARDS = (
    (("H100", "NVL"), 3.9e12),
    (("H100", "PCIe"), 2.0e12),
    (("A100", "40GB"), 1.555e12),
    (("A100", "PCIe", "80GB"), 1.935e12),
    *(((name.split()[0],), card.bandwidth) for name, card in DATA_SHEETS.items()),
)


def data_sheet(name: str) -> float | None:
    """The peak bandwidth of a card in bytes a second, where it is known."""
    return next((b for words, b in CARDS if all(word.lower() in name.lower() for word in words)), None)


def markdown(record: Record) -> str:
    results = record["results"]
    counts = {status: sum(r["status"] == status for r in results.values()) for status in ("ok", "failed", "skipped")}
    card = record["card"]
    lines = [
        f"# {card['name']}",
        "",
        f"`{record['command']}`, {record['date']}, torch {record['torch']}, triton {record['triton']}, fused_ppl "
        f"{record['fused_ppl']} at {record['commit']}. {len(results)} steps in {record['seconds']:.0f} s: "
        f"{counts['failed']} failed, {counts['skipped']} skipped, {len(record['left_out'])} did not fit.",
        "",
        bandwidth(card),
        "",
    ]
    failed = [(key, r) for key, r in results.items() if r["status"] == "failed"]
    if failed:
        lines += ["## Failed", "", *(f"- {key}: {r['detail']}" for key, r in failed), ""]
    for group, title in TITLES.items():
        rows = [row for r in results.values() for row in r["rows"] if row["group"] == group]
        if rows:
            lines += [f"## {title}", "", *table(rows, card, results), ""]
    lines += ["## Every step", "", "| step | | found | s |", "|---|---|---|---|"]
    lines += [f"| {key} | {r['status']} | {r['detail']} | {r['seconds']:.1f} |" for key, r in results.items()]
    if record["left_out"]:
        lines += ["", "## Did not fit into the time", "", *(f"- {key}" for key in record["left_out"])]
    return "\n".join(lines) + "\n"


def bandwidth(card: Record) -> str:
    if "copy_bandwidth" not in card:
        return "The bandwidth of the card was not measured."
    peak, copy = data_sheet(card["name"]), f"A copy of 1 GiB reaches {card['copy_bandwidth'] / 1e12:.3f} TB/s."
    return copy if peak is None else f"{copy} The data sheet says {peak / 1e12:.2f} TB/s."


def table(rows: list[Record], card: Record, results: Record) -> Iterator[str]:
    """A row for each timing. L2 is overwritten before each call, but for those inside a CUDA graph."""
    titles = ("N, V, D", "", "mode", "ms (20 % to 80 %)", "of the copy", "of the data sheet", "over bare products",
              "peak", "planned", "graph", "host")  # fmt: skip
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for row in rows:
        low, middle, high = row["milliseconds"]
        dtype = "" if row["dtype"] == "bf16" else row["dtype"]
        name = " ".join(filter(None, (row["objective"], row["provider"], dtype)))
        cells = [", ".join(map(str, row["shape"])), name, row["mode"], f"{middle:.3f} ({low:.3f} to {high:.3f})"]
        cells += [share(row, card.get("copy_bandwidth")), share(row, data_sheet(card["name"])), over_bare(row, results)]
        cells += [size(row["peak_bytes"]), size(row["planned_bytes"])]
        graph, host = row["graph_milliseconds"], row["host_microseconds"]
        cells += ["" if graph is None else f"{graph:.4f} ms", "" if host is None else f"{host:.0f} us"]
        if row["residual"] is not None:
            cells[1] += f", residual {row['residual']:.1e}"
        yield "| " + " | ".join(cells) + " |"


def share(row: Record, bytes_a_second: float | None) -> str:
    if not row["bytes"] or bytes_a_second is None:
        return ""
    return f"{row['bytes'] / bytes_a_second / (row['milliseconds'][1] * 1e-3):.0%}"


def over_bare(row: Record, results: Record) -> str:
    """The time over that of the matrix products alone."""
    if not row["flops"]:
        return ""
    bare = [b for b in results.get(BARE, {}).get("rows", ()) if (b["mode"], b["shape"]) == (row["mode"], row["shape"])]
    return f"{row['milliseconds'][1] / bare[0]['milliseconds'][1]:.2f}" if bare else ""


def size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB"


def write(folder: Path, name: str, record: Record) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{name}.json": json.dumps(record, indent=1) + "\n", f"{name}.md": markdown(record)}
    for file, text in texts.items():
        partial = folder / f".{file}.partial"
        partial.write_text(text)
        os.replace(partial, folder / file)
    return [folder / file for file in texts]


def picture(path: Path, record: Record) -> None:
    """Bars of the median times, a panel for each table and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for r in record["results"].values() for row in r["rows"] if row["group"] in TITLES]
    panels = list(dict.fromkeys((row["group"], tuple(row["shape"])) for row in timed))
    if not panels:
        return
    of = {panel: [r for r in timed if (r["group"], tuple(r["shape"])) == panel][::-1] for panel in panels}
    heights = [len(rows) for rows in of.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1.2 * len(panels) + 0.3 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for (group, shape), axis in zip(panels, axes[:, 0], strict=True):
        rows = of[group, shape]
        middle = [row["milliseconds"][1] for row in rows]
        spread = [
            [row["milliseconds"][1] - row["milliseconds"][0] for row in rows],
            [row["milliseconds"][2] - row["milliseconds"][1] for row in rows],
        ]
        peers = ("Liger", "quack", "cut-cross-entropy", "torch", "F.", "native", "the matrix")
        ours = ["tab:gray" if row["provider"].startswith(peers) else "tab:blue" for row in rows]
        labels = [f"{row['objective']} {row['provider']} {row['dtype']}  {row['mode']}" for row in rows]
        axis.barh(range(len(rows)), middle, xerr=spread, color=ours, tick_label=labels)
        axis.set_title(f"{TITLES[group]}: {', '.join(map(str, shape))}", fontsize=9)
        axis.set_xlabel("ms", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{record['card']['name']}, {record['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
