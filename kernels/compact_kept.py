# SPDX-License-Identifier: Apache-2.0
"""The gradient of the columns that the compact head keeps: K of V columns, gathered from the logits of a chunk.

    g[n, k] = logit_scale * A[n] * p[n, v_k] * slope[n, v_k]        at the target (A * p[y] - B) * slope[y] instead

Grid: (N rows). Without a screen, `kept_gradient_kernel` gathers K of V logits of a row, in loads of one element, and
writes K gradients and their sum. It needs one pass: about N * K * b bytes read, in whole sectors of 32, and as many
written.

With a screen, nll and lse come from approximate logits of all columns. `rescreen_kernel` also gets exact logits of the
kept columns, (N, K), and corrects the row. Its passes over a row:

1. It gathers the screened logits of the kept columns and reads their exact logits. It adds up p of both, without the
   target.
2. It replaces the screened sum by the exact one:  sum = (1 - p[y]) - screened_sum + exact_sum,  and so nll and lse.
3. It reads the exact logits again, from cache, and overwrites them with their gradient.

The columns that are not kept stay as the screen says. `nll_error` estimates what that costs: their share of the mass,
times how far the screen was off in the kept columns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import elementary, row_formula
from fused_ppl.kernels.compact_columns import RowFactors
from fused_ppl.kernels.launch import LossScalars, on_device, register_limit

BLOCK = 1024  # columns that a program processes at a time
REST = 256  # of the last ones, which do not fill a block
NUM_WARPS = 4


class CorrectedRows(NamedTuple):
    """The corrected results of each row."""

    nll: Tensor  # (N,) fp32
    lse: Tensor  # (N,) fp64
    p_slope_sum: Tensor  # (N,) fp32: sum of p * slope by the screen over the kept columns, without the target
    p_ratio: Tensor  # (N,) fp32: e^(lse of the screen - lse), by which every p of the screen is multiplied
    nll_error: Tensor  # (N,) fp32: mass of the other columns * |ln(exact mass / screened mass of the kept columns)|


@triton.jit
def load_kept(row_ptr, kept_ptr, positions, limit):
    """The logits of a block of kept columns in fp32, -inf from `limit` on. A limit of None means that all exist."""
    mask = None if limit is None else positions < limit
    kept = tl.load(kept_ptr + positions, mask=mask, other=None if limit is None else 0)
    return tl.load(row_ptr + kept, mask=mask, other=None if limit is None else float("-inf")).to(tl.float32)


@triton.jit
def load_exact(out_row_ptr, positions, limit):
    """The exact logits of a block of kept columns in fp32, 0 from `limit` on."""
    mask = None if limit is None else positions < limit
    return tl.load(out_row_ptr + positions, mask=mask, other=None if limit is None else 0.0).to(tl.float32)


@triton.jit
def kept_gradient(row_ptr, kept_ptr, out_row_ptr, positions, limit, target_position, softmax_factor, at_target, lse2,
                  scale_log2, scalars):  # fmt: skip
    """Writes the gradient of a block of kept columns, and returns it."""
    capped, slope = row_formula.cap(load_kept(row_ptr, kept_ptr, positions, limit), scalars.tanh_scale)
    g = row_formula.gradient(capped, slope, None, scale_log2, lse2, softmax_factor, None, None, 0.0)
    g = tl.where(positions == target_position, at_target, g)  # at_target includes its slope
    mask = None if limit is None else positions < limit
    g = g if limit is None else tl.where(mask, g, 0.0)
    tl.store(out_row_ptr + positions, g.to(out_row_ptr.dtype.element_ty), mask=mask)
    return g


# One program serves every K and V. Whole blocks have no mask, so their loads are wide without knowing K. `stride_out_n`
# is not in the list, because stores of 16 bytes need rows that are multiples of 16: it has one program for those
_INTEGERS = ["num_kept", "stride_n"]


@triton.jit(do_not_specialize=_INTEGERS)
def kept_gradient_kernel(
    logits_ptr, kept_ptr, target_position_ptr, factors,  # inputs
    out_ptr, row_sum_ptr,  # outputs
    scalars,  # scalars
    num_kept, stride_n, stride_out_n,  # sizes and strides
    BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_n
    out_row_ptr = out_ptr + row.to(tl.int64) * stride_out_n
    softmax_factor, lse2 = tl.load(factors.softmax_factor + row) * scalars.logit_scale, tl.load(factors.lse2 + row)
    scale_log2 = tl.load(factors.scale_log2 + row)
    at_target = tl.load(factors.at_target + row) * scalars.logit_scale
    target_position = tl.load(target_position_ptr + row)
    row_sum, rest_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((REST,), tl.float32)
    whole_blocks = num_kept // BLOCK * BLOCK
    for start in range(0, whole_blocks, BLOCK):
        row_sum += kept_gradient(
            row_ptr, kept_ptr, out_row_ptr, start + tl.arange(0, BLOCK), None, target_position, softmax_factor,
            at_target, lse2, scale_log2, scalars,
        )  # fmt: skip
    for start in range(whole_blocks, num_kept, REST):
        rest_sum += kept_gradient(
            row_ptr, kept_ptr, out_row_ptr, start + tl.arange(0, REST), num_kept, target_position, softmax_factor,
            at_target, lse2, scale_log2, scalars,
        )  # fmt: skip
    tl.store(row_sum_ptr + row, tl.sum(row_sum, 0) + tl.sum(rest_sum, 0))


@triton.jit
def kept_probabilities(logits, positions, limit, target_position, lse2, scale_log2, scalars):
    """p and p * slope of a block, 0 at the target and from `limit` on, without the lse_factor of the row."""
    capped, slope = row_formula.cap(logits, scalars.tanh_scale)
    p = row_formula.gradient(capped, 1.0, None, scale_log2, lse2, 1.0, None, None, 0.0)
    valid = positions != target_position if limit is None else (positions < limit) & (positions != target_position)
    p = tl.where(valid, p, 0.0)
    return p, p * slope


@triton.jit
def add_kept(row_ptr, kept_ptr, out_row_ptr, positions, limit, target_position, lse2, scale_log2, scalars,
             screened_sum, p_slope_sum, exact_sum):  # fmt: skip
    """Adds a block of kept columns: p by the screen, p * slope by the screen, and p by the exact logits."""
    screened, exact = load_kept(row_ptr, kept_ptr, positions, limit), load_exact(out_row_ptr, positions, limit)
    p, p_slope = kept_probabilities(screened, positions, limit, target_position, lse2, scale_log2, scalars)
    exact, _ = kept_probabilities(exact, positions, limit, target_position, lse2, scale_log2, scalars)
    return screened_sum + p, p_slope_sum + p_slope, exact_sum + exact


@triton.jit
def rescreened_gradient(out_row_ptr, positions, limit, target_position, A, lse_factor, at_target, lse2, scale_log2,
                        scalars):  # fmt: skip
    """Overwrites a block of exact logits with their gradient."""
    capped, slope = row_formula.cap(load_exact(out_row_ptr, positions, limit), scalars.tanh_scale)
    g = row_formula.gradient(
        capped, slope, None, scale_log2, lse2, A * lse_factor, None, positions == target_position, at_target
    )
    g = tl.where(A == 0, 0.0, g).to(out_row_ptr.dtype.element_ty)
    tl.store(out_row_ptr + positions, g, mask=None if limit is None else positions < limit)


@triton.jit(do_not_specialize=_INTEGERS)
def rescreen_kernel(
    out_ptr, screened_ptr, kept_ptr, target_position_ptr, nll_ptr, lse_ptr, factors,  # inputs
    corrected,  # outputs; out_ptr is one as well
    scalars,  # scalars
    num_kept, stride_n, stride_out_n,  # sizes and strides
    BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = screened_ptr + row.to(tl.int64) * stride_n
    out_row_ptr = out_ptr + row.to(tl.int64) * stride_out_n
    screened_nll, lse = tl.load(nll_ptr + row), tl.load(lse_ptr + row)
    lse_factor, lse2, scale_log2 = row_formula.split_lse(lse, screened_nll, scalars.scale_log2)
    target_position = tl.load(target_position_ptr + row)
    screened_sum, p_slope_sum, exact_sum = (tl.zeros((BLOCK,), tl.float32),) * 3
    whole_blocks = num_kept // BLOCK * BLOCK
    for start in range(0, whole_blocks, BLOCK):
        screened_sum, p_slope_sum, exact_sum = add_kept(
            row_ptr, kept_ptr, out_row_ptr, start + tl.arange(0, BLOCK), None, target_position, lse2, scale_log2,
            scalars, screened_sum, p_slope_sum, exact_sum,
        )  # fmt: skip
    screened_rest, p_slope_rest, exact_rest = (tl.zeros((REST,), tl.float32),) * 3
    for start in range(whole_blocks, num_kept, REST):
        screened_rest, p_slope_rest, exact_rest = add_kept(
            row_ptr, kept_ptr, out_row_ptr, start + tl.arange(0, REST), num_kept, target_position, lse2, scale_log2,
            scalars, screened_rest, p_slope_rest, exact_rest,
        )  # fmt: skip
    kept_screened = (tl.sum(screened_sum, 0) + tl.sum(screened_rest, 0)) * lse_factor
    kept_exact = (tl.sum(exact_sum, 0) + tl.sum(exact_rest, 0)) * lse_factor
    dropped = tl.maximum(row_formula.one_minus_p(screened_nll) - kept_screened, 0.0)
    target_t = screened_nll.to(tl.float64) * -elementary.LOG2E
    nll2, log2_sum = row_formula.nll_of_sum(dropped + kept_exact, target_t)
    nll = (nll2 * elementary.LN2).to(tl.float32)
    new_lse = lse + log2_sum * elementary.LN2
    tl.store(corrected.nll + row, nll)
    tl.store(corrected.lse + row, new_lse)
    tl.store(corrected.p_slope_sum + row, (tl.sum(p_slope_sum, 0) + tl.sum(p_slope_rest, 0)) * lse_factor)
    p_ratio = elementary.pow2(-log2_sum.to(tl.float32))
    tl.store(corrected.p_ratio + row, p_ratio)
    ratio = tl.where((kept_screened > 0) & (kept_exact > 0), tl.log2(kept_exact / kept_screened), 0.0)
    tl.store(corrected.nll_error + row, dropped * p_ratio * tl.abs(ratio) * elementary.LN2)

    lse_factor, lse2, scale_log2 = row_formula.split_lse(new_lse, nll, scalars.scale_log2)
    A = tl.load(factors.A + row) * scalars.logit_scale
    A_minus_B = tl.load(factors.A_minus_B + row) * scalars.logit_scale
    at_target = row_formula.gradient_at_target(nll, 1.0, A, A_minus_B, None)
    for start in range(0, whole_blocks, BLOCK):
        rescreened_gradient(
            out_row_ptr, start + tl.arange(0, BLOCK), None, target_position, A, lse_factor, at_target, lse2,
            scale_log2, scalars,
        )  # fmt: skip
    for start in range(whole_blocks, num_kept, REST):
        rescreened_gradient(
            out_row_ptr, start + tl.arange(0, REST), num_kept, target_position, A, lse_factor, at_target, lse2,
            scale_log2, scalars,
        )  # fmt: skip


def launch_kept_gradient(
    logits: Tensor,  # (N, V), stride(1) = 1
    kept: Tensor,  # (K,) int64: the kept columns
    factors: RowFactors,
    scalars: LossScalars,
    *,
    target_position: Tensor,  # (N,) int64: the target's position in `kept`
    out: Tensor,  # (N, K)
    row_sum: Tensor,  # (N,) fp32
) -> None:
    """Writes the gradient of the kept columns to `out`, and the sum of each row before it is rounded to `row_sum`."""
    N, num_kept = out.shape
    if N == 0:
        return
    with on_device(logits):
        kept_gradient_kernel[(N,)](
            logits_ptr=logits, kept_ptr=kept, target_position_ptr=target_position, factors=factors,
            out_ptr=out, row_sum_ptr=row_sum,
            scalars=scalars,
            num_kept=num_kept, stride_n=logits.stride(0), stride_out_n=out.stride(0),
            BLOCK=BLOCK, REST=REST, num_warps=NUM_WARPS, enable_fp_fusion=False, **register_limit(56),
        )  # fmt: skip


def launch_rescreen(
    screened: Tensor,  # (N, V): the logits of all columns by the screen
    kept: Tensor,  # (K,) int64: the kept columns
    factors: RowFactors,
    scalars: LossScalars,
    *,
    target_position: Tensor,  # (N,) int64: the target's position in `kept`
    nll: Tensor,  # (N,) fp32: by the screen
    lse: Tensor,  # (N,) fp64: by the screen
    out: Tensor,  # (N, K): the exact logits of the kept columns, overwritten
    corrected: CorrectedRows,
) -> None:
    """Writes `corrected`, and the gradient of the kept columns over `out`."""
    N, num_kept = out.shape
    if N == 0:
        return
    with on_device(out):
        rescreen_kernel[(N,)](
            out_ptr=out, screened_ptr=screened, kept_ptr=kept, target_position_ptr=target_position, nll_ptr=nll,
            lse_ptr=lse, factors=factors,
            corrected=corrected,
            scalars=scalars,
            num_kept=num_kept, stride_n=screened.stride(0), stride_out_n=out.stride(0),
            BLOCK=BLOCK, REST=REST, num_warps=NUM_WARPS, enable_fp_fusion=False, **register_limit(80),
        )  # fmt: skip
