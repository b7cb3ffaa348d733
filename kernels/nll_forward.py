# SPDX-License-Identifier: Apache-2.0
"""Logits to NLL, loss, mean and perplexity in one launch and one read of the logits.

Grid: (N rows, slices of a row). Reads N * V logits once and writes 20 bytes a row. The program that finishes the last
slice of a row combines the row, the program that finishes the last row sums all rows; both in a fixed order, so the
result is the same bit for bit whoever comes last. The mathematics: README.md#forward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import combine, primitives, walk
from fused_ppl.kernels import weights as class_weights
from fused_ppl.kernels.launch import SHARD_FIELDS, LaunchConfig, Numbers, Rows, Sums, Weights, Workspace, on_device

_SHARD_FIELDS = tl.constexpr(SHARD_FIELDS)


@triton.jit
def settle_row(row_ptr, weight_ptr, hole, a_target, reference, s, q, d, column, multiplier, squash, V, stride_v,
               RUNNING_MAX: tl.constexpr, SMOOTHING: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The sums of a whole row, redone where they have overflowed.

    Returns the target's z, the origin of the sums and the part of it that d has taken, in base 2; s, q, d; the column
    of the maximum.
    """
    # t is a * multiplier - (top * multiplier + fixed)
    top, fixed = tl.zeros_like(reference), reference
    if RUNNING_MAX:
        top, fixed = reference, top
        column = tl.where((hole >= 0) & (a_target == top), tl.minimum(column, hole), column)
        column = tl.where(column < V, column, 0)  # a row of -inf, as torch.argmax has it
    else:
        # overflow, as of every target so far out that fp32 does not hold what is 8 above it; or, for fp32 logits, a
        # largest p of which t has lost so many bits that its gradient would show
        LIMIT: tl.constexpr = 262144.0 if row_ptr.dtype.element_ty == tl.float32 else 1e37
        if not ((s < LIMIT) & (tl.abs(reference) < 67108864.0)):
            fixed = top
            top, s, q, d, column = walk.sum_row(
                row_ptr, weight_ptr, hole, a_target, multiplier, squash, V, stride_v, 0, V + 1,
                True, False, False, SMOOTHING, VECTOR, 1, T,
            )  # fmt: skip
    scale = tl.cast(multiplier, tl.float64)
    return a_target.to(tl.float64) * scale, top.to(tl.float64) * scale + fixed.to(tl.float64), fixed, s, q, d, column


@triton.jit
def store_row(row, rows, s, q, d, column, origin, fixed, z2, class_weight, token_weight, weight_sum, numbers,
              num_classes):  # fmt: skip
    """Returns the nll and lse that it stores."""
    delta = z2 - origin
    nll2, log2_sum = primitives.nll_of_sum(s, delta)
    lse2 = origin + log2_sum
    nll = (nll2 * primitives.LN2).to(tl.float32)
    loss = class_weight * nll
    if numbers.smoothing is not None:
        total = d.to(tl.float64) + class_weight * (z2 - fixed)
        spread = (weight_sum * (lse2 - fixed) - total).to(tl.float32)  # sum_v w[v] * (lse - z[v])
        loss = (1.0 - numbers.smoothing) * loss + spread * (numbers.smoothing / num_classes * primitives.LN2)
    tl.store(rows.loss + row, token_weight * loss)
    tl.store(rows.weight + row, token_weight * class_weight)
    lse = lse2 * primitives.LN2
    tl.store(rows.nll + row, nll)
    tl.store(rows.lse + row, lse)
    if rows.entropy is not None:
        tl.store(rows.entropy + row, primitives.entropy_of_sum(s, q, delta, log2_sum))
    if rows.predicted is not None:
        tl.store(rows.predicted + row, column.to(tl.int64))
    return nll, lse


@triton.jit
def store_shard(shards_ptr, row, origin, s, q, d, z2, owned, column):
    """A shard's statistics in nats: sums over the classes that are not the target, and the target's z apart from them."""
    ptr = shards_ptr + row.to(tl.int64) * _SHARD_FIELDS
    tl.store(ptr, origin * primitives.LN2)
    tl.store(ptr + 1, s)
    tl.store(ptr + 2, tl.where(owned, z2 * primitives.LN2, 0.0))
    tl.store(ptr + 3, d.to(tl.float64) * primitives.LN2)
    tl.store(ptr + 4, q * primitives.LN2)
    tl.store(ptr + 5, column)


@triton.jit
def store_ignored(row, rows, shards_ptr):
    if shards_ptr is not None:
        fields = tl.arange(0, 8)
        tl.store(shards_ptr + row.to(tl.int64) * _SHARD_FIELDS + fields, 0.0, mask=fields < _SHARD_FIELDS)
    else:
        tl.store(rows.loss + row, 0.0)
        tl.store(rows.weight + row, 0.0)
        tl.store(rows.nll + row, 0.0)
        tl.store(rows.lse + row, 0.0)
        if rows.entropy is not None:
            tl.store(rows.entropy + row, 0.0)
        if rows.predicted is not None:
            tl.store(rows.predicted + row, -1)


