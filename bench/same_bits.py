# SPDX-License-Identifier: Apache-2.0
"""Do two checkouts compute the same bits? Values and gradients over options, dtypes, plans and backends.

python bench/same_bits.py BASE                   this checkout against another one, in some minutes
python bench/same_bits.py BASE HEAD              two others
python bench/same_bits.py BASE --only "head, vocab" --list --out FOLDER

Each checkout computes the grid of bench/bits_grid.py in processes of its own, one for each backend; Triton is
interpreted. Equal means that the SHA-256 of all bytes is equal. What differs is grouped by the option that explains
most of it. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
GRID = HERE / "bits_grid.py"
Results = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Difference:
    case: str  # backend | dtype | plan | options
    result: str
    relative: float  # the largest difference over the largest value; inf where shapes, NaN or infinities differ

    @property
    def options(self) -> list[str]:
        return self.case.split(" | ")[3].split(", ")


def compute(checkout: Path, folder: Path, backend: str, more: list[str]) -> subprocess.Popen[bytes]:
    """Start the process that computes the grid of one checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    for name in ("FUSED_PPL_BACKEND", "FUSED_PPL_DEBUG", "TRITON_INTERPRET"):
        env.pop(name, None)
    if backend == "triton":
        env["TRITON_INTERPRET"] = "1"
    return subprocess.Popen([sys.executable, str(GRID), backend, str(folder / f"{backend}.pt"), *more], env=env)


def results_of(checkouts: list[Path], folder: Path, backends: list[str], more: list[str]) -> list[Results]:
    """Every result of each checkout by the name of its case. The checkouts run side by side."""
    found: list[Results] = [{} for _ in checkouts]
    for backend in backends:
        folders = [folder / name for name in ("base", "head")]
        started = [compute(*pair, backend, more) for pair in zip(checkouts, folders, strict=True)]
        ended = [process.wait() for process in started]
        for checkout, kept, code, results in zip(checkouts, folders, ended, found, strict=True):
            if code != 0:
                raise SystemExit(f"{checkout}: the cases of backend {backend} did not run to their end")
            whole = torch.load(kept / f"{backend}.pt")
            package = Path(whole["package"]).parent.parent
            if package != checkout:
                raise SystemExit(f"{checkout} was to be measured, but {package} was imported")
            results |= whole["results"]
    return found


def digest(t: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    head = f"{t.dtype} {tuple(t.shape)} ".encode()
    return hashlib.sha256(head + t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(results: Results) -> dict[str, dict[str, str]]:
    return {case: {name: digest(t) for name, t in of.items()} for case, of in results.items()}


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """The largest difference, relative to the largest finite value."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    a, b = a.double(), b.double()
    rest = a.isfinite()
    if not torch.equal(rest, b.isfinite()) or not torch.equal(a[~rest].nan_to_num(), b[~rest].nan_to_num()):
        return float("inf")
    largest = b[rest].abs().amax().item() if rest.any() else 0.0
    return (a - b)[rest].abs().amax().item() / max(largest, 1e-300) if rest.any() else 0.0


def differences(base: Results, head: Results) -> list[Difference]:
    """Every result of either checkout whose bits the other one does not have."""
    of_base, of_head = digests(base), digests(head)
    found = []
    for case in base | head:
        if case not in base or case not in head:
            which = "base" if case in head else "head"
            found.append(Difference(case, f"not computed by the {which}", float("inf")))
            continue
        a, b = of_base[case], of_head[case]
        for name in a | b:
            if a.get(name) != b.get(name):
                size = distance(base[case].get(name), head[case].get(name))
                found.append(Difference(case, name, size))
    return found


def grouped(found: list[Difference]) -> list[tuple[str, list[Difference]]]:
    """By option: the one of most cases first, then the one of most of the remaining cases."""
    rest, groups = found, []
    while rest:
        alone = {d.options[0] for d in rest if len(d.options) == 1}
        votes = collections.Counter(o for d in rest for o in d.options if not alone or o in alone)
        option = "" if "" in alone else votes.most_common(1)[0][0]
        mine = [d for d in rest if option == "" or option in d.options]
        if option == "":  # no option at all: this plan and dtype differ whatever the options
            where = {d.case.rsplit(" | ", 1)[0] for d in rest if d.options == [""]}
            mine = [d for d in rest if d.case.rsplit(" | ", 1)[0] in where]
        groups.append((option or "(no option)", mine))
        rest = [d for d in rest if d not in set(mine)]
    return groups


def report(found: list[Difference], number: int, every: bool) -> str:
    lines = [f"{number} cases, {len({d.case for d in found})} of them with other bits"]
    for option, mine in grouped(found):
        cases = {d.case: None for d in mine}
        lines.append(f"\n{option}: {len(cases)} cases")
        for part, name in enumerate(("backends", "dtypes", "plans")):
            counts = collections.Counter(case.split(" | ")[part] for case in cases)
            lines.append(f"  {name}: " + "; ".join(f"{k} {n}" for k, n in counts.items()))
        worst: dict[str, float] = {}
        for d in mine:
            worst[d.result] = max(worst.get(d.result, 0.0), d.relative)
        lines.append("  results: " + "; ".join(f"{k} {v:.0e}" for k, v in worst.items()))
        shown = list(cases) if every else list(cases)[:3]
        lines += [f"    {case}" for case in shown]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a checkout")
    parser.add_argument("head", type=Path, nargs="?", default=HERE.parent, help="another one; this one if left out")
    parser.add_argument("--backend", choices=("torch", "triton"), action="append")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose names contain these words")
    parser.add_argument("--thorough", action="store_true", help="on triton, too, pairs in every dtype and plan")
    parser.add_argument("--list", action="store_true", help="name every case that differs")
    parser.add_argument("--out", type=Path, help="keep the results, and their digests as JSON, in this folder")
    args = parser.parse_args()
    more = [*(["--thorough"] if args.thorough else []), "--only", args.only]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        checkouts = [checkout.resolve() for checkout in (args.base, args.head)]
        base, head = results_of(checkouts, folder, args.backend or ["torch", "triton"], more)
        if args.out:
            for name, results in (("base", base), ("head", head)):
                (folder / f"{name}.json").write_text(json.dumps(digests(results), indent=0))
    if not base:
        raise SystemExit(f"No case has {args.only!r} in its name.")
    found = differences(base, head)
    print(report(found, len(base | head), args.list))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
