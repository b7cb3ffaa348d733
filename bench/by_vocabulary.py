# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the fused head over the vocabulary, beside other ways to compute it: the README's first picture.

    python bench/by_vocabulary.py             five minutes on two cores; runs/bench/by_vocabulary.*
    python bench/by_vocabulary.py --record    into bench/results, where the README shows it
    python bench/by_vocabulary.py --plot      the pictures in bench/results once more, from the record there

Each way is compared with float64 first. Memory is the peak above inputs and gradients, in a fresh process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cases import Case, Setting
from compare import Comparison, How
from matplotlib.figure import Figure
from plots import subtitle
from providers import all_providers
from record import Record, Row, load, machine
from tqdm import tqdm

TOKENS, SIZE, DTYPE = 512, 256, "fp32"
VOCABULARIES = (8192, 16384, 32768, 65536, 131072, 262144)
SHOWN = {  # in Matplotlib's colours; the grey ones are PyTorch as it is
    "fused_ppl": "#0A84C6",
    "eager": "#8C8C8C",
    "torch.compile": "#E69F00",
    "cut-cross-entropy, torch_compile": "#16A37A",
    "F.linear_cross_entropy, chunked": "#D174A8",
}
INKS = {"": ("black", "0.88", "white"), "_dark": ("#E6EDF3", "#30363D", "#0D1117")}  # text, grid, page


def measure(seconds: float) -> list[Row]:
    providers = [p for p in all_providers() if p.name in SHOWN]
    how, rows = How(kinds=("random",), seconds=seconds, patience=60.0), []
    for v in tqdm(VOCABULARIES, unit="vocabulary"):
        setting = Setting("linear", Case(f"V={v}", TOKENS, v, SIZE), DTYPE)
        rows += Comparison(setting, providers, how, lambda share: None).rows()
    return rows


def of(rows: list[Row], provider: str, mode: str, what: str) -> tuple[list[int], list[float]]:
    """The vocabularies and the numbers of one way, where it gave one."""
    found = [(r.num_classes, getattr(r, what)) for r in rows if (r.provider, r.mode) == (provider, mode)]
    pairs = [(v, value) for v, value in found if value is not None]
    return [v for v, _ in pairs], [value for _, value in pairs]


def picture(record: Record, path: Path, inks: tuple[str, str, str]) -> None:
    text, grid, page = inks
    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained", facecolor=page)
    left, right = figure.subplots(1, 2)
    for axes, mode, what, unit in (
        (left, "memory", "peak_bytes", 2**20),
        (right, "both", "median", 1e-3),
    ):
        for name, colour in SHOWN.items():
            xs, ys = of(record.rows, name, mode, what)
            width = 2.6 if name == "fused_ppl" else 1.4
            axes.plot(xs, [y / unit for y in ys], "o-", color=colour, label=name, markersize=4, linewidth=width)
        _dress(axes, text, grid, page)
    left.set_title("peak memory above inputs and gradients, MiB", loc="left", size=10, color=text)
    right.set_title("forward + backward, ms", loc="left", size=10, color=text)
    legend = left.legend(frameon=False, fontsize=8)
    for label in legend.get_texts():
        label.set_color(text)
    shape = f"N = {TOKENS}, D = {SIZE}, {DTYPE}"
    missing = "no point: the value failed the check against float64"
    figure.suptitle(f"loss of a language model's head, {shape}; {missing}\n{subtitle(record)}", size=9, color=text)
    figure.savefig(path, facecolor=page)


def _dress(axes: Any, text: str, grid: str, page: str) -> None:
    axes.set_facecolor(page)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(VOCABULARIES, [f"{v // 1024}k" for v in VOCABULARIES])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(colors=text)
    axes.set_xlabel("vocabulary V", color=text)
    axes.grid(True, color=grid)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each timing (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
    parser.add_argument("--record", action="store_true", help="write bench/results instead")
    parser.add_argument("--plot", action="store_true", help="draw the record of bench/results")
    args = parser.parse_args()
    out = Path(__file__).parent / "results" if args.record or args.plot else args.out
    if args.plot:
        record = load(out / "by_vocabulary.json")
    else:
        settings = {"N": TOKENS, "D": SIZE, "dtype": DTYPE, "seconds": args.seconds}
        record = Record("python bench/by_vocabulary.py --record", machine("cpu"), settings)
        record.rows = measure(args.seconds)
        out.mkdir(parents=True, exist_ok=True)
        record.save(out, "by_vocabulary")
    for suffix, inks in INKS.items():
        picture(record, out / f"by_vocabulary{suffix}.png", inks)


if __name__ == "__main__":
    main()