@triton.jit
def sum_and_store(row, row_ptr, target, weights, rows, shards_ptr, workspace, numbers, V, v0, num_classes,
                  tiles_per_slice, stride_v, VECTOR: tl.constexpr, K: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Sums this program's slice of the row. True, and the row is stored, in the program that finishes the row."""
    SHARD: tl.constexpr = shards_ptr is not None
    PREDICTED: tl.constexpr = SHARD or rows.predicted is not None
    ENTROPY: tl.constexpr = SHARD or rows.entropy is not None
    RUNNING_MAX: tl.constexpr = PREDICTED or ENTROPY
    SMOOTHING: tl.constexpr = numbers.smoothing is not None
    weight_ptr = None if weights.per_class is None or numbers.smoothing is None else weights.per_class + v0
    multiplier = numbers.multiplier
    squash = numbers.squash

    # a target out of range makes a row of NaN; a target that another shard owns adds nothing to this one
    hole = walk.owned_column(target, v0, V)
    x = tl.load(row_ptr + hole.to(tl.int64) * stride_v, mask=hole >= 0, other=0.0)
    a_target, _ = primitives.cap(x.to(tl.float32), squash)
    a_target = tl.where(hole >= 0, a_target, float("-inf") if SHARD else float("nan"))
    first_tile = tl.program_id(1) * tiles_per_slice
    reference, s, q, d, column = walk.sum_row(
        row_ptr, weight_ptr, hole, a_target, multiplier, squash, V, stride_v, first_tile, first_tile + tiles_per_slice,
        RUNNING_MAX, ENTROPY, PREDICTED, SMOOTHING, VECTOR, K, T,
    )  # fmt: skip

    finished = True
    if workspace.partials is not None:
        combine.store_slice(workspace.partials, row, reference, s, q, d, column)
        finished = combine.arrive(workspace.counters + 1 + row, tl.num_programs(1))
        if finished:
            reference, s, q, d, column = combine.load_slices(workspace.partials, row, multiplier, V, RUNNING_MAX)
    if finished:
        z2, origin, fixed, s, q, d, column = settle_row(
            row_ptr, weight_ptr, hole, a_target, reference, s, q, d, column, multiplier, squash, V, stride_v,
            RUNNING_MAX, SMOOTHING, VECTOR, T,
        )  # fmt: skip
        if SHARD:
            store_shard(shards_ptr, row, origin, s, q, d, z2, hole >= 0, column)
        else:
            class_weight, token_weight = class_weights.of_target(row, target, weights, num_classes)
            store_row(
                row, rows, s, q, d, column, origin, fixed, z2, class_weight, token_weight,
                class_weights.total(weights, num_classes), numbers, num_classes,
            )  # fmt: skip
    return finished


# integers are never specialized: one binary serves every V, stride and offset
_INTEGERS = ["ignore_index", "R", "V", "v0", "num_classes", "tiles_per_slice", "stride_b", "stride_r", "stride_v"]


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=["logits_ptr"])
def nll_forward_kernel(
    logits_ptr, target_ptr, weights,  # inputs
    rows, sums, shards_ptr, workspace,  # outputs
    numbers, ignore_index,  # scalars
    R, V, v0, num_classes, tiles_per_slice,  # sizes
    stride_b, stride_r, stride_v,  # strides
    SUMS: tl.constexpr, MEAN: tl.constexpr, VECTOR: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    finished = tl.program_id(1) == 0

    # leaves at once, whatever the logits hold
    if walk.is_ignored(target, ignore_index):
        if finished:
            store_ignored(row, rows, shards_ptr)
    else:
        row_ptr = walk.row_pointer(logits_ptr, row, R, stride_b, stride_r)
        finished = sum_and_store(
            row, row_ptr, target, weights, rows, shards_ptr, workspace, numbers, V, v0, num_classes, tiles_per_slice,
            stride_v, VECTOR, K, T,
        )  # fmt: skip

    # nested, because `and` would let every program arrive
    if SUMS:  # noqa: SIM102
        if finished:  # noqa: SIM102
            if combine.arrive(workspace.counters, tl.num_programs(0)):
                combine.finish_sums(rows, sums, numbers, tl.num_programs(0), MEAN, T)


def launch_nll_forward(
    logits: Tensor,  # (B, R, V), any strides; row n = b * R + r
    target: Tensor,  # (N,) int32 or int64
    weights: Weights,
    rows: Rows,
    sums: Sums | None,
    workspace: Workspace,
    numbers: Numbers,
    *,
    config: LaunchConfig,
    ignore_index: int | None,
    mean: bool = True,
    v0: int = 0,
    num_classes: int | None = None,
    shards: Tensor | None = None,  # (N, SHARD_FIELDS) fp64
) -> None:
    """Writes `rows`, and `sums` of all rows if given. Columns of `logits` are classes v0, v0 + 1, ... of num_classes.

    With `shards` it writes there, and nowhere else, the statistics of a part of the vocabulary (`store_shard`).
    """
    B, R, V = logits.shape
    if B * R == 0:
        return
    stride_b, stride_r, stride_v = logits.stride()
    vector = stride_v == 1
    with on_device(logits):
        nll_forward_kernel[(B * R, config.slices)](
            logits_ptr=logits, target_ptr=target, weights=weights,
            rows=rows, sums=sums, shards_ptr=shards, workspace=workspace,
            numbers=numbers, ignore_index=ignore_index,
            R=R, V=V, v0=v0, num_classes=num_classes or V, tiles_per_slice=config.tiles_per_slice,
            stride_b=stride_b, stride_r=stride_r, stride_v=stride_v,
            SUMS=sums is not None, MEAN=mean,
            VECTOR=vector, K=config.vectors * (1 if vector else 16 // logits.itemsize), T=config.threads,
            num_warps=config.num_warps, enable_fp_fusion=False, **config.compiler_options,
        )  # fmt: skip
