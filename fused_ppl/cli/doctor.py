# SPDX-License-Identifier: Apache-2.0
"""`fused-ppl doctor` shows which backend a call uses on this machine, and checks its numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fused_ppl import backends
from fused_ppl.cli import machine, numbers
from fused_ppl.cli.machine import Choice
from fused_ppl.cli.numbers import Check
from fused_ppl.spec import BACKENDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# fewer classes than a vector register holds; sizes that no block size divides; the vocabulary of GPT-2
SHAPES = ((3, 7), (33, 1000), (8, 50257))
GOOD, WRONG, UNABLE = 0, 1, 2  # exit codes


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="show which backend a call would use on this machine, and check its numbers",
        description="Shows versions, devices and the backend that a call would use. Then compares value and gradient "
        "of fused_ppl.perplexity with the reference in float64.",
        epilog="Exit code: 0 if all is good, 1 if a number is wrong, 2 if nothing could be checked.",
    )
    parser.add_argument("--shape", nargs=2, type=_count, metavar=("N", "V"), help="check N tokens and V classes")
    parser.add_argument("--dtype", choices=DTYPES, help="check this dtype only")
    parser.add_argument("--backend", choices=BACKENDS, help="check this backend (default: all that can run)")
    parser.add_argument("--device", help="check this device only: cpu, cuda, cuda:1, mps, xpu")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    devices = machine.devices()
    dtypes = list(DTYPES.values()) if args.dtype is None else [DTYPES[args.dtype]]
    names = list(devices) if args.device is None else [_device(args.device, devices)]
    pairs = [
        (torch.device(name), dtype) for name in names for dtype in dtypes if (name, dtype) != ("mps", torch.float64)
    ]
    choices = [machine.choice(args.backend, device, dtype) for device, dtype in pairs]
    report: dict[str, Any] = {
        "versions": machine.versions(),
        "devices": devices,
        "environment": machine.environment(),
        "backends": [asdict(choice) for choice in choices],
    }
    if not args.json:
        print("\n".join(_machine_lines(report, choices)), flush=True)
    shapes = SHAPES if args.shape is None else [args.shape]
    checks = [
        check
        for (device, dtype), choice in zip(pairs, choices, strict=True)
        for backend in _backends_to_check(args.backend, choice, device, dtype)
        for shape in shapes
        for check in numbers.check(backend, device, dtype, shape=tuple(shape))
    ]
    code, verdict = summarize(checks)
    if args.json:
        report |= {"checks": [asdict(c) | {"good": c.good} for c in checks], "verdict": verdict, "exit_code": code}
        print(json.dumps(report, indent=2))
    else:
        print("\n".join([*_check_lines(checks), f"Verdict: {verdict}"]))
    return code


def summarize(checks: Sequence[Check]) -> tuple[int, str]:
    """Return the exit code and the verdict, one sentence."""
    wrong = sum(not check.good for check in checks)
    if not checks:
        return UNABLE, "NOT CHECKED: no call can run as asked. The section Backends gives the reasons."
    if wrong:
        return WRONG, f"WRONG: {wrong} of {len(checks)} checks failed. Do not train with this. Report the lines above."
    return GOOD, f"good: all {len(checks)} checks are within the tolerance."


def _backends_to_check(asked: str | None, choice: Choice, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the backend that was asked for, or all but the reference that can run. Empty if the call would raise."""
    if choice.chosen is None:
        return []
    if asked is not None:
        return [asked]
    return [name for name in BACKENDS if name != "reference" and backends.refusal(name, device, dtype) is None]


def _device(name: str, devices: dict[str, str]) -> str:
    full = f"{name}:0" if name in ("cuda", "xpu") else name
    if full not in devices:
        raise ValueError(f"--device must be one that torch can use here, {', '.join(devices)}; got {name!r}.")
    return full


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"N and V must be whole numbers > 0; got {text!r}. Try --shape 4096 50257.")
    return int(text)


def _machine_lines(report: dict[str, Any], choices: Sequence[Choice]) -> Iterator[str]:
    for title in ("versions", "devices", "environment"):
        if report[title]:
            yield from _table(title.capitalize(), list(report[title].items()))
    # one line for all dtypes of a device that have the same backend for the same reason
    dtypes_of: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        dtypes_of.setdefault((choice.device, choice.sentence()), []).append(choice.dtype)
    yield from _table("Backends", [(device, ", ".join(dtypes), text) for (device, text), dtypes in dtypes_of.items()])


def _check_lines(checks: Sequence[Check]) -> Iterator[str]:
    if not checks:
        return
    rows: list[tuple[str, ...]] = [("device", "backend", "dtype", "N x V", "of", "error", "allowed", "")]
    for c in checks:
        call = (c.device, c.backend, c.dtype, f"{c.tokens} x {c.classes}", c.of)
        rows.append((*call, f"{c.error:.1e}", f"{c.allowed:.1e}", "ok" if c.good else "WRONG"))
    yield from _table("Perplexity against the reference in float64", rows)
    problems = {c.problem: c.backend for c in checks if c.problem is not None}
    yield from (f"{backend} raised {problem}" for problem, backend in problems.items())


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    yield title
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
