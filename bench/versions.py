# SPDX-License-Identifier: Apache-2.0
"""The project under every version of torch that is supported, with the Triton that it brings.

    python bench/versions.py [--torch 2.7.1 2.15.0] [--keep DIR] [--out FILE]    a Markdown table; 1 if any fails
    python bench/versions.py --compile                          the compile check alone, of the Triton that runs this

For each version a fresh virtual environment, one after another: every kernel is compiled ahead of time for every dtype
and target, the tests of the kernels run in Triton's interpreter, and the fast tests run on the CPU. Most of these are
CUDA builds of some GB, which run on a CPU. A version that cannot be installed is named with the reason, and fails
nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAIL = 40  # lines shown of a command that fails
NEEDED = ("hypothesis", "matplotlib", "psutil", "pytest", "pytest-benchmark", "pytest-xdist", "rich",
          "setuptools>=68", "tokenizers", "tqdm", "wheel")  # fmt: skip
KERNEL_TESTS = ("tests/test_launch.py", "tests/test_kernels.py", "tests/test_kernels_head.py")
HEADER = "| torch | triton | instructions a logit, sm_90, bf16 | tests of the kernels | fast tests | s |"


@dataclass(frozen=True)
class Pair:
    torch: str
    triton: str
    compiles: bool = True  # False: older than the kernels need, and refused

    @property
    def numpy(self) -> str:
        """The interpreter before Triton 3.7 does not run with numpy 2.4."""
        return "numpy" if number(self.triton) >= (3, 7) else "numpy<2.4"


PAIRS = (
    Pair("2.6.0", "3.2.0", compiles=False),
    Pair("2.7.1", "3.3.1"),
    Pair("2.8.0", "3.4.0"),
    Pair("2.9.1", "3.5.1"),
    Pair("2.11.0", "3.6.0"),
    Pair("2.12.1", "3.7.1"),
    Pair("2.14.1", "3.8.0"),
    Pair("2.15.0", "3.9.0"),
)


class NotInstallable(Exception):
    """The registry, or this machine, has no such version; and what pip said."""


@dataclass(frozen=True)
class Found:
    """What a command ended with."""

    ok: bool
    text: str  # the last line
    seconds: float


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split("."))


def make_environment(folder: Path, pair: Pair) -> Path:
    """The interpreter of a virtual environment with this torch and Triton, and the project in it."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--quiet"]
        # Triton by itself: a torch asks for the one that it was built with
        for what in ((f"torch=={pair.torch}", pair.numpy, *NEEDED), ("--no-deps", f"triton=={pair.triton}")):
            done = subprocess.run([*pip, *what], capture_output=True, text=True, check=False)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                raise NotInstallable(" ".join(said) or "pip failed without a word")
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True)
    return python


def compile_all() -> list[str]:
    """Compiles every kernel of bench/budgets.py; prints the instructions a logit on sm_90, returns broken promises."""
    import aot
    import budgets

    broken, shown = [], []
    for target in aot.TARGETS:
        for kernel in budgets.KERNELS:
            for dtype, name in budgets.NAMES.items():
                try:
                    found = budgets.report(kernel, dtype, target=target)
                except Exception as error:
                    if target not in ("sm_80", "sm_90"):  # a GPU newer than this Triton
                        continue
                    broken.append(f"{target} {kernel} {name}: {type(error).__name__}: {error}")
                    continue
                broken += [f"{target} {kernel} {name}: {text}" for text in budgets.broken_promises(found)]
                if (target, name) == ("sm_90", "bf16"):
                    counts = [f"{loop.per_logit(dtype.itemsize):.2f}" for loop in found.passes.values()]
                    shown.append(f"{kernel} {' + '.join(counts)}")
    print(", ".join(shown))
    return broken


def run(python: Path, arguments: list[str], **env: str) -> Found:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTHON"))}
    start = time.perf_counter()
    done = subprocess.run(
        [str(python), *arguments],
        cwd=ROOT,
        env={**kept, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        print("\n".join(failures or lines[-TAIL:]), file=sys.stderr, flush=True)
    return Found(done.returncode == 0, lines[-1].strip("= "), time.perf_counter() - start)


def check(python: Path, pair: Pair) -> tuple[bool, str]:
    """Whether all holds under a pair of versions, and its row of the table."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", "--numprocesses", "2"]
    found = []
    if pair.compiles:
        found.append(run(python, ["bench/versions.py", "--compile"]))
        found.append(run(python, [*pytest, *KERNEL_TESTS], TRITON_INTERPRET="1"))
    found.append(run(python, [*pytest, "tests"]))
    cells = [f.text if f.ok else f"FAILED: {f.text}" for f in found]
    if not pair.compiles:
        cells = ["refused", "refused", *cells]
    row = f"| {pair.torch} | {pair.triton} | {' | '.join(cells)} | {sum(f.seconds for f in found):.0f} |"
    return all(f.ok for f in found), row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", metavar="VERSION", choices=[p.torch for p in PAIRS], help="only these")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the environments there, and use those that are")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--compile", action="store_true", help="compile with the Triton that runs this, and no more")
    args = parser.parse_args()
    if args.compile:
        broken = compile_all()
        print(*broken, sep="\n", end="")
        return 1 if broken else 0
    table, holds = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)], True
    print(*table, sep="\n", flush=True)
    for pair in PAIRS:
        if args.torch is not None and pair.torch not in args.torch:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                python = make_environment((args.keep or Path(scratch)) / f"torch-{pair.torch}", pair)
            except NotInstallable as why:
                ok, row = True, f"| {pair.torch} | {pair.triton} | not installed: {why} | | | |"
            else:
                ok, row = check(python, pair)
        table.append(row)
        holds &= ok
        print(row, flush=True)
        if args.out is not None:
            args.out.write_text("\n".join(table) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
