# SPDX-License-Identifier: Apache-2.0
"""The kernels under every minor version of Triton that is supported, each in a fresh virtual environment.

    python bench/versions.py [--versions 3.7.0 3.9.0] [--keep DIR]        prints a Markdown table; 1 if any fails
    python bench/versions.py --compile                                    the compile check alone, of the Triton here

All of them, the last release of every minor version, compile every kernel ahead of time for every dtype and target; the
oldest and the newest also run the tests of the kernels in Triton's interpreter. No version may cost spills, barriers in
the hot loop, or 16-byte loads; instructions are shown, and held to budgets only where bench/budgets.py was measured.
The oldest is the floor in pyproject.toml; what the registry has is asked of pip. torch is that of .ci/constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("numpy", "pytest", "hypothesis", "setuptools")
TAIL = 40  # lines shown of a command that fails


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def floor() -> tuple[int, ...]:
    """The oldest that pyproject.toml allows."""
    found = re.search(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    if found is None:
        raise RuntimeError('pyproject.toml must state the oldest Triton as "triton>=X.Y"; it does not.')
    return number(found[1])


def available() -> list[str]:
    """The releases of Triton that pip can install here."""
    command = [sys.executable, "-m", "pip", "index", "versions", "triton"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"^Available versions: (.*)$", done.stdout, re.M)
    if found is None:
        raise RuntimeError(f"pip must list the versions of triton; got {done.stdout + done.stderr!r}. Use --versions.")
    return [v for v in found[1].split(", ") if re.fullmatch(r"\d+(\.\d+)+", v)]


def chosen(versions: list[str], oldest: tuple[int, ...]) -> list[str]:
    """The oldest supported, and the last release of every minor version from there on, in order."""
    supported = sorted((v for v in versions if number(v)[: len(oldest)] >= oldest), key=number)
    if not supported:
        raise RuntimeError(f"a Triton of {'.'.join(map(str, oldest))} or newer is needed; there is {versions}.")
    last = {number(v)[:2]: v for v in supported}
    return sorted({supported[0], *last.values()}, key=number)


def pinned(package: str) -> str:
    constraints = (ROOT / ".ci" / "constraints.txt").read_text()
    found = re.search(rf"^{package}==\S+$", constraints, re.M)
    return found[0] if found else package


def make_environment(folder: Path, version: str) -> Path:
    """The interpreter of a virtual environment with this Triton."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--quiet"]
        subprocess.run([*pip, pinned("torch"), *map(pinned, NEEDED)], check=True)
        # afterwards and by itself: a GPU build of torch asks for the one Triton that it was built with
        subprocess.run([*pip, "--no-deps", f"triton=={version}"], check=True)
    return python


def compile_all() -> list[str]:
    """Compiles every kernel of bench/budgets.py; prints the instructions a logit on sm_90, returns broken promises."""
    import aot
    import budgets

    broken, shown = [], []
    for target in aot.TARGETS:
        for kernel in budgets.KERNELS:
            for dtype, name in budgets.NAMES.items():
                found = budgets.report(kernel, dtype, target=target)
                broken += [f"{target} {kernel} {name}: {text}" for text in budgets.broken_promises(found)]
                if (target, name) == ("sm_90", "bf16"):
                    counts = [f"{loop.per_logit(dtype.itemsize):.2f}" for loop in found.passes.values()]
                    shown.append(f"{kernel} {' + '.join(counts)}")
    print(", ".join(shown))
    return broken


def passes(python: Path, arguments: list[str], **env: str) -> tuple[bool, str, float]:
    """Whether a command succeeds, the last line that it prints, and its seconds."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTHON"))}
    start = time.perf_counter()
    done = subprocess.run(
        [str(python), *arguments],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        print("\n".join(lines[-TAIL:]), file=sys.stderr)
    return done.returncode == 0, lines[-1].strip("= "), time.perf_counter() - start


def check(python: Path, version: str, tests: bool) -> tuple[bool, str]:
    """Whether all holds under a version, and its row of the table."""
    results = [passes(python, ["bench/versions.py", "--compile"])]
    if tests:
        files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_kernels*.py"))]
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", "tests/test_launch.py", *files]
        results.append(passes(python, command, TRITON_INTERPRET="1"))
    cells = [text if ok else f"FAILED: {text}" for ok, text, _ in results] + ["not run"] * (not tests)
    row = f"| {version} | {' | '.join(cells)} | {sum(seconds for _, _, seconds in results):.0f} |"
    return all(ok for ok, _, _ in results), row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", metavar="VERSION", help="these; the first and the last run the tests")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the environments there, and use those that are")
    parser.add_argument("--compile", action="store_true", help="compile with the Triton that runs this, and no more")
    args = parser.parse_args()
    if args.compile:
        broken = compile_all()
        print(*broken, sep="\n", end="")
        return 1 if broken else 0
    versions = args.versions or chosen(available(), floor())
    print("| triton | instructions a logit, sm_90, bf16 | tests of the kernels | s |\n|---|---|---|---|", flush=True)
    holds = True
    with tempfile.TemporaryDirectory() as scratch:
        for version in versions:
            python = make_environment((args.keep or Path(scratch)) / f"triton-{version}", version)
            ok, row = check(python, version, version in (versions[0], versions[-1]))
            print(row, flush=True)
            holds &= ok
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
