# SPDX-License-Identifier: Apache-2.0
"""Everything that wants a GPU, in one command for the day there is one.

    python bench/gpu_acceptance.py              checks, then times; writes JSON, Markdown and a PNG to bench/results/
    python bench/gpu_acceptance.py --dry-run    the same code on tiny shapes in Triton's interpreter; no result is kept

Checks values and gradients at real sizes against float64, CUDA graphs, streams, determinism, memory, and that nothing
waits for the device; then times the kernels against the roofline and the losses against the peers that are installed.
A check that fails is reported and the others still run.

Exit codes: 0, all checks hold; 1, some do not; 3, there is no GPU: NOT MEASURED, and nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_checks import Check, Sizes
    from gpu_device import Card, StandIn
    from gpu_times import Timing

NO_GPU = 3
RESULTS = Path(__file__).parent / "results"


def run_checks(checks: Iterable[Check], card: Card | StandIn) -> list[dict[str, Any]]:
    """Every check's name, "ok", "failed" or "skipped", what it found or why, and its seconds."""
    from gpu_device import Skipped

    results = []
    for check in checks:
        start, status = time.perf_counter(), "ok"
        try:
            detail = check.run() or ""
            card.synchronize()
        except Skipped as why:
            status, detail = "skipped", str(why)
        except Exception as error:
            status, detail = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"--- {check.name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start
        results.append({"name": check.name, "status": status, "detail": detail, "seconds": seconds})
        print(f"{status:8}{check.name}: {detail}", flush=True)
        gc.collect()
        card.release()
    return results


def run_timings(card: Card | StandIn, sizes: Sizes, record: dict[str, Any]) -> list[Timing]:
    import gpu_times

    limit = gpu_times.roofline(card)
    record |= {"roofline": limit.source, "copy_bandwidth": card.copy_bandwidth()}
    timings: list[Timing] = []
    for found in (
        gpu_times.kernel_timings(card, sizes, limit),
        gpu_times.logits_timings(card, sizes, limit),
        gpu_times.head_timings(card, sizes),
    ):
        for timing in found:
            timings.append(timing)
            ms = "" if timing.milliseconds is None else f"{timing.milliseconds[1]:.3f} ms"
            print(
                f"time    {timing.group}: {timing.provider} {timing.mode} {timing.shape} {ms}{timing.note}", flush=True
            )
        gc.collect()
        card.release()
    return timings


def describe(card: Card | StandIn) -> dict[str, Any]:
    import torch
    import triton

    import fused_ppl

    return {
        "command": "python bench/gpu_acceptance.py" + " --dry-run" * card.stand_in,
        "card": card.describe(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fused_ppl": fused_ppl.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--only", metavar="WORD", help="only the checks whose name contains it; nothing is timed")
    parser.add_argument("--list", action="store_true", help="print the names of the checks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    args = parser.parse_args()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

    import torch
    from gpu_checks import DRY, REAL, all_checks
    from gpu_device import Card, StandIn

    if not args.dry_run and not args.list and not torch.cuda.is_available():
        print("NOT MEASURED: torch sees no GPU here. --dry-run runs the plumbing without one; no result was written.")
        return NO_GPU
    stand_in = args.dry_run or not torch.cuda.is_available()
    card, sizes = StandIn() if stand_in else Card(), DRY if args.dry_run else REAL
    checks = [c for c in all_checks(card, sizes) if args.only is None or args.only in c.name]
    if args.list:
        print(*(c.name for c in checks), sep="\n")
        return 0
    record = describe(card)
    print(f"{record['card']['name']}, torch {record['torch']}, triton {record['triton']}: {len(checks)} checks")
    record["checks"] = run_checks(checks, card)
    if args.only is None:
        finish(record, run_timings(card, sizes, record), args)
    failed = [c["name"] for c in record["checks"] if c["status"] == "failed"]
    print(f"{len(failed)} of {len(checks)} checks failed" + "".join(f"\n  {name}" for name in failed))
    return 1 if failed else 0


def finish(record: dict[str, Any], timings: list[Timing], args: argparse.Namespace) -> None:
    """The report; that of a dry run is made and thrown away, because its numbers mean nothing."""
    import gpu_report

    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            made = gpu_report.write(Path(folder), "dry_run", record, timings)
            print(f"DRY RUN, NOT MEASURED: made {', '.join(p.name for p in made)}, and kept none.")
        return
    name = "gpu_" + re.sub(r"[^a-z0-9]+", "_", record["card"]["name"].lower()).strip("_")
    for path in gpu_report.write(args.out, name, record, timings):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
