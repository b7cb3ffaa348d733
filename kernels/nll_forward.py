# SPDX-License-Identifier: Apache-2.0
"""Logits to the loss: nll, lse and the loss of each row, then S, M, Z, the mean and the perplexity, in one launch.

    nll  = lse - z[y] = ln(1 + sum_{v != y} e^(z[v] - z[y]))
    loss = token_weight * ((1 - smoothing) * w[y] * nll + smoothing / V * sum_v w[v] * (lse - z[v]))

Grid: (N rows, slices of a row). Order of the passes:

1. Each program reads its slice of the logits once and keeps its sums in registers (`row_sums.sum_row`).
2. If rows are split, the program that finishes the last slice of a row adds the slices (grid_reduction.py).
3. That program stores the row. If the sum has overflowed or lost digits, it first reads the row again (row_sums.py).
4. The program that finishes the last row adds all rows and stores the loss.

Traffic, for logits of b bytes: N * V * b read, 20 bytes per row written, 12 more with statistics. Rows are split into
slices only if N programs do not fill the device. The obvious way, log_softmax and then a gather, writes N * V numbers
and reads them again.

A shard of the vocabulary writes its sums instead of rows, and `fused_ppl/backends/shards.py` merges the shards.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import elementary, grid_reduction, loss_weights, row_formula, row_sums, row_tiles
from fused_ppl.kernels.launch import (
    SHARD_FIELDS,
    LaunchConfig,
    LossScalars,
    Rows,
    Totals,
    Weights,
    Workspace,
    on_device,
)

_SHARD_FIELDS = tl.constexpr(SHARD_FIELDS)


@triton.jit
def store_row(row, rows, sum_exp, sum_exp_t, sum_w_t, argmax, shift2, w_shift2, target_z2, class_weight, token_weight,
              class_weight_sum, scalars, num_classes):  # fmt: skip
    """Computes the results of a row from its sums and stores them. Returns nll and lse."""
    target_t = target_z2 - shift2
    nll2, log2_sum = row_formula.nll_of_sum(sum_exp, target_t)
    lse2 = shift2 + log2_sum
    nll = (nll2 * elementary.LN2).to(tl.float32)
    loss = class_weight * nll
    if scalars.smoothing is not None:
        sum_w_t = sum_w_t.to(tl.float64) + class_weight * (target_z2 - w_shift2)
        smoothing_sum = (class_weight_sum * (lse2 - w_shift2) - sum_w_t).to(tl.float32)  # sum_v w[v] * (lse - z[v])
        loss = (1.0 - scalars.smoothing) * loss + smoothing_sum * (scalars.smoothing / num_classes * elementary.LN2)
    tl.store(rows.loss + row, token_weight * loss)
    tl.store(rows.weight + row, token_weight * class_weight)
    lse = lse2 * elementary.LN2
    tl.store(rows.nll + row, nll)
    tl.store(rows.lse + row, lse)
    if rows.entropy is not None:
        tl.store(rows.entropy + row, row_formula.entropy_of_sum(sum_exp, sum_exp_t, target_t, log2_sum))
    if rows.predicted is not None:
        tl.store(rows.predicted + row, argmax.to(tl.int64))
    return nll, lse


@triton.jit
def store_shard(shards_ptr, row, shift2, sum_exp, sum_exp_t, sum_w_t, target_z2, owned, argmax):
    """Stores the SHARD_FIELDS of a row, in nats. The sums leave the target out, so that a small sum stays exact."""
    ptr = shards_ptr + row.to(tl.int64) * _SHARD_FIELDS
    tl.store(ptr, shift2 * elementary.LN2)
    tl.store(ptr + 1, sum_exp)
    tl.store(ptr + 2, tl.where(owned, target_z2 * elementary.LN2, 0.0))
    tl.store(ptr + 3, sum_w_t.to(tl.float64) * elementary.LN2)
    tl.store(ptr + 4, sum_exp_t * elementary.LN2)
    tl.store(ptr + 5, argmax)


@triton.jit
def store_ignored(row, rows, shards_ptr):
    """Stores the results of a row that does not count: zeros, and -1 as the predicted class."""
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
def forward_row(row, row_ptr, target, weights, rows, shards_ptr, workspace, scalars, V, first_class, num_classes,
                tiles_per_slice, stride_v, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Sums this program's slice of the row. Returns True in the program that finishes the row, which has stored it."""
    SHARD: tl.constexpr = shards_ptr is not None
    PREDICTED: tl.constexpr = SHARD or rows.predicted is not None
    ENTROPY: tl.constexpr = SHARD or rows.entropy is not None
    RUNNING_MAX: tl.constexpr = PREDICTED or ENTROPY
    SMOOTHING: tl.constexpr = scalars.smoothing is not None
    weight_ptr = None if weights.per_class is None or scalars.smoothing is None else weights.per_class + first_class
    scale_log2 = scalars.scale_log2
    tanh_scale = scalars.tanh_scale

    # a target out of range makes the row NaN; a target in another shard adds nothing to this one
    target_column = row_tiles.find_target_column(target, first_class, V)
    target_logit = tl.load(row_ptr + target_column.to(tl.int64) * stride_v, mask=target_column >= 0, other=0.0)
    capped_target, _ = row_formula.cap(target_logit.to(tl.float32), tanh_scale)
    capped_target = tl.where(target_column >= 0, capped_target, float("-inf") if SHARD else float("nan"))
    first_tile = tl.program_id(1) * tiles_per_slice
    shift, sum_exp, sum_exp_t, sum_w_t, argmax = row_sums.sum_row(
        row_ptr, weight_ptr, target_column, capped_target, scale_log2, tanh_scale, V, stride_v, first_tile,
        first_tile + tiles_per_slice, RUNNING_MAX, ENTROPY, PREDICTED, SMOOTHING, CONTIGUOUS, K, T,
    )  # fmt: skip

    finished = True
    if workspace.partials is not None:
        grid_reduction.store_slice(workspace.partials, row, shift, sum_exp, sum_exp_t, sum_w_t, argmax)
        finished = grid_reduction.arrive(workspace.counters + 1 + row, tl.num_programs(1))
        if finished:
            shift, sum_exp, sum_exp_t, sum_w_t, argmax = grid_reduction.load_slices(
                workspace.partials, row, scale_log2, V, RUNNING_MAX
            )
    if finished:
        target_z2, shift2, w_shift2, sum_exp, sum_exp_t, sum_w_t, argmax = row_sums.finish_row_sums(
            row_ptr, weight_ptr, target_column, capped_target, shift, sum_exp, sum_exp_t, sum_w_t, argmax, scale_log2,
            tanh_scale, V, stride_v, RUNNING_MAX, SMOOTHING, CONTIGUOUS, T,
        )  # fmt: skip
        if SHARD:
            store_shard(shards_ptr, row, shift2, sum_exp, sum_exp_t, sum_w_t, target_z2, target_column >= 0, argmax)
        else:
            class_weight, token_weight = loss_weights.load_target_weights(row, target, weights, num_classes)
            store_row(
                row, rows, sum_exp, sum_exp_t, sum_w_t, argmax, shift2, w_shift2, target_z2, class_weight, token_weight,
                loss_weights.class_weight_sum(weights, num_classes), scalars, num_classes,
            )  # fmt: skip
    return finished


