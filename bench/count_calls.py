# SPDX-License-Identifier: Apache-2.0
"""How many functions of the package run in one forward call, and in how many files and lines they stand.

python bench/count_calls.py                      this checkout
python bench/count_calls.py --package PATH       another checkout

Every call is warm: it has run before, so that what is done once a process does not count. A function counts once,
however often it runs. Two functions of one name in one file count as one; lambdas and comprehensions are left out. The
lines of a file count whole, with its docstrings. The numbers depend on no time and on no other program.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM = 3  # calls before the one that counts: the compact plan learns from them
N, V, D = 8, 50, 16  # one chunk: more tokens run the same functions more often

Function = tuple[str, str]  # path of the file, name


@dataclass(frozen=True)
class Count:
    """What one call ran: how often each function of the package was called."""

    name: str
    calls: dict[Function, int]

    @property
    def functions(self) -> int:
        return len(self.calls)

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.calls}

    @property
    def lines(self) -> int:
        return sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in self.files)


def functions_of(call: Callable[[], object], folders: list[Path]) -> dict[Function, int]:
    """Count the calls of functions whose files lie in these folders, during a warm call."""
    for _ in range(WARM):
        call()
    prefixes = tuple(f"{folder}{os.sep}" for folder in folders)
    found: collections.Counter[Function] = collections.Counter()

    def see(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and not code.co_name.startswith("<") and code.co_filename.startswith(prefixes):
            found[code.co_filename, code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(before)
    return dict(found)


def package_folders() -> list[Path]:
    """The folder of the imported package, and the folder that its symlink `kernels` points to."""
    import fused_ppl

    folder = Path(fused_ppl.__file__).absolute().parent
    return [folder, (folder / "kernels").resolve()]


def cases(backend: str) -> dict[str, Callable[[], object]]:
    """The calls to count: all of their inputs require a gradient."""
    import torch

    import fused_ppl
    from fused_ppl import Options

    generator = torch.Generator().manual_seed(0)
    logits, hidden, weight = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((N, V), (N, D), (V, D))
    )
    target = torch.randint(V, (N,), generator=generator)

    named = None if backend == "torch" else backend  # this one is the default of a CPU, as users call it
    default = None if named is None else Options(backend=named)

    def head(**options: Any) -> Callable[[], object]:
        made = Options(backend=named, **options)
        return lambda: fused_ppl.linear_perplexity(hidden, weight, target, options=made)

    return {
        "logits": lambda: fused_ppl.perplexity(logits, target, options=default),
        "head, rows": lambda: fused_ppl.linear_perplexity(hidden, weight, target, options=default),
        "head, vocab": head(memory_budget=1),
        "head, compact, columns": head(gradient_columns=V // 4),
        "head, compact, tolerance": head(gradient_tolerance=0.3),
        "head, compact, screen": head(gradient_columns=V // 4, screen="bf16"),
    }


def count(backend: str = "torch") -> list[Count]:
    folders = package_folders()
    return [Count(name, functions_of(call, folders)) for name, call in cases(backend).items()]


def table(counts: list[Count]) -> str:
    heads = f"{'forward call':26} {'functions':>9} {'calls':>6} {'files':>6} {'lines':>6}"
    rows = [f"{c.name:26} {c.functions:9} {sum(c.calls.values()):6} {len(c.files):6} {c.lines:6,}" for c in counts]
    return "\n".join([heads, *rows])


def listing(counts: list[Count]) -> str:
    """Every function with the number of its calls, by file."""
    lines = []
    for c in counts:
        lines.append(f"\n{c.name}")
        lines += [f"  {calls:5} {Path(file).name}: {name}" for (file, name), calls in sorted(c.calls.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, metavar="PATH", help="a checkout to count in place of this one")
    parser.add_argument("--backend", choices=("torch", "triton"), default="torch", help="triton is interpreted")
    parser.add_argument("--list", action="store_true", help="name every function")
    args = parser.parse_args()
    package = (args.package or ROOT).resolve()
    for name in ("FUSED_PPL_BACKEND", "FUSED_PPL_DEBUG", "TRITON_INTERPRET"):
        os.environ.pop(name, None)
    if args.backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(package))  # before an installed package of this name; nothing has imported it yet
    counts = count(args.backend)
    print(f"{package}\n{table(counts)}")
    if args.list:
        print(listing(counts))


if __name__ == "__main__":
    main()
