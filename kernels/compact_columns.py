# SPDX-License-Identifier: Apache-2.0
"""Column sums of the softmax part of the gradient, over the rows of a chunk whose nll and lse are known.

    g[n, v] = A[n] * p[n, v] * slope[n, v]   for v != y[n],   g[n, y[n]] = 0         (logit_scale apart)
    abs_sum[v] = sum_n |g|        square_sum[v] = sum_n g^2        signed_sum[v] = sum_n g        row_sum[n] = sum_v g

The compact head chooses the columns that it keeps by these sums. Order of the passes:

1. `row_factors_kernel` computes the numbers of each row once. It reads at most 32 bytes per row and writes at most 28.
2. `column_sums_kernel` reads the logits once, N * V * b bytes. Its grid is (blocks of columns, parts of the rows). A
   program loops over its rows and keeps the sums of its columns in registers. It writes 8 or 12 bytes per column.

The caller adds the parts in a fixed order, so that the sums have the same bits in every run. The obvious way, atomic
additions into one sum per column, needs no parts but gives other bits in every run.

`signed_sum` is needed if rows may differ in sign. `row_sum` is needed only under a softcap and in a shard. In all other
cases the caller knows it, because p sums to 1 over a row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import loss_weights, row_formula
from fused_ppl.kernels.launch import Device, LossScalars, Weights, on_device

FACTOR_ROWS = 128  # rows of a program of row_factors_kernel
SUM_ROWS = 4  # rows that a program of column_sums_kernel loads at a time


class RowFactors(NamedTuple):
    """The numbers of each row, (N,) fp32, without logit_scale. They are 0 in a row that does not count.

    dz[v] = A * p[v] - C * w[v] - B * [v = y]        p[v] = lse_factor * 2^(capped[v] * scale_log2 - lse2)
    """

    A: Tensor
    A_minus_B: Tensor
    at_target: Tensor  # (A * p[y] - B) * slope[y]
    softmax_factor: Tensor  # A * lse_factor
    lse2: Tensor  # inf in a row that does not count, so that its p is 0
    scale_log2: Tensor
    C: Tensor | None = None  # only with label smoothing


class ColumnSums(NamedTuple):
    """Sums of each part of the rows, or of each block of columns, fp32. The caller adds up the first dimension."""

    abs_sum: Tensor  # (parts, V)
    square_sum: Tensor  # (parts, V)
    signed_sum: Tensor | None = None  # (parts, V)
    row_sum: Tensor | None = None  # (blocks, N)


class ColumnTiling(NamedTuple):
    """The work of one program of column_sums_kernel."""

    block: int  # columns
    rows_per_part: int
    num_warps: int


@triton.jit(do_not_specialize=["ignore_index", "N", "V"])
def row_factors_kernel(
    target_logit_ptr, target_ptr, lse_ptr, nll_ptr, weights,  # inputs
    factors,  # outputs
    scalars, ignore_index,  # scalars
    N, V,  # sizes
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    target = tl.load(target_ptr + rows, mask=mask, other=0)
    counted = mask & (target == target if ignore_index is None else target != ignore_index)
    class_weight, token_weight = tl.full((BLOCK,), 1.0, tl.float32), tl.full((BLOCK,), 1.0, tl.float32)
    if weights.per_class is not None:
        in_range = counted & (target >= 0) & (target < V)
        class_weight = tl.load(weights.per_class + target, mask=in_range, other=0.0).to(tl.float32)
    if weights.per_token is not None:
        token_weight = tl.load(weights.per_token + rows, mask=mask, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=mask, other=0.0)
    nll = tl.load(nll_ptr + rows, mask=mask, other=0.0)
    class_weight_sum = loss_weights.class_weight_sum(weights, V)
    A, A_minus_B, C = row_formula.gradient_coefficients(
        1.0, 1.0, class_weight, token_weight, class_weight_sum, lse.to(tl.float32), scalars, V
    )
    at_target = row_formula.gradient_at_target(nll, class_weight, A, A_minus_B, None)
    if scalars.tanh_scale is not None:
        target_logit = tl.load(target_logit_ptr + rows, mask=mask, other=0.0)
        _, slope = row_formula.cap(target_logit, scalars.tanh_scale)
        at_target *= slope
    lse_factor, lse2, scale_log2 = row_formula.split_lse(lse, nll, scalars.scale_log2)
    tl.store(factors.A + rows, tl.where(counted, A, 0.0), mask=mask)
    tl.store(factors.A_minus_B + rows, tl.where(counted, A_minus_B, 0.0), mask=mask)
    tl.store(factors.at_target + rows, tl.where(counted, at_target, 0.0), mask=mask)
    tl.store(factors.softmax_factor + rows, tl.where(counted, A * lse_factor, 0.0), mask=mask)
    tl.store(factors.lse2 + rows, tl.where(counted, lse2, float("inf")), mask=mask)
    tl.store(factors.scale_log2 + rows, scale_log2, mask=mask)
    if factors.C is not None:
        tl.store(factors.C + rows, tl.where(counted, C, 0.0), mask=mask)


@triton.jit
def sum_columns(logits_ptr, target_ptr, factors, sums, scalars, columns, mask, N, first_row, stop_row, stride_n,
                BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """The sums of a block of columns over rows [first_row, stop_row). `mask` is None if all columns exist."""
    abs_sum, square_sum, signed_sum = (tl.zeros((BLOCK_V,), tl.float32),) * 3
    for start in range(first_row, stop_row, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        valid = rows < stop_row
        softmax_factor = tl.load(factors.softmax_factor + rows, mask=valid, other=0.0)
        lse2 = tl.load(factors.lse2 + rows, mask=valid, other=float("inf"))
        scale_log2 = tl.load(factors.scale_log2 + rows, mask=valid, other=1.0)
        target = tl.load(target_ptr + rows, mask=valid, other=0).to(tl.int32)
        # rows beyond the last one load the last one again, because a mask for rows would split the loads
        row_ptrs = logits_ptr + tl.minimum(rows, stop_row - 1).to(tl.int64)[:, None] * stride_n
        if mask is None:
            logits = tl.load(row_ptrs + columns[None, :]).to(tl.float32)
        else:
            logits = tl.load(row_ptrs + columns[None, :], mask=mask[None, :], other=float("-inf")).to(tl.float32)
        capped, slope = row_formula.cap(logits, scalars.tanh_scale)
        is_target = columns[None, :] == target[:, None]
        g = row_formula.gradient(
            capped, slope, None, scale_log2[:, None], lse2[:, None], softmax_factor[:, None], None, is_target, 0.0
        )
        if sums.signed_sum is not None:
            signed_sum += tl.sum(g, 0)
        if sums.row_sum is not None:
            valid_g = g if mask is None else tl.where(mask[None, :], g, 0.0)
            tl.store(sums.row_sum + tl.program_id(0).to(tl.int64) * N + rows, tl.sum(valid_g, 1), mask=valid)
        abs_sum += tl.sum(tl.abs(g), 0)
        square_sum += tl.sum(g * g, 0)
    return abs_sum, square_sum, signed_sum


@triton.jit(do_not_specialize=["N", "V", "rows_per_part"])
def column_sums_kernel(
    logits_ptr, target_ptr, factors,  # inputs
    sums,  # outputs
    scalars,  # scalars
    N, V, rows_per_part,  # sizes
    stride_n,  # strides
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(1) * rows_per_part
    stop_row = tl.minimum(first_row + rows_per_part, N)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = columns < V
    # a block of columns that all exist needs no mask in its loop
    if (tl.program_id(0) + 1) * BLOCK_V <= V:
        abs_sum, square_sum, signed_sum = sum_columns(
            logits_ptr, target_ptr, factors, sums, scalars, columns, None, N, first_row, stop_row, stride_n, BLOCK_N,
            BLOCK_V,
        )  # fmt: skip
    else:
        abs_sum, square_sum, signed_sum = sum_columns(
            logits_ptr, target_ptr, factors, sums, scalars, columns, mask, N, first_row, stop_row, stride_n, BLOCK_N,
            BLOCK_V,
        )  # fmt: skip
    offs = tl.program_id(1).to(tl.int64) * V + columns
    tl.store(sums.abs_sum + offs, abs_sum, mask=mask)
    tl.store(sums.square_sum + offs, square_sum, mask=mask)
    if sums.signed_sum is not None:
        tl.store(sums.signed_sum + offs, signed_sum, mask=mask)


def launch_row_factors(
    target: Tensor,  # (N,) int32 or int64
    weights: Weights,
    scalars: LossScalars,
    *,
    target_logit: Tensor,  # (N,) fp32
    lse: Tensor,  # (N,) fp64
    nll: Tensor,  # (N,) fp32
    factors: RowFactors,
    num_classes: int,
    ignore_index: int | None,
) -> None:
    """Writes `factors`."""
    N = target.shape[0]
    if N == 0:
        return
    with on_device(target):
        row_factors_kernel[(triton.cdiv(N, FACTOR_ROWS),)](
            target_logit_ptr=target_logit, target_ptr=target, lse_ptr=lse, nll_ptr=nll, weights=weights,
            factors=factors,
            scalars=scalars._replace(logit_scale=1.0), ignore_index=ignore_index,
            N=N, V=num_classes,
            BLOCK=FACTOR_ROWS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def launch_column_sums(
    logits: Tensor,  # (N, V), stride(1) = 1
    target: Tensor,  # (N,) int32 or int64
    factors: RowFactors,
    scalars: LossScalars,
    *,
    sums: ColumnSums,
    tiling: ColumnTiling,
) -> None:
    """Writes `sums`, without logit_scale. Loads have 16 bytes if the stride of the rows is a multiple of 16 bytes."""
    N, V = logits.shape
    if N == 0:
        return
    with on_device(logits):
        column_sums_kernel[(triton.cdiv(V, tiling.block), triton.cdiv(N, tiling.rows_per_part))](
            logits_ptr=logits, target_ptr=target, factors=factors,
            sums=sums,
            scalars=scalars,
            N=N, V=V, rows_per_part=tiling.rows_per_part,
            stride_n=logits.stride(0),
            BLOCK_N=SUM_ROWS, BLOCK_V=tiling.block, num_warps=tiling.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def choose_tiling(num_rows: int, num_classes: int, itemsize: int, device: Device) -> ColumnTiling:
    """Blocks of 16 bytes per thread and row, and enough parts to fill the device 8 times."""
    num_warps = 4
    block = device.warp_size * num_warps * (16 // itemsize)
    blocks = -(-num_classes // block)
    parts = max(1, min(-(-8 * device.num_sms // blocks), -(-num_rows // (8 * SUM_ROWS))))
    return ColumnTiling(block, -(-num_rows // (parts * SUM_ROWS)) * SUM_ROWS, num_warps)
