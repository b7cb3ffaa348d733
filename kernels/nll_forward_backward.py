# SPDX-License-Identifier: Apache-2.0
"""A chunk of the fused LM head's logits to the statistics of its rows and, in its own memory, its gradient.

Grid: (N rows,), all of a row in one program, which goes over it twice: it reads and writes N * V logits once, and reads
them a second time from L2. The mathematics: README.md#forward-and-backward-in-one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import nll_backward, nll_forward, primitives, walk
from fused_ppl.kernels import weights as class_weights
from fused_ppl.kernels.launch import LaunchConfig, Numbers, Rows, Weights, on_device


@triton.jit
def sum_and_differentiate(row, row_ptr, target, x_target, weights, rows, upstream, numbers, V, K: tl.constexpr,
                          T: tl.constexpr):  # fmt: skip
    STATS: tl.constexpr = rows.predicted is not None
    SMOOTHING: tl.constexpr = numbers.smoothing is not None
    weight_ptr = None if weights.per_class is None or numbers.smoothing is None else weights.per_class
    multiplier = numbers.multiplier
    squash = numbers.squash

    # a target out of range makes a row of NaN
    hole = walk.owned_column(target, 0, V)
    x_target = tl.where(hole >= 0, x_target, float("nan"))
    a_target, _ = primitives.cap(x_target, squash)
    reference, s, q, d, column = walk.sum_row(
        row_ptr, weight_ptr, hole, a_target, multiplier, squash, V, 1, 0, V + 1, STATS, STATS, STATS, SMOOTHING,
        True, K, T,
    )  # fmt: skip
    z2, origin, fixed, s, q, d, column = nll_forward.settle_row(
        row_ptr, weight_ptr, hole, a_target, reference, s, q, d, column, multiplier, squash, V, 1,
        STATS, SMOOTHING, True, T,
    )  # fmt: skip
    class_weight, token_weight = class_weights.of_target(row, target, weights, V)
    nll, lse = nll_forward.store_row(
        row, rows, s, q, d, column, origin, fixed, z2, class_weight, token_weight, class_weights.total(weights, V),
        numbers, V,
    )  # fmt: skip

    # in place: nll and lse wait for what every thread has read, and all that is written below is made of them
    if upstream is not None:
        at_target, A, C, lse2, multiplier = nll_backward.row_factors(
            upstream, upstream, class_weight, token_weight, weights, nll, lse, numbers, V
        )
        nll_backward.gradient_row(
            row_ptr, row_ptr, weight_ptr, hole, None if squash is None else x_target, at_target, A, C, lse2,
            multiplier, numbers, V, 1, 1, 0, V + 1, True, K, T,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index", "V", "stride_n"], do_not_specialize_on_alignment=["logits_ptr"])
def nll_forward_backward_kernel(
    logits_ptr,  # input and output
    target_logit_ptr, target_ptr, weights,  # inputs
    rows,  # outputs
    upstream, numbers, ignore_index,  # scalars
    V,  # sizes
    stride_n,  # strides
    K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_n
    target = tl.load(target_ptr + row)

    # leaves at once, whatever the logits hold
    if walk.is_ignored(target, ignore_index):
        nll_forward.store_ignored(row, rows, None)
        if upstream is not None:
            nll_backward.zero_row(row_ptr, 0, V + 1, V, 1, True, K, T)
    else:
        x_target = tl.load(target_logit_ptr + row)
        sum_and_differentiate(row, row_ptr, target, x_target, weights, rows, upstream, numbers, V, K, T)


def launch_nll_forward_backward(
    logits: Tensor,  # (N, V), the classes of a row neighbours
    target_logit: Tensor,  # (N,) fp32: takes the place of logits[n, target[n]], which are not looked at
    target: Tensor,  # (N,) int32 or int64
    weights: Weights,
    rows: Rows,
    numbers: Numbers,
    *,
    upstream: float | None,
    config: LaunchConfig,
    ignore_index: int | None,
) -> None:
    """Writes `rows` and, unless `upstream` is None, over the logits `upstream` times the gradient of S + z_loss * Z."""
    N, V = logits.shape
    if N == 0:
        return
    with on_device(logits):
        nll_forward_backward_kernel[(N,)](
            logits_ptr=logits,
            target_logit_ptr=target_logit, target_ptr=target, weights=weights,
            rows=rows,
            upstream=upstream, numbers=numbers, ignore_index=ignore_index,
            V=V,
            stride_n=logits.stride(0),
            K=config.vectors, T=config.threads, num_warps=config.num_warps, enable_fp_fusion=False, **config.compiler_options,
        )  # fmt: skip
