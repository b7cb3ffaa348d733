# SPDX-License-Identifier: Apache-2.0
"""Small launches that together see nearly every change of an instruction; tests/mutants.py counts how many.

Each entry of MUTATED has one configuration, so that its cases launch the same programs: rows of several alignments and
lengths, with one tile or many, wild and peaked logits, and more rows than a program's threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from kernel_cases import Case, check, make, options_of

from fused_ppl.kernels.launch import LaunchConfig

# classes, offset of the first row, gap between rows, rows, kind of logits
SHAPES = (
    (1031, 3, 2, 5, "random"),
    (2100, 1, 0, 6, "random"),
    (77, 5, 3, 40, "random"),
    (1030, 0, 2, 6, "wild"),
    (2085, 7, 5, 4, "peaked"),
    (600, 2, 1, 130, "random"),
    (1100, 6, 4, 6, "far"),
    (900, 3, 1, 12, "confident"),
    (1200, 5, 2, 6, "unlikely"),
    (3100, 1, 3, 4, "ignored"),
)
EVERY = ["weight", "token_weight", "label_smoothing", "logit_scale", "softcap", "z_loss", "max_nll"]


def two_batches(case: Case) -> Case:
    """The same rows as (2, N / 2, V)."""
    _, n, v = case.logits.shape
    stride = case.logits.stride(1)
    strides = (n // 2 * stride, stride, 1)
    return case._replace(logits=case.logits.as_strided((2, n // 2, v), strides, case.logits.storage_offset()))


def far_apart(case: Case) -> Case:
    """Neighbouring logits are further apart than any exponent, and two of them share the largest value."""
    rows = case.logits[0]
    rows.mul_(2048.0 if rows.dtype == torch.float16 else 2e8)
    rows[:, 3] = rows[:, 700] = rows.abs().amax(1) * 1.5
    case.target[:2] = torch.tensor([3, 700])
    return case


def confident(case: Case) -> Case:
    """Targets from 1 to 23 nats above the other logits, so that nll falls from 5 to 1e-7."""
    rows = case.logits[0].clamp_(-4, 4)
    counted = case.target != case.spec.ignore_index
    rows[counted, case.target[counted]] = torch.arange(1, 24, 2)[counted].to(rows.dtype) + 4
    return case


def unlikely(case: Case) -> Case:
    """Targets 200 nats below the other logits: the sum relative to them overflows, and the row is done again."""
    counted = case.target != case.spec.ignore_index
    case.logits[0, counted, case.target[counted]] = -200
    return case


def cases(dtype: torch.dtype, names: list[str], stats: bool, slices: int) -> list[Callable[[], object]]:
    made: list[Callable[[], object]] = []
    for v, offset, pad, n, kind in SHAPES:
        given = kind if kind in ("random", "wild", "peaked") else "random"
        case = make(n, v, dtype, offset=offset, pad=pad, kind=given, **options_of(names, n, v))
        case = far_apart(case) if kind == "far" else case
        case = confident(case) if kind == "confident" else case
        case = unlikely(case) if kind == "unlikely" else case
        if kind == "ignored":
            case.target[1:3] = case.spec.ignore_index
        case = two_batches(case) if n % 2 == 0 else case
        tiles = v // (64 * 16 // dtype.itemsize) + 1
        per_slice = -(-tiles // slices)
        count = max(2, -(-tiles // per_slice)) if slices > 1 else 1
        config = LaunchConfig(vectors=1, num_warps=2, threads=64, tiles_per_slice=per_slice, slices=count)
        made.append(functools.partial(check, case, config, stats))
    return made


MUTATED = {
    "bf16": functools.partial(cases, torch.bfloat16, [], False, 1),
    "bf16, every option, statistics, 3 slices": functools.partial(cases, torch.bfloat16, EVERY, True, 3),
    "fp32, softcap, 3 slices": functools.partial(cases, torch.float32, ["softcap"], False, 3),
    "fp32": functools.partial(cases, torch.float32, [], False, 1),
    "fp16, weight, smoothing, statistics": functools.partial(
        cases, torch.float16, ["weight", "label_smoothing"], True, 1
    ),
}
