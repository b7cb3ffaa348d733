# SPDX-License-Identifier: Apache-2.0
"""`fused-ppl compare` shows how the predictions of two models differ on texts, in one pass and without logit files."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fused_ppl.cli import inputs

if TYPE_CHECKING:
    from fused_ppl.evaluation import Comparison

SHOWN = 10  # of the tokens that differ most


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare the predictions of two models on texts: KL divergence, ratio of perplexities, agreement",
        description="Two models on the same tokens, in one pass, with the quantities of llama.cpp's KL mode. With two "
        "tokenizers, bits per byte only.",
        epilog="Exit code: 0 if both were measured, 2 if not. docs/evaluation.md explains the numbers.",
    )
    parser.add_argument("model", metavar="DIR|NAME", help="the model, Q")
    parser.add_argument("base", metavar="BASE", help="what it is compared with, such as the model before quantisation")
    parser.add_argument("--gguf", metavar="FILE", help="a GGUF file in the folder of the model")
    parser.add_argument("--base-gguf", metavar="FILE", help="a GGUF file in the folder of the base")
    inputs.add_how(parser)
    inputs.add_texts(parser)
    inputs.add_windows(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with inputs.extras():
        from fused_ppl.evaluation import compare
    documents = inputs.texts(args)
    next(iter(documents()), None)  # a text that cannot be read is found before the models are loaded
    model, tokenizer = inputs.model(args, args.model, args.gguf)
    base, base_tokenizer = inputs.model(args, args.base, args.base_gguf)
    with inputs.bar(args, "compare") as progress:
        keywords = inputs.windows(args) | {"base_tokenizer": base_tokenizer, "progress": progress}
        found = compare(model, base, tokenizer, documents(), **keywords)
    if args.json:
        print(json.dumps(found.to_dict()))
    else:
        show(found)
    return 0


def show(found: Comparison) -> None:
    lines = found.lines()
    width = max(len(name) for name, _ in lines)
    print(f"Q: {found.model}, base: {found.base}, {found.tokens:,} tokens, {found.num_bytes:,} bytes\n")
    print("\n".join(f"{name:{width}}  {value}" for name, value in lines))
    if found.kl is None:
        print("\nThe tokenizers differ, so the models predict other tokens, and only bits per byte can be compared.")
    if found.most_different:
        print("\nThe tokens that differ most: KLD, p by Q, p by the base, and the text before the token")
    for d in found.most_different[:SHOWN]:
        print(f"  {d.kl:8.4f}  {d.probability:.4f}  {d.base_probability:.4f}  {d.before[-40:]!r} + {d.token!r}")
