# SPDX-License-Identifier: Apache-2.0
"""What was measured, for people: a table on the terminal, Markdown, plots, and the tables of README.md and docs/.

python bench/report.py bench/results/cpu.json            the table
python bench/report.py bench/results/cpu.json --docs     the plots from that record, and the blocks of README.md,
                                                         docs/performance.md and docs/records/cpu.md
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from cases import Setting
from measure import DISTURBED
from record import Record, Row, load
from record_tables import Line, as_accurate, tables

ROOT = Path(__file__).parents[1]
MEMORY_NOISE = 2 * 2**20  # bytes by which resident memory scatters from process to process
MISSING = ("needs a GPU", "is for a CPU", "not installed")
PEERS = (
    "eager",
    "eager, fp32 logits",
    "torch.compile",
    "torch.compile, fp32 logits",
    "cut-cross-entropy, torch_compile",
    "F.linear_cross_entropy, chunked",
)
MODELS = {"gpt2-cpu": "GPT-2", "llama3-8b-cpu": "Llama 3", "qwen3-8b-cpu": "Qwen3", "gemma2-2b-cpu": "Gemma 2"}
CLAIM = ("linear", "llama3-8b-cpu", "fp32")  # the comparison that the first lines of README.md name
HEADS = ("", "fwd + bwd, ms", "of bare", "of ours", "peaked", "peak memory", "value error", "gradient error", "")


def mark(line: Line, lines: list[Line]) -> str:
    """In what fused_ppl loses to this provider, and whether that one pays with its errors."""
    ours = next((each for each in lines if each.provider == "fused_ppl"), None)
    if ours is None or line.ours or line.provider == "bare" or line.note or not line.timed:
        return ""
    found = []
    if any(row.over_ours and row.over_ours[2] < 1.0 for row in line.timed):
        found.append("time")
    if line.peak is not None and ours.peak is not None and line.peak + MEMORY_NOISE < ours.peak:
        found.append("memory")
    careful = as_accurate(line, ours)
    if careful and not as_accurate(ours, line):
        found.append("error")
    return ", ".join([*(["LOST " + ", ".join(found)] if found else []), *([] if careful else ["less accurate"])])


def lost(record: Record) -> list[str]:
    """Every comparison that fused_ppl loses, in words: first to those that are as accurate."""
    found = [
        f"{' '.join(key)}: {said} to {line.provider}"
        for key, lines in tables(record.rows).items()
        for line in lines
        if (said := mark(line, lines)).startswith("LOST")
    ]
    return sorted(found, key=lambda words: "less accurate" in words)


def cells(line: Line) -> list[str]:
    """The columns of HEADS but the last."""
    first, *more = line.timed or (None,)
    numbers = ["", "", "", ""]
    if first is not None:
        low, middle, high = (milliseconds(s) for s in (first.p20, first.median, first.p80))
        numbers[0] = f"{middle} ({low} to {high})"
        numbers[1] = f"{first.over_bare:.2f}"
        numbers[2] = f"{first.over_ours[1]:.2f}" if first.over_ours else ""
        numbers[3] = f"{more[0].over_ours[1]:.2f}" if more and more[0].over_ours else ""
    peak = "" if line.peak is None else f"{line.peak / 2**20:+.0f} MiB"
    errors = line.errors()
    return [line.provider, *numbers, peak, *([f"{e:.0e}" for e in errors] if errors else ["", ""])]


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def title(rows: list[Row], key: tuple[str, str, str]) -> str:
    op, name, dtype = key
    row = next(r for r in rows if (r.op, r.case, r.dtype) == key)
    cap = "" if row.softcap is None else f", softcap {row.softcap:g}"
    shape = f"N={row.num_tokens}, V={row.num_classes}" + (f", D={row.hidden_size}" if op == "linear" else "")
    return f"{'from logits' if op == 'logits' else 'through the LM head'}, {name}, {dtype} ({shape}{cap})"


def head_line(record: Record) -> str:
    m = record.machine
    device = m.get("gpu") or f"{m['processor']}, {m['threads']} threads"
    return f"{device}, torch {m['torch']}, commit {m['commit']}, {m['date']}: `{record.command}`"


def brief(rows: list[Row], setting: Setting) -> Iterator[str]:
    """One line for a comparison that is done."""
    key = (setting.op, setting.case.name, setting.dtype)
    lines = [line for line in tables(rows).get(key, []) if line.timed and line.provider != "bare"]
    words = [f"{line.provider} {milliseconds(line.timed[0].median)} ms" for line in lines[:3]]
    yield f"{' '.join(key):32} {' · '.join(words)}"


def show(record: Record) -> None:
    """Everything on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)
    for key, lines in tables(record.rows).items():
        table = Table(title=title(record.rows, key), title_justify="left", title_style="bold")
        for head in HEADS:
            table.add_column(head, justify="left" if head == "" else "right", overflow="fold")
        for line in lines:
            if line.timed or line.peak is not None or not line.note.startswith(MISSING):
                style = "green" if line.ours else "dim" if line.provider == "bare" else None
                said = mark(line, lines)
                last = f"[red]{said}[/red]" if said.startswith("LOST") else said or line.note
                table.add_row(*cells(line), last, style=style)
        console.print(table)
    for words in (*absent(record), *disturbed(record)):
        console.print(words, highlight=False)
    console.print(verdict(record), highlight=False)


