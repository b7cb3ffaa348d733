# SPDX-License-Identifier: Apache-2.0
"""What programs of one launch hand to each other: the slices of a row, and the rows of a batch.

Whoever arrives last combines what all have stored, in a fixed order: the same bits whoever that is, and no second
launch.
"""

import triton
import triton.language as tl

from fused_ppl.kernels import primitives
from fused_ppl.kernels.launch import MAX_SLICES

_MAX_SLICES = tl.constexpr(MAX_SLICES)


@triton.jit
def arrive(counter_ptr, expected):
    """True in the last of `expected` programs; what the others stored before is then visible (read it with .cg)."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1


@triton.jit
def store_slice(partials_ptr, row, reference, s, q, d, column):
    slices = tl.num_programs(1)
    ptr = partials_ptr + row.to(tl.int64) * slices + tl.program_id(1)
    field = tl.num_programs(0).to(tl.int64) * slices
    tl.store(ptr, reference)
    tl.store(ptr + field, s)
    tl.store(ptr + 2 * field, q)
    tl.store(ptr + 3 * field, d)
    tl.store(ptr + 4 * field, tl.cast(column, tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def load_slices(partials_ptr, row, multiplier, V, RUNNING_MAX: tl.constexpr):
    """The sums of a row from those of its slices, in slice order."""
    slices = tl.num_programs(1)
    offs = tl.arange(0, _MAX_SLICES)
    mask = offs < slices
    ptrs = partials_ptr + row.to(tl.int64) * slices + offs
    field = tl.num_programs(0).to(tl.int64) * slices
    references = tl.load(ptrs, mask=mask, other=primitives.LOWEST, cache_modifier=".cg")
    s = tl.load(ptrs + field, mask=mask, other=0.0, cache_modifier=".cg")
    q = tl.load(ptrs + 2 * field, mask=mask, other=0.0, cache_modifier=".cg")
    d = tl.load(ptrs + 3 * field, mask=mask, other=0.0, cache_modifier=".cg")
    columns = tl.load(ptrs + 4 * field, mask=mask, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
    reference = tl.max(references, 0)  # without RUNNING_MAX all are the target's
    column = tl.min(tl.where(mask & (references == reference), columns, V), 0)
    if RUNNING_MAX:
        s, q = primitives.rescale(s, q, (references - reference) * multiplier)
    return reference, tl.sum(s, 0), tl.sum(q, 0), tl.sum(d, 0), column


@triton.jit
def finish_sums(rows, sums, numbers, N, MEAN: tl.constexpr, T: tl.constexpr):
    """(S, M, Z) in float64 in a fixed order, then what reduction.finish makes of them."""
    B: tl.constexpr = 4  # rows of a thread at once: one 16-byte load
    s, m, z = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64)
    offs_n = tl.arange(0, T)[:, None] * B + tl.arange(0, B)[None, :]
    for start in range(0, N, B * T):
        mask = start + offs_n < N
        loss = tl.load(rows.loss + start + offs_n, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
        weight = tl.load(rows.weight + start + offs_n, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
        s += tl.sum(loss, 1)
        m += tl.sum(weight, 1)
        if numbers.z_loss is not None:
            lse = tl.load(rows.lse + start + offs_n, mask=mask, other=0.0, cache_modifier=".cg")
            z += tl.sum(weight * lse * lse, 1)
    s, m = tl.sum(s, 0), tl.sum(m, 0)
    total = s
    if numbers.z_loss is not None:
        total += numbers.z_loss * tl.sum(z, 0)

    empty = m == 0  # nothing counted: the values are NaN, the factors 0
    inverse = tl.where(empty, 0.0, 1.0 / m)
    nan = tl.where(empty, float("nan"), 0.0)
    mean, beyond = s * inverse + nan, tl.zeros_like(s)
    if numbers.max_nll is not None:
        beyond = tl.where(mean > numbers.max_nll, mean - numbers.max_nll, 0.0)
        mean = tl.where(mean > numbers.max_nll, tl.cast(numbers.max_nll, tl.float64), mean)
    slope = tl.exp(mean)
    if sums.num_items is not None:
        factor = 1.0 / tl.load(sums.num_items).to(tl.float64)
        loss = total * factor
    elif MEAN:
        factor = inverse
        loss = total * inverse + nan
    else:
        factor = tl.zeros_like(s) + 1.0
        loss = total
    tl.store(sums.loss, loss.to(tl.float32))
    tl.store(sums.perplexity, (slope * (1.0 + beyond)).to(tl.float32))
    tl.store(sums.total_weight, m)
    tl.store(sums.loss_factor, factor)
    tl.store(sums.perplexity_factor, tl.where(empty, 0.0, slope * inverse))
