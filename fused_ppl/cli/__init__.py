# SPDX-License-Identifier: Apache-2.0
"""The command line, `fused-ppl` or `python -m fused_ppl.cli`. `doctor` needs torch and numpy only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fused_ppl
from fused_ppl.cli import compare, doctor, evaluate, rank


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 if all is good, 1 if a number is wrong, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="fused-ppl", description=fused_ppl.__doc__)
    parser.add_argument("--version", action="version", version=f"fused_ppl {fused_ppl.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor.add_parser(commands)
    evaluate.add_parser(commands)
    compare.add_parser(commands)
    rank.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
