# SPDX-License-Identifier: Apache-2.0
"""`fused-ppl rank` orders documents by how surprising a model finds them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fused_ppl.cli import inputs

if TYPE_CHECKING:
    from fused_ppl.evaluation import Ranking

BAR = 40  # characters of the longest bar of the histogram


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "rank",
        help="order documents by perplexity, bits per byte, entropy or compression",
        description="Orders documents by how surprising a model finds them: to filter data, to find anomalies, to "
        "choose what to label.",
        epilog="Exit code: 0 if documents were ordered, 2 if not.",
    )
    inputs.add_model(parser)
    inputs.add_texts(parser)
    inputs.add_windows(parser)
    names = "perplexity (default), bits_per_byte, entropy or compression"
    parser.add_argument("--by", default="perplexity", metavar="NUMBER", help=names)
    parser.add_argument("--top", type=int, default=20, help="documents that are shown (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, with all documents")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with inputs.extras():
        from fused_ppl.evaluation import rank
    documents = inputs.texts(args)
    next(iter(documents()), None)
    model, tokenizer = inputs.model(args, args.model, args.gguf)
    with inputs.bar(args, "rank") as progress:
        found = rank(model, tokenizer, documents(), by=args.by, progress=progress, **inputs.windows(args))
    if args.json:
        print(json.dumps(found.to_dict()))
    else:
        show(found, args.top)
    return 0


def show(found: Ranking, top: int) -> None:
    print(f"{len(found.documents):,} documents by {found.by}, the highest first\n")
    print(f"{'quantile':>8}  {found.by:>13}  {'perplexity':>12}  {'bits/byte':>9}  {'tokens':>7}  document")
    for d in found.documents[:top]:
        value = getattr(d, found.by)
        numbers = f"{100 * d.quantile:7.1f}%  {value:13.4f}  {d.perplexity:12.4f}  {d.bits_per_byte:9.4f}"
        print(f"{numbers}  {d.tokens:7,}  {d.name}")
    print("\nquantiles: " + ", ".join(f"{q} % {v:.4f}" for q, v in found.quantiles.items()))
    most = max(found.histogram)
    for count, low, high in zip(found.histogram, found.edges, found.edges[1:], strict=False):
        print(f"{low:12.4f} to {high:12.4f}  {'#' * round(BAR * count / most)} {count}")
    for name in found.unscored:
        print(f"{name}: not ranked, because no token of it has another before it")
