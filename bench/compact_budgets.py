# SPDX-License-Identifier: Apache-2.0
"""The machine code that the kernels of the compact fused head are allowed; the words are those of budgets.py.

    python bench/compact_budgets.py [--target sm_90 ...] [--check]

Instructions for each logit: of the column sums for a logit that is read once, of the kept columns for one that is
gathered. The gathers are of 2 or 4 bytes; everything else goes 16 bytes at a time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any, NamedTuple

import aot
import budgets
import torch
from torch import Tensor

from fused_ppl.kernels import compact_columns, compact_kept, launch

NUM_SMS = 132


class Sizes(NamedTuple):
    """The shapes of a launch."""

    rows: int  # of a chunk
    v: int
    k: int  # kept columns


SIZES = Sizes(1024, 128256, 16032)
# Each group leads to one program. Rows that are multiples of 16 elements have one, and all others have another. These
# are rows of what a kernel moves 16 bytes at a time: `out` (rows, k), or `logits` (rows, v) for "columns".
EVEN, ODD = (SIZES, Sizes(1000, 151643, 16048), Sizes(7, 50257, 16)), (Sizes(1024, 50304, 999), Sizes(7, 151643, 7))
SAME_PROGRAM = {"kept": (EVEN, ODD), "rescreen": (EVEN, ODD), "factors": ((*EVEN, *ODD, Sizes(1, 1, 1)),)}
SAME_PROGRAM["columns"] = ((SIZES, Sizes(7, 50304, 9)), (Sizes(1024, 50257, 16), Sizes(1, 151643, 7)))
SMALLEST = Sizes(1, 1, 1)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAIN = launch.loss_scalars()
EVERYTHING = launch.loss_scalars(logit_scale=0.5, softcap=30.0, z_loss=1e-4)

# (instructions a logit in the hot loop, registers), measured with triton 3.9 plus a few per cent; see budgets.py
BUDGETS: dict[str, dict[str, tuple[float, int]]] = {
    "columns": {"sm": (13.5, 88), "gf": (16.6, 96)},  # of them 0.5 are a row's own multiplier
    "kept": {"sm": (17.2, 56), "gf": (19.5, 64)},
    "rescreen": {"sm": (10.0, 80), "gf": (9.2, 64)},
}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _factors(rows: int) -> compact_columns.RowFactors:
    return compact_columns.RowFactors(*(_meta(rows) for _ in range(6)))  # type: ignore[call-arg]


def columns(
    dtype: torch.dtype, scalars: launch.LossScalars = PLAIN, warp_size: int = 32, sizes: Sizes = SIZES
) -> tuple[Any, dict[str, Any]]:
    """The sums over rows, and the arguments that their launcher gives them."""
    tiling = compact_columns.choose_tiling(sizes.rows, sizes.v, dtype.itemsize, launch.Device(NUM_SMS, warp_size))
    shape = (-(-sizes.rows // tiling.rows_per_part), sizes.v)
    row_sum = _meta(-(-sizes.v // tiling.block), sizes.rows) if scalars.tanh_scale is not None else None
    kwargs = aot.capture(
        compact_columns.column_sums_kernel,
        lambda: compact_columns.launch_column_sums(
            _meta(sizes.rows, sizes.v, dtype=dtype),
            _meta(sizes.rows, dtype=torch.int64),
            _factors(sizes.rows),
            scalars,
            sums=compact_columns.ColumnSums(_meta(*shape), _meta(*shape), None, row_sum),
            tiling=tiling,
        ),
    )
    return compact_columns.column_sums_kernel, kwargs


def kept(
    dtype: torch.dtype, scalars: launch.LossScalars = PLAIN, warp_size: int = 32, sizes: Sizes = SIZES
) -> tuple[Any, dict[str, Any]]:
    kwargs = aot.capture(
        compact_kept.kept_gradient_kernel,
        lambda: compact_kept.launch_kept_gradient(
            _meta(sizes.rows, sizes.v, dtype=dtype),
            _meta(sizes.k, dtype=torch.int64),
            _factors(sizes.rows),
            scalars,
            target_position=_meta(sizes.rows, dtype=torch.int64),
            out=_meta(sizes.rows, sizes.k, dtype=dtype),
            row_sum=_meta(sizes.rows),
        ),
    )
    return compact_kept.kept_gradient_kernel, kwargs


def rescreen(
    dtype: torch.dtype, scalars: launch.LossScalars = PLAIN, warp_size: int = 32, sizes: Sizes = SIZES
) -> tuple[Any, dict[str, Any]]:
    rows = [_meta(sizes.rows) for _ in range(4)]
    wide = _meta(sizes.rows, dtype=torch.float64)
    kwargs = aot.capture(
        compact_kept.rescreen_kernel,
        lambda: compact_kept.launch_rescreen(
            _meta(sizes.rows, sizes.v, dtype=torch.bfloat16),
            _meta(sizes.k, dtype=torch.int64),
            _factors(sizes.rows),
            scalars,
            target_position=_meta(sizes.rows, dtype=torch.int64),
            nll=rows[0],
            lse=wide,
            out=_meta(sizes.rows, sizes.k, dtype=dtype),
            corrected=compact_kept.CorrectedRows(rows[0], wide, *rows[1:]),
        ),
    )
    return compact_kept.rescreen_kernel, kwargs


def factors(
    dtype: torch.dtype, scalars: launch.LossScalars = PLAIN, warp_size: int = 32, sizes: Sizes = SIZES
) -> tuple[Any, dict[str, Any]]:
    kwargs = aot.capture(
        compact_columns.row_factors_kernel,
        lambda: compact_columns.launch_row_factors(
            _meta(sizes.rows, dtype=torch.int64),
            launch.Weights() if scalars == PLAIN else launch.Weights(_meta(sizes.v), _meta(), _meta(sizes.rows)),
            scalars,
            target_logit=_meta(sizes.rows),
            lse=_meta(sizes.rows, dtype=torch.float64),
            nll=_meta(sizes.rows),
            factors=_factors(sizes.rows),
            num_classes=sizes.v,
            ignore_index=-100,
        ),
    )
    return compact_columns.row_factors_kernel, kwargs


KERNELS = {"columns": columns, "kept": kept, "rescreen": rescreen, "factors": factors}


def hot_loop(found: aot.Report) -> aot.Loop | None:
    """The first with the fewest instructions for an exponential: whole tiles, no mask."""
    loops = [loop for loop in found.loops if loop.exps]
    return min(loops, key=lambda loop: loop.instructions / loop.exps) if loops else None


def broken(kernel: str, target: str, mode: str, found: aot.Report) -> list[str]:
    """What is over the budget, in words. A softcap's row sums cross threads; nothing else does."""
    loop, checks = hot_loop(found), {f"{found.spills} spills": not (found.spills and budgets.IS_NEWEST)}
    if loop is not None and kernel != "factors":  # which runs once a row
        wide = {aot.access_bytes(op) for op in loop.loads}
        checks[f"loads of {wide} bytes, none of 16"] = 16 in wide
        checks[f"{loop.local} spills in the hot loop"] = not loop.local
        if mode == "off":
            checks[f"{loop.barriers} barriers in the hot loop"] = not loop.barriers
            per_logit = loop.instructions / loop.exps
            limits = [limit * budgets.ALLOWANCE for limit in BUDGETS[kernel][target[:2]]]
            checks[f"{per_logit:.2f} instructions a logit, {limits[0]:g} allowed"] = per_logit <= limits[0]
            checks[f"{found.registers} registers, {limits[1]:g} allowed"] = found.registers <= limits[1]
    return [text for text, holds in checks.items() if not holds]


