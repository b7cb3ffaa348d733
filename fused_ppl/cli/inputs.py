# SPDX-License-Identifier: Apache-2.0
"""What `eval`, `compare` and `rank` have in common: a model, texts, windows, and a bar that shows what is left."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_ppl import Options
from fused_ppl.spec import BACKENDS

if TYPE_CHECKING:
    from fused_ppl.evaluation import Document, HiddenModel

MISSING = "This command needs more packages: pip install 'fused-ppl[eval]'. Missing: "


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR|NAME", help="folder of a model of transformers, or a name"
    )
    parser.add_argument("--gguf", metavar="FILE", help="a GGUF file in that folder")
    add_how(parser)


def add_how(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    add("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, mps")
    add("--backend", choices=BACKENDS, help="of the fused head (default: the best that can run)")


def add_texts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help="texts, folders, .jsonl or .parquet; - is stdin")
    add("--field", default="text", help="of a record of .jsonl or .parquet: its text (%(default)s)")
    add("--domain-field", help="of a record: the name of its domain (default: the file is the domain)")
    add("--errors", choices=("strict", "replace"), default="strict", help="bytes that are not UTF-8 (%(default)s)")


def add_windows(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ctx", type=int, help="the most tokens that the model is given at once (default: 512, or what it takes)")
    add("--stride", type=int, help="tokens scored in a window, where windows overlap (default: half of --ctx)")
    add("--min-context", type=int, help="in the place of --stride: the least tokens before a scored one")
    add("--bos", default="auto", metavar="auto|yes|no", help="a BOS as the tokenizer does it (default), or not")
    add("--max-tokens", type=int, help="of each text, from its beginning")
    add("--batch-size", type=int, default=4, help="windows at once (%(default)s)")


def windows(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `evaluate`, `compare` and `rank`."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {args.batch_size}.")
    names = ("ctx", "stride", "min_context", "bos", "max_tokens", "batch_size")
    return {name: getattr(args, name) for name in names} | {"options": Options(backend=args.backend)}


@contextlib.contextmanager
def extras() -> Iterator[None]:
    """Say which extra is missing, in the place of an ImportError. What the libraries print goes to standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ImportError as error:
        if (error.name or "").startswith("fused_ppl"):
            raise
        raise ValueError(f"{MISSING}{error.name or error}.") from error


def model(args: argparse.Namespace, name: str, gguf: str | None = None) -> tuple[HiddenModel, Any]:
    """The model and its tokenizer, loaded without the chatter of the libraries."""
    from fused_ppl.evaluation import load

    if not Path(name).exists() and (("/" in name and name.count("/") != 1) or name.startswith((".", "/", "~"))):
        raise ValueError(f"The model {name!r} must be a folder, or a name of the Hub such as org/name; there is none.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings(), extras():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as transformers_logging

        quiet: Callable[[], None] = transformers_logging.disable_progress_bar
        quiet()
        return load(name, gguf=gguf, dtype=args.dtype, device=args.device)


def texts(args: argparse.Namespace) -> Callable[[], Iterable[Document]]:
    """A function that reads the texts; standard input is read once and kept."""
    from fused_ppl.evaluation import read_texts

    how = {"field": args.field, "domain_field": args.domain_field, "errors": args.errors}
    kept: list[Document] | None = list(read_texts(args.text, **how)) if "-" in args.text else None
    return lambda: read_texts(args.text, **how) if kept is None else kept


def size(paths: Iterable[str]) -> int | None:
    """Bytes of the texts, or None where they are not known before they are read."""
    total = 0
    for name in paths:
        path = Path(name)
        if path.suffix in (".jsonl", ".parquet") or not path.is_file():
            return None
        total += path.stat().st_size
    return total


@contextlib.contextmanager
def bar(args: argparse.Namespace, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on standard error with the time that is left, for a person who waits; nothing elsewhere."""
    with extras():
        from tqdm import tqdm
    shown = sys.stderr.isatty()
    with tqdm(total=size(args.text), desc=what, unit="B", unit_scale=True, leave=False, disable=not shown) as made:
        yield lambda num_bytes: made.update(num_bytes) and None
