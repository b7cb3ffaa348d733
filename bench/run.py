# SPDX-License-Identifier: Apache-2.0
"""Every way to compute this loss, on this machine: time, memory and error side by side.

    python bench/run.py                                     what five minutes on two cores show: table and plots
    python bench/run.py --case all                          every case that suits the device
    python bench/run.py --op linear --case llama3-8b --provider fused_ppl torch.compile --dtype bf16 --device cuda
    python bench/run.py --op linear --shape 4096 128256 512 --mode memory
    python bench/run.py --record                            the committed results: bench/results/, README.md and docs/

A provider is first compared with float64, value and every gradient, and a wrong one gets no time. Times are of
interleaved rounds over inputs that take turns; peak memory is that of a fresh process, above inputs and gradients.
JSON, CSV, Markdown and PNG are written to --out as they come, so that a run can be stopped at any time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import report
import scaling
import torch
from cases import CASES, CPU_CASES, DTYPES, GPU_CASES, KINDS, OBJECTIVES, OPS, Case, Setting
from compare import Comparison, How
from measure import MODES
from providers import Provider, all_providers
from record import Record, machine

RESULTS = Path(__file__).parent / "results"
QUICK = ("gpt2-cpu",)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--op", choices=OPS, nargs="+", default=list(OPS), help="from logits, through an LM head, or both (default)")
    add("--mode", choices=[*MODES, "memory"], nargs="+", default=["both", "memory"], help="default: both memory")
    add("--case", nargs="+", metavar="NAME", help=f"all, or of {', '.join(CASES)}")
    add("--shape", type=int, nargs=3, metavar=("N", "V", "D"), help="a case of your own, in the place of --case")
    add("--softcap", type=float, help="of --shape")
    add("--provider", nargs="+", metavar="WORD", help="only those whose name has one of these words; fused_ppl stays")
    add("--objective", choices=OBJECTIVES, default="perplexity")
    add("--dtype", choices=DTYPES, nargs="+", help="default: bf16 fp32")
    add("--inputs", choices=KINDS, nargs="+", default=list(KINDS), help="default: random peaked")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=1.0, help="of each timing (%(default)s)")
    add("--rounds", type=int, help="in the place of --seconds")
    add(
        "--patience",
        type=float,
        default=3.0,
        help="seconds of a call beyond which a provider is left out (%(default)s)",
    )
    add("--points", type=int, help="of the sweeps over N, V and D (default: 3, and none for chosen cases)")
    add("--threads", type=int, help="of the CPU; default: what torch takes")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
    add("--name", default="bench", help="of the files there (%(default)s)")
    add("--record", action="store_true", help="all cases into bench/results/, and the tables of README.md and docs/")
    add("--list", action="store_true", help="print cases and providers, and what is missing here")
    return made


def settings_of(args: argparse.Namespace) -> list[Setting]:
    names = args.case or (QUICK if args.device == "cpu" else GPU_CASES)
    if list(names) == ["all"]:
        names = CPU_CASES if args.device == "cpu" else GPU_CASES
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"No case is called {', '.join(unknown)}. There are: all, {', '.join(CASES)}.")
    cases = [CASES[name] for name in names]
    if args.shape:
        cases = [Case("own shape", *args.shape, args.softcap)]
    dtypes = args.dtype or ["bf16", "fp32"]
    return [
        Setting(op, case, dtype, objective=args.objective, device=args.device)
        for op in args.op
        for case in cases
        for dtype in dtypes
    ]


def providers_of(args: argparse.Namespace) -> list[Provider]:
    found = all_providers()
    if args.provider:
        found = [p for p in found if p.name == "fused_ppl" or any(word in p.name for word in args.provider)]
    return found


def show_choices(args: argparse.Namespace) -> None:
    for case in CASES.values():
        cap = "" if case.softcap is None else f", softcap {case.softcap:g}"
        print(f"{case.name:16} N = {case.num_tokens}, V = {case.num_classes}, D = {case.hidden_size}{cap}")
    setting = Setting("linear", CASES["smoke"], "bf16", device=args.device)
    for provider in all_providers():
        print(f"{provider.name:34} {' '.join(provider.ops):14} {provider.refusal(setting) or ''}")


def run(args: argparse.Namespace, keep: Callable[[], None], record: Record) -> None:
    """Every comparison, with a bar; `keep` is called after each."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    how = How(tuple(args.mode), tuple(args.inputs), args.seconds, args.rounds, args.patience)
    settings, providers = settings_of(args), providers_of(args)
    columns = (TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task("", total=len(settings))
        for done, setting in enumerate(settings):
            progress.update(bar, description=f"{setting.op} {setting.case.name} {setting.dtype}", completed=done)
            comparison = Comparison(setting, providers, how, lambda share: progress.advance(bar, share))
            for row in comparison.rows():
                record.rows.append(row)
            keep()
            for line in report.brief(record.rows, setting):
                progress.console.print(line, highlight=False)
        progress.update(bar, completed=len(settings), description="done")


def main() -> int:
    args = parser().parse_args()
    if args.list:
        show_choices(args)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.record:
        args.case, args.out, args.name = args.case or ["all"], RESULTS, "cpu" if args.device == "cpu" else "gpu"
        args.points, args.patience = 7, 2 * args.patience
    elif args.points is None:
        args.points = 0 if args.case or args.shape or args.op != list(OPS) else 3
    command = " ".join(["python bench/run.py", *sys.argv[1:]])
    settings = {"objective": args.objective, "seconds": args.seconds, "rounds": args.rounds, "inputs": args.inputs}
    record = Record(command, machine(args.device), settings)
    begin = time.perf_counter()

    def keep() -> None:
        record.settings["minutes"] = round((time.perf_counter() - begin) / 60, 1)
        record.save(args.out, args.name)

    try:
        run(args, keep, record)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept", file=sys.stderr)
    report.show(record)
    made = report.write(record, args.out, args.name)
    if args.points:
        axes = tuple(scaling.CENTRE) if args.record else ("N", "V")
        how = scaling.Sweep((args.dtype or ["fp32"])[0], args.device, axes, args.points, args.seconds / 4)
        made += scaling.run(args.out, f"{args.name}_scaling", command, how)
    for path in made:
        print(f"wrote {path}")
    if args.record:
        report.write_docs(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