# Triton does not specialise on these integers, so that one binary serves every V, stride and offset
_INTEGERS = ["ignore_index", "R", "V", "first_class", "num_classes", "tiles_per_slice"]
_INTEGERS += ["stride_b", "stride_r", "stride_v"]


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=["logits_ptr"])
def nll_forward_kernel(
    logits_ptr, target_ptr, weights,  # inputs
    rows, totals, shards_ptr, workspace,  # outputs
    scalars, ignore_index,  # scalars
    R, V, first_class, num_classes, tiles_per_slice,  # sizes
    stride_b, stride_r, stride_v,  # strides
    HAS_TOTALS: tl.constexpr, MEAN: tl.constexpr, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    finished = tl.program_id(1) == 0

    # an ignored row is not read: its logits may be NaN
    if row_tiles.is_ignored(target, ignore_index):
        if finished:
            store_ignored(row, rows, shards_ptr)
    else:
        row_ptr = row_tiles.row_pointer(logits_ptr, row, R, stride_b, stride_r)
        finished = forward_row(
            row, row_ptr, target, weights, rows, shards_ptr, workspace, scalars, V, first_class, num_classes,
            tiles_per_slice, stride_v, CONTIGUOUS, K, T,
        )  # fmt: skip

    # these conditions are nested because `and` in a kernel evaluates both sides, and every program would arrive
    if HAS_TOTALS:  # noqa: SIM102
        if finished:  # noqa: SIM102
            if grid_reduction.arrive(workspace.counters, tl.num_programs(0)):
                grid_reduction.finish_loss(rows, totals, scalars, tl.num_programs(0), MEAN, T)


def launch_nll_forward(
    logits: Tensor,  # (B, R, V), any strides; row n = b * R + r
    target: Tensor,  # (N,) int32 or int64
    weights: Weights,
    scalars: LossScalars,
    *,
    rows: Rows,
    totals: Totals | None,
    workspace: Workspace,
    config: LaunchConfig,
    ignore_index: int | None,
    mean: bool = True,
    first_class: int = 0,
    num_classes: int | None = None,
    shards: Tensor | None = None,  # (N, SHARD_FIELDS) fp64
) -> None:
    """Writes `rows`, and `totals` if given. The columns of `logits` are classes first_class, first_class + 1, ...

    If `shards` is given, the logits are a shard of num_classes. Its sums go to `shards`, and nothing else is written.
    """
    B, R, V = logits.shape
    if B * R == 0:
        return
    stride_b, stride_r, stride_v = logits.stride()
    contiguous = stride_v == 1
    with on_device(logits):
        nll_forward_kernel[(B * R, config.slices)](
            logits_ptr=logits, target_ptr=target, weights=weights,
            rows=rows, totals=totals, shards_ptr=shards, workspace=workspace,
            scalars=scalars, ignore_index=ignore_index,
            R=R, V=V, first_class=first_class, num_classes=num_classes or V, tiles_per_slice=config.tiles_per_slice,
            stride_b=stride_b, stride_r=stride_r, stride_v=stride_v,
            HAS_TOTALS=totals is not None, MEAN=mean,
            CONTIGUOUS=contiguous, K=config.vectors * (1 if contiguous else 16 // logits.itemsize), T=config.threads,
            num_warps=config.num_warps, enable_fp_fusion=False, **config.compiler_options,
        )  # fmt: skip