def disturbed(record: Record) -> list[str]:
    """Where other programs were at work; once for each timing."""
    found = {(r.op, r.case, r.dtype, r.kind): r.others for r in record.rows if (r.others or 0.0) > DISTURBED}
    return [f"disturbed, other programs took {share:.0%}: {' '.join(key)}" for key, share in found.items()]


def absent(record: Record) -> list[str]:
    """Who was not there, and why; once each."""
    notes = {(r.provider, r.note) for r in record.rows if r.note.startswith(MISSING)}
    return [f"{provider}: {note}" for provider, note in sorted(notes)]


def verdict(record: Record) -> str:
    compared, found = len(tables(record.rows)), lost(record)
    if not found:
        return (
            f"fused_ppl is the fastest and the smallest of all that are as accurate, in all of {compared} comparisons."
        )
    return "\n".join([f"fused_ppl loses to a provider {len(found)} times:", *(f"  {words}" for words in found)])


def markdown(record: Record) -> str:
    """The whole report."""
    parts = [head_line(record), "", legend(), ""]
    for key, lines in tables(record.rows).items():
        parts += [f"### {title(record.rows, key)}", "", *rows_of(lines), ""]
    parts += [
        *(f"- {words}" for words in (*absent(record), *disturbed(record))),
        "",
        verdict(record).replace("\n  ", "\n- "),
    ]
    return "\n".join(parts) + "\n"


def legend() -> str:
    return (
        "Medians with 20 % and 80 % of interleaved rounds on random inputs. Of bare: over the three matrix products "
        "alone, or over the three passes of the logits at the speed of a copy. Of ours: over fused_ppl, the median of "
        "the ratios round by round; peaked: the same on trained-like inputs. Memory: above inputs and one copy of the "
        "gradients, in a fresh process. Errors: against float64, the worse of both inputs; value in nats, gradient "
        "relative."
    )


def rows_of(lines: list[Line]) -> list[str]:
    rows = []
    for line in lines:
        if line.timed or line.peak is not None or not line.note.startswith(MISSING):
            said = mark(line, lines)
            last = f"**{said}**" if said.startswith("LOST") else said or line.note
            rows.append([*cells(line), last])
    return _table(HEADS, rows)


def write(record: Record, folder: Path, name: str) -> list[Path]:
    """The Markdown, and the plots where matplotlib is installed."""
    path = folder / f"{name}.md"
    path.write_text(markdown(record))
    try:
        import plots

        return [path, *plots.write(record, folder, name)]
    except ImportError as error:
        print(f"no plots: {error} (pip install matplotlib)")
        return [path]


# --- what README.md and docs/ show -----------------------------------------------------------------------------------


def write_docs(record: Record, root: Path = ROOT) -> None:
    """Replace each generated block of the documentation."""
    for page, blocks_of in PAGES.items():
        path = root / page
        text = path.read_text()
        for name, block in blocks_of(record).items():
            text = replaced(text, name, block)
        path.write_text(text)


def replaced(text: str, name: str, block: str) -> str:
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, rest = text.split(start, 1)
    return f"{before}{start}\n\n{block}\n\n{end}{rest.split(end, 1)[1]}"


def readme(record: Record) -> dict[str, str]:
    """The claim of the first lines, and the table of one dtype."""
    table = "\n".join([head_line(record), "", *for_strangers(record)])
    return {"CLAIM": claim(record), "BENCH": table}


def for_strangers(record: Record) -> list[str]:
    """A row for each vocabulary of a known model, through the head and from logits, in bf16."""
    found, rows = tables(record.rows), []
    for op, name in itertools.product(("linear", "logits"), MODELS):
        lines = found[op, name, "bf16"]
        ours, eager = _found(lines, "fused_ppl"), _found(lines, "eager, fp32 logits")
        others = [o for o in lines if not o.ours and o is not eager and o.timed and o.timed[0].over_ours]
        fastest = min(others, key=_over_ours)
        given = "hidden states" if op == "linear" else "logits"
        rows.append(
            [
                f"{given}, {MODELS[name]} (V = {ours.timed[0].num_classes:,})",
                f"{milliseconds(ours.timed[0].median)} ms",
                _times(eager, ours),
                f"{_times(fastest, ours)} ({fastest.provider})",
                _mib(ours.peak),
                _mib(eager.peak),
            ]
        )
    return _table(
        ["loss and gradients from", "fused_ppl", "eager PyTorch", "the fastest other", "memory", "eager PyTorch"], rows
    )


