# SPDX-License-Identifier: Apache-2.0
"""Logits whose nll and lse are known to the sums over rows of the gradient's softmax part, of every column.

Two launches: the factors of each row, then the sums. Grid of the sums: (tiles of columns, parts of the rows). A program
keeps the sums of its columns in registers while it goes down its rows, and writes them once: one read of the logits,
no atomics, and the parts are added in a fixed order. The mathematics: README.md#columns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import primitives
from fused_ppl.kernels import weights as class_weights
from fused_ppl.kernels.launch import Numbers, Weights, on_device

ROW_BLOCK = 128  # rows of a program that makes factors
ROWS = 4  # in flight at once in a program that sums


class RowFactors(NamedTuple):
    """Of each row, fp32: dz[v] = (a * p[v] - (a - rest) * [v = y]) * dz/dx - pull * w[v], scale apart."""

    a: Tensor
    rest: Tensor
    at_target: Tensor  # (p[y] * a - (a - rest)) * slope
    scaled: Tensor  # a, times what the fp32 lse2 has lost
    lse2: Tensor  # lse in base 2
    multiplier: Tensor  # of z in base 2
    pull: Tensor | None = None  # where labels are smoothed


class Partials(NamedTuple):
    """What the programs of the sums write, fp32; the first dimension is added up afterwards."""

    size: Tensor  # (parts, V): sum of |entry|, without the targets' entries
    square: Tensor  # (parts, V)
    total: Tensor | None = None  # (parts, V): sum of entries, where rows may differ in sign
    row_sum: Tensor | None = None  # (tiles, N): sum of entries of a row, under a softcap and in a shard


@triton.jit
def row_factors_kernel(
    target_logit_ptr, target_ptr, lse_ptr, nll_ptr, weights,  # inputs
    factors,  # outputs
    numbers, ignore_index,  # scalars
    N, V,  # sizes
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    target = tl.load(target_ptr + rows, mask=inside, other=0)
    counted = inside & (target == target if ignore_index is None else target != ignore_index)
    class_weight, token_weight = tl.full((BLOCK,), 1.0, tl.float32), tl.full((BLOCK,), 1.0, tl.float32)
    if weights.per_class is not None:
        known = counted & (target >= 0) & (target < V)
        class_weight = tl.load(weights.per_class + target, mask=known, other=0.0).to(tl.float32)
    if weights.per_token is not None:
        token_weight = tl.load(weights.per_token + rows, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    nll = tl.load(nll_ptr + rows, mask=inside, other=0.0)
    a, rest, pull = primitives.coefficients(
        1.0, 1.0, class_weight, token_weight, class_weights.total(weights, V), lse.to(tl.float32), numbers, V
    )
    at_target = primitives.gradient_at_target(nll, class_weight, a, rest, None)
    if numbers.squash is not None:
        x = tl.load(target_logit_ptr + rows, mask=inside, other=0.0)
        _, slope = primitives.cap(x, numbers.squash)
        at_target *= slope
    low, lse2, multiplier = primitives.split_lse(lse, nll, numbers.multiplier)
    tl.store(factors.a + rows, tl.where(counted, a, 0.0), mask=inside)
    tl.store(factors.rest + rows, tl.where(counted, rest, 0.0), mask=inside)
    tl.store(factors.at_target + rows, tl.where(counted, at_target, 0.0), mask=inside)
    tl.store(factors.scaled + rows, tl.where(counted, a * low, 0.0), mask=inside)
    # p = 0 in rows that are not counted
    tl.store(factors.lse2 + rows, tl.where(counted, lse2, float("inf")), mask=inside)
    tl.store(factors.multiplier + rows, multiplier, mask=inside)
    if factors.pull is not None:
        tl.store(factors.pull + rows, tl.where(counted, pull, 0.0), mask=inside)


@triton.jit
def go_down(logits_ptr, target_ptr, factors, partials, numbers, columns, inside, N, first, stop, stride_n,
            BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """The sums of some columns over rows [first, stop); `inside` is None where all columns are there."""
    size, square, total = (tl.zeros((BLOCK_V,), tl.float32),) * 3
    for start in range(first, stop, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        valid = rows < stop
        factor = tl.load(factors.scaled + rows, mask=valid, other=0.0)
        lse2 = tl.load(factors.lse2 + rows, mask=valid, other=float("inf"))
        multiplier = tl.load(factors.multiplier + rows, mask=valid, other=1.0)
        target = tl.load(target_ptr + rows, mask=valid, other=0).to(tl.int32)
        # the last row again in the place of rows that are not there: a mask would split the loads
        row_ptrs = logits_ptr + tl.minimum(rows, stop - 1).to(tl.int64)[:, None] * stride_n
        if inside is None:
            x = tl.load(row_ptrs + columns[None, :]).to(tl.float32)
        else:
            x = tl.load(row_ptrs + columns[None, :], mask=inside[None, :], other=float("-inf")).to(tl.float32)
        a, slope = primitives.cap(x, numbers.squash)
        is_target = columns[None, :] == target[:, None]
        g = primitives.gradient(
            a, slope, None, multiplier[:, None], lse2[:, None], factor[:, None], None, is_target, 0.0
        )
        if partials.total is not None:
            total += tl.sum(g, 0)
        if partials.row_sum is not None:
            here = g if inside is None else tl.where(inside[None, :], g, 0.0)
            tl.store(partials.row_sum + tl.program_id(0).to(tl.int64) * N + rows, tl.sum(here, 1), mask=valid)
        size += tl.sum(tl.abs(g), 0)
        square += tl.sum(g * g, 0)
    return size, square, total


@triton.jit(do_not_specialize=["N", "V", "rows_per_part"])
def column_sums_kernel(
    logits_ptr, target_ptr, factors,  # inputs
    partials,  # outputs
    numbers,  # scalars
    N, V, rows_per_part,  # sizes
    stride_n,  # strides
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * rows_per_part
    stop = tl.minimum(first + rows_per_part, N)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    if (tl.program_id(0) + 1) * BLOCK_V <= V:
        size, square, total = go_down(
            logits_ptr,
            target_ptr,
            factors,
            partials,
            numbers,
            columns,
            None,
            N,
            first,
            stop,
            stride_n,
            BLOCK_N,
            BLOCK_V,
        )
    else:
        size, square, total = go_down(
            logits_ptr, target_ptr, factors, partials, numbers, columns, inside, N, first, stop, stride_n, BLOCK_N,
            BLOCK_V,
        )  # fmt: skip
    offs = tl.program_id(1).to(tl.int64) * V + columns
    tl.store(partials.size + offs, size, mask=inside)
    tl.store(partials.square + offs, square, mask=inside)
    if partials.total is not None:
        tl.store(partials.total + offs, total, mask=inside)


def launch_row_factors(
    target_logit: Tensor,  # (N,) fp32
    target: Tensor,  # (N,) int32 or int64
    lse: Tensor,  # (N,) fp64
    nll: Tensor,  # (N,) fp32
    weights: Weights,
    factors: RowFactors,
    numbers: Numbers,
    *,
    num_classes: int,
    ignore_index: int | None,
) -> None:
    """Writes the factors; rows that are not counted have zeros."""
    N = target.shape[0]
    if N == 0:
        return
    with on_device(target):
        row_factors_kernel[(triton.cdiv(N, ROW_BLOCK),)](
            target_logit_ptr=target_logit, target_ptr=target, lse_ptr=lse, nll_ptr=nll, weights=weights,
            factors=factors,
            numbers=numbers._replace(scale=1.0), ignore_index=ignore_index,
            N=N, V=num_classes,
            BLOCK=ROW_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def launch_column_sums(
    logits: Tensor,  # (N, V), the classes of a row neighbours
    target: Tensor,  # (N,) int32 or int64
    factors: RowFactors,
    partials: Partials,
    numbers: Numbers,
    *,
    rows_per_part: int,
    block: int,
    num_warps: int,
) -> None:
    """Writes the sums of each part of the rows, without `scale`; 16-byte loads where rows are a multiple of 16 apart."""
    N, V = logits.shape
    if N == 0:
        return
    with on_device(logits):
        column_sums_kernel[(triton.cdiv(V, block), triton.cdiv(N, rows_per_part))](
            logits_ptr=logits, target_ptr=target, factors=factors,
            partials=partials,
            numbers=numbers,
            N=N, V=V, rows_per_part=rows_per_part,
            stride_n=logits.stride(0),
            BLOCK_N=ROWS, BLOCK_V=block, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def tiling(num_rows: int, num_classes: int, itemsize: int, num_sms: int, warp_size: int = 32) -> tuple[int, int, int]:
    """(columns of a program, rows of a part, warps): 16 bytes a thread and row, and parts enough to fill the device."""
    num_warps = 4
    block = warp_size * num_warps * (16 // itemsize)
    tiles = -(-num_classes // block)
    parts = max(1, min(-(-8 * num_sms // tiles), -(-num_rows // (8 * ROWS))))
    return block, -(-num_rows // (parts * ROWS)) * ROWS, num_warps
