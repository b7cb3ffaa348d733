# SPDX-License-Identifier: Apache-2.0
"""Reductions across the programs of one launch: the slices of a row, and the rows of a batch.

    finish_loss:  S = sum loss    M = sum weight    Z = sum weight * lse^2        (float64, over all rows)
                  loss = (S + z_loss * Z) / M       perplexity = exp(S / M), linear in S / M above max_nll

Each program stores its result and adds 1 to a counter. The program that adds the last 1 reads all results and reduces
them in the order of their index. The result therefore has the same bits whichever program is last. A second launch
would do the same, but costs a launch, which is longer than the kernel itself for small losses. Atomic additions of
floats would cost nothing either, but their order, and so the result, changes from run to run.

Why the last program sees what all others have stored:

1. Each program stores its result, then passes a barrier of its threads.
2. One thread adds 1 to the counter with acquire-release order. The barrier puts all stores before this addition, and
   the release publishes them.
3. Additions to one counter form one release sequence. The program whose addition returns expected - 1 thus acquires
   what all earlier additions have released.
4. The returned value reaches the other threads of that program through shared memory, behind a barrier.
5. Their loads bypass the L1 cache (`.cg`), so they see every store. No program stores afterwards.

The caller zeroes the counters for each call, so that no state outlives a call. Traffic of a split row: 20 bytes per
slice, written and read once. Traffic of the loss: 8 bytes per row, and 8 more for z_loss.
`python bench/sanitize.py` checks this order, and every address, without a GPU.
"""

import triton
import triton.language as tl

from fused_ppl.kernels import row_formula
from fused_ppl.kernels.launch import MAX_SLICES

_MAX_SLICES = tl.constexpr(MAX_SLICES)


@triton.jit
def arrive(counter_ptr, expected):
    """True in the last of `expected` programs. It then sees what the others have stored, if it loads with `.cg`."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1


@triton.jit
def store_slice(partials_ptr, row, shift, sum_exp, sum_exp_t, sum_w_t, argmax):
    """Stores the sums of this program's slice of a row into `partials`, (SLICE_FIELDS, N, slices) fp32."""
    slices = tl.num_programs(1)
    ptr = partials_ptr + row.to(tl.int64) * slices + tl.program_id(1)
    field = tl.num_programs(0).to(tl.int64) * slices
    tl.store(ptr, shift)
    tl.store(ptr + field, sum_exp)
    tl.store(ptr + 2 * field, sum_exp_t)
    tl.store(ptr + 3 * field, sum_w_t)
    tl.store(ptr + 4 * field, tl.cast(argmax, tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def load_slices(partials_ptr, row, scale_log2, V, RUNNING_MAX: tl.constexpr):
    """The sums of a row from the sums of its slices, added in the order of the slices."""
    slices = tl.num_programs(1)
    offs = tl.arange(0, _MAX_SLICES)
    mask = offs < slices
    ptrs = partials_ptr + row.to(tl.int64) * slices + offs
    field = tl.num_programs(0).to(tl.int64) * slices
    shifts = tl.load(ptrs, mask=mask, other=row_formula.LOWEST, cache_modifier=".cg")
    sum_exp = tl.load(ptrs + field, mask=mask, other=0.0, cache_modifier=".cg")
    sum_exp_t = tl.load(ptrs + 2 * field, mask=mask, other=0.0, cache_modifier=".cg")
    sum_w_t = tl.load(ptrs + 3 * field, mask=mask, other=0.0, cache_modifier=".cg")
    argmaxes = tl.load(ptrs + 4 * field, mask=mask, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
    shift = tl.max(shifts, 0)  # without RUNNING_MAX all shifts are equal
    argmax = tl.min(tl.where(mask & (shifts == shift), argmaxes, V), 0)
    if RUNNING_MAX:
        sum_exp, sum_exp_t = row_formula.rescale(sum_exp, sum_exp_t, (shifts - shift) * scale_log2)
    return shift, tl.sum(sum_exp, 0), tl.sum(sum_exp_t, 0), tl.sum(sum_w_t, 0), argmax


@triton.jit
def finish_loss(rows, totals, scalars, N, MEAN: tl.constexpr, T: tl.constexpr):
    """Sums all rows in float64 and stores `totals`: the same values as `reduction.finish` computes from S, M and Z."""
    ROWS: tl.constexpr = 4  # rows per thread and step: one 16-byte load
    loss_sum, weight_sum = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64)
    lse_square_sum = tl.zeros((T,), tl.float64)
    offs_n = tl.arange(0, T)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    for start in range(0, N, ROWS * T):
        mask = start + offs_n < N
        loss = tl.load(rows.loss + start + offs_n, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
        weight = tl.load(rows.weight + start + offs_n, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
        loss_sum += tl.sum(loss, 1)
        weight_sum += tl.sum(weight, 1)
        if scalars.z_loss is not None:
            lse = tl.load(rows.lse + start + offs_n, mask=mask, other=0.0, cache_modifier=".cg")
            lse_square_sum += tl.sum(weight * lse * lse, 1)
    loss_sum, weight_sum = tl.sum(loss_sum, 0), tl.sum(weight_sum, 0)
    total = loss_sum
    if scalars.z_loss is not None:
        total += scalars.z_loss * tl.sum(lse_square_sum, 0)

    empty = weight_sum == 0  # no row counts: the values are NaN, the factors 0
    inverse = tl.where(empty, 0.0, 1.0 / weight_sum)
    nan = tl.where(empty, float("nan"), 0.0)
    mean, excess = loss_sum * inverse + nan, tl.zeros_like(loss_sum)
    if scalars.max_nll is not None:
        excess = tl.where(mean > scalars.max_nll, mean - scalars.max_nll, 0.0)
        mean = tl.where(mean > scalars.max_nll, tl.cast(scalars.max_nll, tl.float64), mean)
    perplexity = tl.exp(mean)
    if totals.num_items is not None:
        factor = 1.0 / tl.load(totals.num_items).to(tl.float64)
        loss = total * factor
    elif MEAN:
        factor = inverse
        loss = total * inverse + nan
    else:
        factor = tl.zeros_like(loss_sum) + 1.0
        loss = total
    tl.store(totals.loss, loss.to(tl.float32))
    tl.store(totals.perplexity, (perplexity * (1.0 + excess)).to(tl.float32))
    tl.store(totals.total_weight, weight_sum)
    tl.store(totals.loss_factor, factor)
    tl.store(totals.perplexity_factor, tl.where(empty, 0.0, perplexity * inverse))