def claim(record: Record) -> str:
    """One comparison with eager PyTorch in two sentences."""
    ours, eager = (_found(tables(record.rows)[CLAIM], name) for name in ("fused_ppl", "eager"))
    row, machine = ours.timed[0], record.machine
    shape = f"N = {row.num_tokens}, V = {row.num_classes}, D = {row.hidden_size}, {row.dtype}"
    return (
        f"Measured on a CPU ({machine['processor']}, {machine['threads']} threads; {shape}): `linear_perplexity` takes "
        f"{milliseconds(row.median)} ms and {_mib(ours.peak)[1:]} for forward and backward. Eager PyTorch takes "
        f"{_over_ours(eager):.2f} times as long and {_mib(eager.peak)[1:]}."
    )


def details(record: Record) -> dict[str, str]:
    """The overview of both dtypes, and every comparison that fused_ppl loses."""
    words = [*absent(record), *disturbed(record)]
    said = [verdict(record).replace("\n  ", "\n- ").replace(":\n-", ":\n\n-"), "", *(f"- {w}" for w in words)]
    return {"BENCH": "\n".join([head_line(record), "", *overview(record, ("bf16", "fp32")), "", *said])}


def performance(record: Record) -> dict[str, str]:
    """Three tables with a row for each comparison and a column for each provider."""
    fast, small, exact = [], [], []
    for key, lines in tables(record.rows).items():
        of = {line.provider: line for line in lines}
        if "fused_ppl" not in of or not of["fused_ppl"].timed:
            continue
        ours, peers = of["fused_ppl"], [of.get(name) for name in PEERS]
        row = ours.timed[0]
        named = f"{'logits' if key[0] == 'logits' else 'head'}, {key[1]}, {key[2]}"
        shape = ", ".join(map(str, (row.num_tokens, row.num_classes, *([row.hidden_size] * (key[0] == "linear")))))
        fast.append([named, shape, f"{milliseconds(row.median)} ms", *(_times(peer, ours) for peer in peers)])
        small.append([named, _mib(ours.peak), *(_mib(peer.peak) if peer else "" for peer in peers)])
        exact.append([named, _errors(ours), *(_errors(peer) if peer else "" for peer in peers)])
    return {
        "MACHINE": head_line(record),
        "FAST": "\n".join(_table(["forward + backward", "N, V, D", "fused_ppl", *PEERS], fast)),
        "SMALL": "\n".join(_table(["peak memory", "fused_ppl", *PEERS], small)),
        "EXACT": "\n".join(_table(["value error / gradient error", "fused_ppl", *PEERS], exact)),
    }


PAGES = {"README.md": readme, "docs/performance.md": performance, "docs/records/cpu.md": details}


def _table(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    first, *more = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return [first, "|" + "---|" * len(heads), *more]


def _found(lines: list[Line], provider: str) -> Line:
    return next(line for line in lines if line.provider == provider)


def _times(peer: Line | None, ours: Line) -> str:
    """The time over ours; a star where the peer is less accurate."""
    if peer is None or not peer.timed:
        return ""
    return f"{_over_ours(peer):.2f} x" + ("" if as_accurate(peer, ours) else " *")


def _errors(line: Line) -> str:
    errors = line.errors()
    return "" if errors is None else " / ".join(f"{error:.0e}" for error in errors)


def overview(record: Record, dtypes: tuple[str, ...]) -> list[str]:
    """A row for each comparison: ours, eager (from fp32 logits), and the best of the others that passed the gate."""
    rows = []
    for key, lines in tables(record.rows).items():
        of = {line.provider: line for line in lines}
        eager = of.get("eager, fp32 logits") or of.get("eager")
        if key[2] not in dtypes or "fused_ppl" not in of or eager is None or not of["fused_ppl"].timed:
            continue
        ours = of["fused_ppl"]
        others = [o for o in lines if not o.ours and o is not eager and o.timed and o.timed[0].over_ours]
        fastest = min(others, key=_over_ours, default=None)
        smallest = min((o for o in others if o.peak is not None), key=lambda o: o.peak or 0, default=None)
        cells = [
            f"{'logits' if key[0] == 'logits' else 'head'}, {key[1]}, {key[2]}",
            f"{milliseconds(ours.timed[0].median)} ms",
            f"{_over_ours(eager):.2f} x" if eager.timed else "",
            f"{_over_ours(fastest):.2f} x, {_named(fastest, ours)}" if fastest else "none",
            _mib(ours.peak),
            _mib(eager.peak),
            f"{_mib(smallest.peak)}, {_named(smallest, ours)}" if smallest else "none",
        ]
        rows.append(cells)
    return _table(
        ["forward + backward", "fused_ppl", "eager", "fastest other", "memory", "eager", "smallest other"], rows
    )


def _named(line: Line, ours: Line) -> str:
    return line.provider + ("" if as_accurate(line, ours) else " (less accurate)")


def _over_ours(line: Line) -> float:
    over = line.timed[0].over_ours
    return over[1] if over else float("nan")


def _mib(peak: int | None) -> str:
    return "" if peak is None else f"{peak / 2**20:+.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--docs", action="store_true", help="rewrite what README.md and docs/ show of it")
    args = parser.parse_args()
    record = load(args.record)
    show(record)
    if args.docs:
        write(record, args.record.parent, args.record.stem)
        write_docs(record)


if __name__ == "__main__":
    main()
