# SPDX-License-Identifier: Apache-2.0
"""`fused-ppl eval` prints the perplexity of texts under a named convention, with a line that pins it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_ppl.cli import inputs

if TYPE_CHECKING:
    from fused_ppl.evaluation import Document, Evaluation, Row

ALL = "all"
ALTERNATIVES = 5  # of each token on the page


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure the perplexity of a model on texts, under a named convention",
        description="Measures perplexity, bits per byte and their intervals, without logits of all tokens.",
        epilog="Exit code: 0 if a number was measured, 2 if not. docs/evaluation.md explains the conventions.",
    )
    inputs.add_model(parser)
    inputs.add_texts(parser)
    inputs.add_windows(parser)
    add = parser.add_argument
    add("--convention", default="strided", metavar="NAME", help="strided (default), all, or one that `all` lists")
    add("--json", action="store_true", help="print everything as JSON")
    add("--per-token", metavar="FILE", help="write every scored token to FILE.jsonl or FILE.parquet")
    add("--html", metavar="FILE", help="write a page with the text coloured by surprise")
    add("--resume", metavar="FILE", help="keep what is done in FILE, and go on from it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with inputs.extras():
        from fused_ppl.evaluation import CONVENTIONS
        from fused_ppl.evaluation.conventions import convention_of
    names = list(CONVENTIONS)
    if args.convention != ALL:
        names = [convention_of(args.convention).name]
    elif args.per_token or args.html or args.resume:
        raise ValueError("--per-token, --html and --resume need one convention; --convention all has many.")
    if args.html and args.resume:
        raise ValueError("--html needs all tokens in one run, so it cannot go on from --resume.")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise ValueError(f"--html must be in a folder that exists; got {args.html!r}.")
    documents = inputs.texts(args)
    next(iter(documents()), None)  # a text that cannot be read is found before the model is loaded
    model, tokenizer = inputs.model(args, args.model, args.gguf)
    found, refused = [], {}
    for name in names:
        try:
            found.append(one(args, name, (model, tokenizer), documents=documents))
        except ValueError as error:  # a convention may need a longer text, or a BOS
            if len(names) == 1:
                raise
            refused[name] = str(error)
    if not found:
        raise ValueError(next(iter(refused.values())))
    if args.json:
        whole = [e.to_dict() for e in found]
        print(json.dumps(whole[0] if args.convention != ALL else {"conventions": whole, "refused": refused}))
    elif args.convention == ALL:
        show_all(found, refused)
    else:
        show(found[0])
    return 0


def one(
    args: argparse.Namespace, name: str, loaded: tuple[Any, Any], *, documents: Callable[[], Iterable[Document]]
) -> Evaluation:
    from fused_ppl.evaluation import TokenFile, evaluate

    keywords: dict[str, Any] = inputs.windows(args) | {"convention": name, "state": args.resume}
    with contextlib.ExitStack() as stack:
        keywords["progress"] = stack.enter_context(inputs.bar(args, name))
        if args.per_token:
            keywords["per_token"] = stack.enter_context(TokenFile(args.per_token))
        if not args.html:
            return evaluate(*loaded, documents(), **keywords)
        with inputs.extras():
            from fused_ppl.evaluation.report import Report
        report, file = Report(loaded[1]), keywords.get("per_token")

        def add(row: Any) -> None:
            report.add(row)
            if file is not None:
                file(row)

        if file is not None:
            file.keep(0)
        found = evaluate(*loaded, documents(), **{**keywords, "per_token": add, "alternatives": ALTERNATIVES})
        report.write(args.html, found, documents())
    return found


def show(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    console, total = Console(), found.total
    table = Table(box=None, pad_edge=False)
    for name in ("", "perplexity", "95 % interval", "bits/byte", "95 % interval", "tokens", "bytes"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    rows = found.rows if len(found.rows) > 1 else []
    for row in [*rows, total]:
        table.add_row(*cells(row))
    if rows:
        table.add_row("mean", f"{found.macro_perplexity:,.4f}", "", f"{found.macro_bits_per_byte:.4f}")
    console.print(table)
    words = "" if total.word_perplexity is None else f", word perplexity {total.word_perplexity:,.4g}"
    name, value = found.headline
    speed = f"{found.tokens_per_second:,.0f} tokens a second{memory(found)}"
    say(
        console,
        [
            "",
            f"{name} {value:.4f} under the convention {found.settings.convention}",
            f"{total.nll:.4f} nats and {total.bits_per_token:.4f} bits a token, {total.bits_per_byte:.4f} bits a byte, "
            f"byte perplexity {total.byte_perplexity:.4f}{words}",
            f"{total.tokens:,} of {total.total_tokens:,} tokens scored, {total.num_bytes:,} of {total.total_bytes:,} "
            f"bytes, {speed}",
            f"formula: {found.convention.formula}",
            "",
            f"To quote: {found.quote()}",
        ],
        found.warnings,
    )


def show_all(found: list[Evaluation], refused: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(box=None, pad_edge=False)
    for name in ("convention", "perplexity", "bits/byte", "byte ppl", "scored", "quoted by"):
        left = name in ("convention", "quoted by")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for e in found:
        t = e.total
        numbers = (f"{t.perplexity:,.4f}", f"{t.bits_per_byte:.4f}", f"{t.byte_perplexity:,.4f}", f"{t.tokens:,}")
        table.add_row(e.settings.convention, *numbers, e.headline[0])
    console.print(table)
    lines = ["", f"{found[0].total.total_tokens:,} tokens, {found[0].total.total_bytes:,} bytes. The formulas:", ""]
    lines += [f"{e.settings.convention}: {e.convention.formula}" for e in found]
    lines += [f"{name}: not measured. {reason}" for name, reason in refused.items()]
    lines += ["", f"To quote: {found[0].quote()}"]
    say(console, lines, list(dict.fromkeys(w for e in found for w in e.warnings)))


def say(console: Any, lines: list[str], warnings: list[str]) -> None:
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    for warning in warnings:
        print(f"Warning: {warning}", file=sys.stderr)


def cells(row: Row) -> list[str]:
    def interval(pair: tuple[float, float] | None) -> str:
        return "" if pair is None else f"{pair[0]:.4g} to {pair[1]:.4g}"

    perplexity = [f"{row.perplexity:,.4f}", interval(row.perplexity_interval)]
    per_byte = [f"{row.bits_per_byte:.4f}", interval(row.bits_per_byte_interval)]
    return [row.name, *perplexity, *per_byte, f"{row.tokens:,}", f"{row.num_bytes:,}"]


def memory(found: Evaluation) -> str:
    return "" if found.peak_memory is None else f", peak memory {found.peak_memory / 2**20:,.0f} MiB"
