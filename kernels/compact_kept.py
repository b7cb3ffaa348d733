# SPDX-License-Identifier: Apache-2.0
"""The kept columns of logits, gathered and turned into their gradient.

Grid: (N rows). `kept_kernel` reads K of V logits and writes K. `rescreen_kernel` reads what a screen took the K for
and what they are, corrects nll and lse of the row by the difference, and writes the gradient over the latter. The
mathematics: README.md#columns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import primitives
from fused_ppl.kernels.compact_columns import RowFactors
from fused_ppl.kernels.launch import Numbers, on_device, registers

BLOCK = 1024
NUM_WARPS = 4


class Rescreened(NamedTuple):
    """What is said of each row beside its gradient."""

    nll: Tensor  # (N,) fp32
    lse: Tensor  # (N,) fp64
    part: Tensor  # (N,) fp32: sum of the screened entries of the kept columns, without a, scale and the target
    shrink: Tensor  # (N,) fp32: what every p is to be multiplied by, exp(lse of the screen - lse)
    wrong: Tensor  # (N,) fp32: the rest's share times the log of what the kept mass was wrong by


@triton.jit
def gather(row_ptr, index_ptr, start, K, BLOCK: tl.constexpr):
    """Logits of a block of the kept columns, -inf beyond the last."""
    places = start + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + places, mask=places < K, other=0)
    return tl.load(row_ptr + index, mask=places < K, other=float("-inf")).to(tl.float32), places


@triton.jit
def kept_kernel(
    logits_ptr, index_ptr, place_ptr, factors,  # inputs
    out_ptr, sum_ptr,  # outputs
    numbers,  # scalars
    K,  # sizes
    stride_n, stride_out_n,  # strides
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_n
    out_row = out_ptr + row.to(tl.int64) * stride_out_n
    factor, lse2 = tl.load(factors.scaled + row) * numbers.scale, tl.load(factors.lse2 + row)
    multiplier = tl.load(factors.multiplier + row)
    at_target = tl.load(factors.at_target + row) * numbers.scale
    place = tl.load(place_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        x, places = gather(row_ptr, index_ptr, start, K, BLOCK)
        a, slope = primitives.cap(x, numbers.squash)
        g = primitives.gradient(a, slope, None, multiplier, lse2, factor, None, None, 0.0)
        g = tl.where(places == place, at_target, g)  # which has its slope
        g = tl.where(places < K, g, 0.0)
        total += g
        tl.store(out_row + places, g.to(out_ptr.dtype.element_ty), mask=places < K)
    tl.store(sum_ptr + row, tl.sum(total, 0))


@triton.jit
def mass(x, places, place, K, lse2, multiplier, numbers):
    """p of a block against a given lse, without the target; and p times the cap's slope."""
    a, slope = primitives.cap(x, numbers.squash)
    p = primitives.gradient(a, 1.0, None, multiplier, lse2, 1.0, None, None, 0.0)
    p = tl.where((places < K) & (places != place), p, 0.0)
    return p, p * slope


@triton.jit
def rescreen_kernel(
    out_ptr, screened_ptr, index_ptr, place_ptr, nll_ptr, lse_ptr, factors,  # inputs
    found,  # outputs; and out_ptr
    numbers,  # scalars
    K,  # sizes
    stride_n, stride_out_n,  # strides
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = screened_ptr + row.to(tl.int64) * stride_n
    out_row = out_ptr + row.to(tl.int64) * stride_out_n
    old, lse = tl.load(nll_ptr + row), tl.load(lse_ptr + row)
    low, lse2, multiplier = primitives.split_lse(lse, old, numbers.multiplier)
    place = tl.load(place_ptr + row)
    before, part, after = (tl.zeros((BLOCK,), tl.float32),) * 3
    for start in range(0, K, BLOCK):
        x, places = gather(row_ptr, index_ptr, start, K, BLOCK)
        p, sloped = mass(x, places, place, K, lse2, multiplier, numbers)
        before += p
        part += sloped
        x = tl.load(out_row + places, mask=places < K, other=0.0).to(tl.float32)
        after += mass(x, places, place, K, lse2, multiplier, numbers)[0]
    kept_before, kept_after = tl.sum(before, 0) * low, tl.sum(after, 0) * low
    rest = tl.maximum(primitives.others_mass(old) - kept_before, 0.0)
    delta = old.to(tl.float64) * -primitives.LOG2E
    nll2, log2_sum = primitives.nll_of_sum(rest + kept_after, delta)
    nll = (nll2 * primitives.LN2).to(tl.float32)
    new_lse = lse + log2_sum * primitives.LN2
    tl.store(found.nll + row, nll)
    tl.store(found.lse + row, new_lse)
    tl.store(found.part + row, tl.sum(part, 0) * low)
    shrink = primitives.power(-log2_sum.to(tl.float32))
    tl.store(found.shrink + row, shrink)
    ratio = tl.where((kept_before > 0) & (kept_after > 0), tl.log2(kept_after / kept_before), 0.0)
    tl.store(found.wrong + row, rest * shrink * tl.abs(ratio) * primitives.LN2)

    low, lse2, multiplier = primitives.split_lse(new_lse, nll, numbers.multiplier)
    A, spread = tl.load(factors.a + row) * numbers.scale, tl.load(factors.rest + row) * numbers.scale
    at_target = primitives.gradient_at_target(nll, 1.0, A, spread, None)
    for start in range(0, K, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(out_row + places, mask=places < K, other=0.0).to(tl.float32)
        a, slope = primitives.cap(x, numbers.squash)
        g = primitives.gradient(a, slope, None, multiplier, lse2, A * low, None, places == place, at_target)
        g = tl.where(A == 0, 0.0, g)
        tl.store(out_row + places, g.to(out_ptr.dtype.element_ty), mask=places < K)


def launch_kept(
    logits: Tensor,  # (N, V), the classes of a row neighbours
    index: Tensor,  # (K,) int64
    place: Tensor,  # (N,) int64: of the target among the kept columns
    factors: RowFactors,
    out: Tensor,  # (N, K)
    row_sum: Tensor,  # (N,) fp32
    numbers: Numbers,
) -> None:
    """Writes the gradient of the kept columns, and its row sums before they are rounded."""
    N, K = out.shape
    if N == 0:
        return
    with on_device(logits):
        kept_kernel[(N,)](
            logits_ptr=logits, index_ptr=index, place_ptr=place, factors=factors,
            out_ptr=out, sum_ptr=row_sum,
            numbers=numbers,
            K=K,
            stride_n=logits.stride(0), stride_out_n=out.stride(0),
            BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False, **registers(128),
        )  # fmt: skip


def launch_rescreen(
    out: Tensor,  # (N, K): logits of the kept columns, in full
    screened: Tensor,  # (N, V): what a screen says of all
    index: Tensor,  # (K,) int64
    place: Tensor,  # (N,) int64
    nll: Tensor,  # (N,) fp32: of the screen
    lse: Tensor,  # (N,) fp64: of the screen
    factors: RowFactors,
    found: Rescreened,
    numbers: Numbers,
) -> None:
    """Writes what is known better of each row, and over `out` the gradient."""
    N, K = out.shape
    if N == 0:
        return
    with on_device(out):
        rescreen_kernel[(N,)](
            out_ptr=out, screened_ptr=screened, index_ptr=index, place_ptr=place, nll_ptr=nll, lse_ptr=lse,
            factors=factors,
            found=found,
            numbers=numbers,
            K=K,
            stride_n=screened.stride(0), stride_out_n=out.stride(0),
            BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False, **registers(72),
        )  # fmt: skip
