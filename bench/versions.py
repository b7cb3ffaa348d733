# SPDX-License-Identifier: Apache-2.0
"""The kernels under every minor version of Triton that is supported, each in a fresh virtual environment.

    python bench/versions.py [--versions 3.7.0 3.9.0] [--keep DIR]        prints a Markdown table; 1 if any fails

The oldest and the newest run the tests of the kernels in Triton's interpreter; all of them, the last release of every
minor version, compile the kernels ahead of time for every target and hold them to bench/budgets.py. The oldest is the
floor in pyproject.toml; what the registry has is asked of pip. torch is the version of .ci/constraints.txt.
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
        wanted = [pinned("torch"), *map(pinned, NEEDED)]
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *wanted], check=True)
        # afterwards and by itself: a GPU build of torch asks for the one Triton that it was built with
        subprocess.run([*pip, "--no-deps", f"triton=={version}"], check=True)
    return python


def passes(python: Path, arguments: list[str], **env: str) -> tuple[bool, str, float]:
    """Whether a command succeeds, the last line that it prints, and its seconds."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTHON"))}
    start = time.perf_counter()
    done = subprocess.run(
        [str(python), *arguments],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return done.returncode == 0, lines[-1].strip("= "), time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", metavar="VERSION", help="these; the first and the last run the tests")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the environments there, and use those that are")
    args = parser.parse_args()
    versions = args.versions or chosen(available(), floor())
    tests = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_kernels*.py"))]
    failed = 0
    print("| triton | compiled ahead of time, held to the budgets | tests of the kernels | s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for version in versions:
            python = make_environment((args.keep or Path(scratch)) / f"triton-{version}", version)
            results = [passes(python, ["bench/budgets.py", "--check"])]
            cells = ["all targets" if results[0][0] else f"FAILED: {results[0][1]}"]
            if version in (versions[0], versions[-1]):
                command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_launch.py", *tests]
                results.append(passes(python, command, TRITON_INTERPRET="1"))
                cells.append(results[1][1])
            else:
                cells.append("not run")
            failed += not all(ok for ok, _, _ in results)
            seconds = sum(s for _, _, s in results)
            print(f"| {version} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
