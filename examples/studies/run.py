# SPDX-License-Identifier: Apache-2.0
"""Runs the studies of perplexity as a loss, and prints their tables.

    python examples/studies/run.py                       all of them, from where they were; hours on two cores
    python examples/studies/run.py learning_rate         one of them
    python examples/studies/run.py --quick --out quick  a few minutes each, to see that they run

Records and pictures go to examples/studies/results, and the tables into docs/studies.md, which says what was found.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from study import RESULTS, Study

NAMES = (
    *("learning_rate", "batch_size", "imbalance", "images", "policy_gradient", "transfer", "uncertainty", "stability"),
    *("sampling", "compact_head"),
)
PAGE = Path(__file__).parents[2] / "docs" / "studies.md"


def load(name: str) -> Study:
    study = importlib.import_module(name).STUDY
    assert isinstance(study, Study)
    return study


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table of one study replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, rest = page.split(start, 1)
    return f"{before}{start}\n\n{table}\n\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[*NAMES, []], help=f"of {', '.join(NAMES)}; all without a name")
    parser.add_argument("--quick", action="store_true", help="smaller, to see that it runs; gives no figure to publish")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    args = parser.parse_args()
    if args.quick and args.out == RESULTS:
        parser.error("--quick must not overwrite the full results: give another folder with --out.")
    for name in args.name or NAMES:
        study = load(name)
        table = study.finish(args.out, quick=args.quick)
        print(f"\n{study.question}\n\n{table}")
        if args.out == RESULTS:
            PAGE.write_text(with_table(PAGE.read_text(), name, table))


if __name__ == "__main__":
    main()
