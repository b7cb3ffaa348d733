# SPDX-License-Identifier: Apache-2.0
"""A chunk of the fused head's logits to the results of its rows and, over the logits, to their gradient.

The formulas and the code are those of nll_forward.py and nll_backward.py. The upstream gradient is one
number, because the head needs the gradient of S. It multiplies by the factor of the loss after all chunks.

Grid: (N rows,). Order of the passes of a program, which has a row for itself:

1. It reads the row and sums it. nll and lse need what all threads have read, so they wait for every load.
2. It reads the row again, from L2, and overwrites it with the gradient. Without an upstream gradient it does not.

Traffic, for logits of b bytes: N * V * b read and N * V * b written, 20 bytes per row written. The obvious way launches
the two kernels one after the other. It reads N * V * b once more, because all rows together do not fit into L2. A row
is not split, because its slices would have to wait for each other between the passes. So few rows are processed at a
time that L2 holds them (`launch.choose_two_pass_config`).

The target's logit is an argument, an fp32 dot product. The chunk holds it rounded to the dtype of the products, and the
kernel never uses that number: not in the sum, not for the argmax, not for the slope of a softcap.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import loss_weights, nll_backward, nll_forward, row_formula, row_sums, row_tiles
from fused_ppl.kernels.launch import LaunchConfig, LossScalars, Rows, Weights, on_device


@triton.jit
def forward_backward_row(row, row_ptr, target, target_logit, weights, rows, upstream, scalars, V, K: tl.constexpr,
                         T: tl.constexpr):  # fmt: skip
    """Both passes over one row."""
    STATS: tl.constexpr = rows.predicted is not None
    SMOOTHING: tl.constexpr = scalars.smoothing is not None
    weight_ptr = None if weights.per_class is None or scalars.smoothing is None else weights.per_class
    scale_log2 = scalars.scale_log2
    tanh_scale = scalars.tanh_scale

    # a target out of range makes the row NaN
    target_column = row_tiles.find_target_column(target, 0, V)
    target_logit = tl.where(target_column >= 0, target_logit, float("nan"))
    capped_target, _ = row_formula.cap(target_logit, tanh_scale)
    shift, sum_exp, sum_exp_t, sum_w_t, argmax = row_sums.sum_row(
        row_ptr, weight_ptr, target_column, capped_target, scale_log2, tanh_scale, V, 1, 0, V + 1,
        STATS, STATS, STATS, SMOOTHING, True, K, T,
    )  # fmt: skip
    target_z2, shift2, w_shift2, sum_exp, sum_exp_t, sum_w_t, argmax = row_sums.finish_row_sums(
        row_ptr, weight_ptr, target_column, capped_target, shift, sum_exp, sum_exp_t, sum_w_t, argmax, scale_log2,
        tanh_scale, V, 1, STATS, SMOOTHING, True, T,
    )  # fmt: skip
    class_weight, token_weight = loss_weights.load_target_weights(row, target, weights, V)
    nll, lse = nll_forward.store_row(
        row, rows, sum_exp, sum_exp_t, sum_w_t, argmax, shift2, w_shift2, target_z2, class_weight, token_weight,
        loss_weights.class_weight_sum(weights, V), scalars, V,
    )  # fmt: skip

    # nothing is overwritten too early: nll and lse depend on every load above, and every store below on them
    if upstream is not None:
        at_target, A, C, lse2, scale_log2, _ = nll_backward.row_factors(
            upstream, upstream, class_weight, token_weight, weights, nll, lse, scalars, V
        )
        nll_backward.gradient_row(
            row_ptr, row_ptr, weight_ptr, target_column, None if tanh_scale is None else target_logit, at_target, A, C,
            lse2, scale_log2, scalars, V, 1, 1, 0, V + 1, True, K, T,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index", "V", "stride_n"], do_not_specialize_on_alignment=["logits_ptr"])
def nll_forward_backward_kernel(
    logits_ptr,  # input and output
    target_logit_ptr, target_ptr, weights,  # inputs
    rows,  # outputs
    upstream, scalars, ignore_index,  # scalars
    V,  # sizes
    stride_n,  # strides
    K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_n
    target = tl.load(target_ptr + row)

    # an ignored row is not read: its logits may be NaN
    if row_tiles.is_ignored(target, ignore_index):
        nll_forward.store_ignored(row, rows, None)
        if upstream is not None:
            nll_backward.zero_row(row_ptr, 0, V + 1, V, 1, True, K, T)
    else:
        target_logit = tl.load(target_logit_ptr + row)
        forward_backward_row(row, row_ptr, target, target_logit, weights, rows, upstream, scalars, V, K, T)


def launch_nll_forward_backward(
    logits: Tensor,  # (N, V), stride(1) = 1
    target: Tensor,  # (N,) int32 or int64
    weights: Weights,
    scalars: LossScalars,
    *,
    target_logit: Tensor,  # (N,) fp32: takes the place of logits[n, target[n]]
    rows: Rows,
    upstream: float | None,
    config: LaunchConfig,
    ignore_index: int | None,
) -> None:
    """Writes `rows` and overwrites the logits with upstream * d(S + z_loss * Z)/dx, if `upstream` is not None."""
    N, V = logits.shape
    if N == 0:
        return
    with on_device(logits):
        nll_forward_backward_kernel[(N,)](
            logits_ptr=logits,
            target_logit_ptr=target_logit, target_ptr=target, weights=weights,
            rows=rows,
            upstream=upstream, scalars=scalars, ignore_index=ignore_index,
            V=V,
            stride_n=logits.stride(0),
            K=config.vectors, T=config.threads,
            num_warps=config.num_warps, enable_fp_fusion=False, **config.compiler_options,
        )  # fmt: skip