def of_other_sizes(kernel: str, target: str) -> list[str]:
    """The sizes that lead to a program of their own, in words. A step that meets one waits for its compilation."""
    aot.compile_call(*KERNELS[kernel](torch.bfloat16, sizes=SMALLEST), aot.TARGETS[target])  # raises if there is none
    words = []
    for first, *others in SAME_PROGRAM[kernel]:
        program, *found = (str(vars(aot.source(*KERNELS[kernel](torch.bfloat16, sizes=s)))) for s in (first, *others))
        words += [f"{s} has another program than {first}" for s, p in zip(others, found, strict=True) if p != program]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=aot.TARGETS, nargs="+", default=list(aot.TARGETS))
    parser.add_argument("--check", action="store_true", help="print only what is over a budget, and fail if any is")
    args = parser.parse_args()
    failures = 0
    if not args.check:
        print("| target | kernel | dtype | options | instructions / logit | barriers | registers | spills |")
        print("|---|---|---|---|---|---|---|---|")
    for target, kernel in itertools.product(args.target if args.check else (), KERNELS):
        words = of_other_sizes(kernel, target)
        failures += len(words)
        for word in words:
            print(f"{target} {kernel}: {word}")
    modes = {"off": PLAIN, "all": EVERYTHING}
    for target, kernel, dtype, mode in itertools.product(args.target, KERNELS, DTYPES, modes):
        found = aot.read(
            aot.compile_call(
                *KERNELS[kernel](DTYPES[dtype], modes[mode], aot.TARGETS[target].warp_size), aot.TARGETS[target]
            )
        )
        words, loop = broken(kernel, target, mode, found), hot_loop(found)
        failures += len(words)
        if args.check:
            for word in words:
                print(f"{target} {kernel} {dtype} {mode}: {word}")
            continue
        cells = "|" if loop is None else f"{loop.instructions / loop.exps:.2f} | {loop.barriers}"
        print(f"| {target} | {kernel} | {dtype} | {mode} | {cells} | {found.registers} | {found.spills} |", flush=True)
    sys.exit(bool(failures and args.check))


if __name__ == "__main__":
    main()
