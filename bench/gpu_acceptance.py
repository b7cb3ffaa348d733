# SPDX-License-Identifier: Apache-2.0
"""Everything that wants a GPU, in one command: checks, then times, in the order of their value.

    python bench/gpu_acceptance.py --minutes 8     JSON, Markdown and a PNG in bench/results/
    python bench/gpu_acceptance.py --dry-run       the same code on tiny shapes in Triton's interpreter; nothing is kept

The report is written anew after every step, so that a run that is killed leaves what it has found. `--resume` goes on
with such a report. A step that does not fit into the time is not begun, and is named. docs/gpu.md explains the report.

Exit codes: 0, all checks hold; 1, some do not; 3, there is no GPU: NOT MEASURED, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

NO_GPU = 3
RESULTS = Path(__file__).parent / "results"
CARD = "the card"
# the order in which groups run
GROUPS = ("card", "checks", "kernels", "logits", "head", "plans", "training", "rows", "more checks", "options",
          "dtypes", "more training", "logits, compiled", "head, compiled")  # fmt: skip
PATIENCE = 60.0  # seconds that a step may take beyond ten times its estimate


def all_steps(dry: bool) -> tuple[dict[str, Any], Any]:
    """Every step in the order in which they run, and the card that they run on."""
    import gpu_checks
    import gpu_times
    import gpu_tokens
    import gpu_training
    import torch
    from gpu_device import Card, StandIn
    from gpu_process import Step

    stand_in = dry or not torch.cuda.is_available()
    card, sizes = StandIn() if stand_in else Card(), gpu_checks.DRY if dry else gpu_checks.REAL
    steps = [
        Step(CARD, "card", 3, lambda: describe(card)),
        *gpu_checks.check_steps(card, sizes),
        *gpu_times.kernel_steps(card, sizes),
        *gpu_times.loss_steps(card, sizes),
        *gpu_times.variant_steps(card, sizes),
        *gpu_tokens.token_steps(card, sizes),
        *gpu_training.training_steps(card, dry),
    ]
    steps.sort(key=lambda step: GROUPS.index(step.group))
    return {step.key: step for step in steps}, card


def describe(card: Any) -> Any:
    from gpu_process import Found

    found = {**card.describe(), "copy_bandwidth": card.copy_bandwidth()}
    return Found(f"a copy of 1 GiB reaches {found['copy_bandwidth'] / 1e12:.3f} TB/s", [{"group": "card", **found}])


# --- the parent --------------------------------------------------------------------------------------------------


class Run:
    """The steps that are left, the time that is left, and the report of what has been found."""

    def __init__(self, record: dict[str, Any], write: Any, seconds: float) -> None:
        self.record, self.write, self.seconds = record, write, seconds
        self.start = time.perf_counter()
        self.before = record["seconds"]

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)

    def go(self, steps: Iterable[Any], worker: Any) -> None:
        for step in steps:
            if step.key in self.record["results"]:
                continue
            if step.seconds > self.left:
                self.record["left_out"].append(step.key)
                self._save()
                continue
            result = worker.run(step.key, min(10 * step.seconds + PATIENCE, max(self.left, step.seconds)))
            self.record["results"][step.key] = asdict(result)
            if step.group == "card" and result.rows:
                self.record["card"] |= result.rows[0]
            print(f"{result.status:8}{step.key}: {result.detail} ({result.seconds:.1f} s)", flush=True)
            self._save()

    def _save(self) -> None:
        self.record["seconds"] = self.before + time.perf_counter() - self.start
        self.write(self.record)


def new_record(card: Any, arguments: Sequence[str]) -> dict[str, Any]:
    import torch
    import triton
    from record import commit

    import fused_ppl

    return {
        "command": " ".join(["python bench/gpu_acceptance.py", *arguments]),
        "card": {"name": card.name},
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fused_ppl": fused_ppl.__version__,
        "commit": commit(),
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        "seconds": 0.0,
        "results": {},
        "left_out": [],
    }


def resumed(path: Path) -> dict[str, Any]:
    """An earlier report. What did not fit then is tried now; what failed is not."""
    record: dict[str, Any] = json.loads(path.read_text())
    return {**record, "left_out": []}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="the whole run takes no longer (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="go on with this report")
    parser.add_argument("--only", metavar="WORD", help="only the steps whose name contains it")
    parser.add_argument("--list", action="store_true", help="print the steps with their estimates, and run none")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--sweep", action="store_true", help="times launch configurations around ours instead")
    parser.add_argument("--profile", action="store_true", help="runs ncu over one call of each kernel instead")
    parser.add_argument("--sanitize", action="store_true", help="runs compute-sanitizer over small calls instead")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # the child process
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        import interpreter

        interpreter.round_once()
    import torch

    there = torch.cuda.is_available()
    if not (args.dry_run or args.list or there):
        print("NOT MEASURED: torch sees no GPU here. --dry-run runs the plumbing without one; no result was written.")
        return NO_GPU
    if args.sweep or args.profile or args.sanitize:
        import gpu_tools

        return gpu_tools.run(args)
    steps, card = all_steps(args.dry_run)
    if args.serve:
        from gpu_process import serve

        serve(steps, card)
        return 0
    chosen = [s for s in steps.values() if args.only is None or args.only in s.key or s.key == CARD]
    if args.list:
        print_list(chosen)
        return 0
    return run(args, chosen, card)


def print_list(steps: Sequence[Any]) -> None:
    for group in GROUPS:
        some = [step for step in steps if step.group == group]
        if some:
            print(f"{group}: {len(some)} steps, {sum(s.seconds for s in some):.0f} s estimated")
            print(*(f"  {step.key}" for step in some), sep="\n")
    print(f"{len(steps)} steps, {sum(s.seconds for s in steps):.0f} s estimated for an H100")


def run(args: argparse.Namespace, steps: Sequence[Any], card: Any, command: list[str] | None = None) -> int:
    """The parent: sends steps to a child process, and writes the report after each."""
    import gpu_report
    from gpu_process import Worker

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the report holds what was found"))
    record = new_record(card, sys.argv[1:]) if args.resume is None else resumed(args.resume)
    name = "gpu_" + re.sub(r"[^a-z0-9]+", "_", card.name.lower()).strip("_")
    command = command or [sys.executable, __file__, "--serve", *["--dry-run"] * args.dry_run]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.dry_run else args.out
        worker = Worker(command)
        try:
            Run(record, lambda r: gpu_report.write(folder, name, r), args.minutes * 60).go(steps, worker)
        finally:
            worker.stop()
        made = gpu_report.write(folder, name, record)
        try:
            gpu_report.picture(folder / f"{name}.png", record)
            made.append(folder / f"{name}.png")
        except ImportError as error:
            print(f"No picture: {error} (pip install matplotlib).")
        names = ", ".join(str(path.name if args.dry_run else path) for path in made)
        print(f"DRY RUN, NOT MEASURED: made {names}, and kept none." if args.dry_run else f"wrote {names}")
    return verdict(record, steps)


def verdict(record: dict[str, Any], steps: Sequence[Any]) -> int:
    results = record["results"]
    failed = [s.key for s in steps if s.key in results and results[s.key]["status"] == "failed"]
    ours = [s.key for s in steps if s.key in failed and s.ours]
    left_out = len(record["left_out"])
    print(f"{len(failed)} of {len(results)} steps failed, {len(ours)} of them ours; {left_out} did not fit")
    print(*(f"  {key}" for key in failed), sep="\n")
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
