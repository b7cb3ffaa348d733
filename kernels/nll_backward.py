# SPDX-License-Identifier: Apache-2.0
"""Logits, lse and the upstream gradients of each row to the gradient of the logits, in place or not.

    p[v]  = lse_factor * 2^(capped[v] * scale_log2 - lse2)
    dx[v] = (A * p[v] - C * w[v] - B * [v = y]) * logit_scale * (1 - (z[v] / softcap)^2)
    dx[y] = (A * expm1(-nll) + (A - B) - C * w[y]) * logit_scale * (1 - (z[y] / softcap)^2)

A, B and C are numbers of the row (`row_formula.gradient_coefficients`). expm1(-nll) is p[y] - 1 without a subtraction
that loses digits. Without a softcap the last factor is 1. The kernel reads the upstream gradients from the device, so
that the host waits for nothing.

Grid: (N rows, slices of a row). Each program reads and writes its slice once. Traffic, for logits of b bytes: N * V * b
read and N * V * b written, and about 24 bytes per row read. The programs take the rows in reverse order, because L2
still holds the rows that forward has read last.

Forward and backward together make three passes over the logits. Fewer are not possible for a perplexity, because its
factor PPL / M is known only after the last row. The obvious alternative stores the gradient in forward and multiplies
it in backward, which makes four passes. `tests/test_kernels.py::test_three_passes_over_the_logits` counts the bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import loss_weights, row_formula, row_tiles
from fused_ppl.kernels.launch import LaunchConfig, LossScalars, Upstream, Weights, on_device, same_alignment


@triton.jit
def zero_row(out_ptr, first_tile, stop_tile, V, stride_v, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """Writes zeros to tiles [first_tile, stop_tile) of an ignored row, and to its edges."""
    L: tl.constexpr = row_tiles.VECTOR_BYTES * 8 // out_ptr.dtype.element_ty.primitive_bitwidth if CONTIGUOUS else 1
    TILE: tl.constexpr = K * T * L
    body_ptr, prefix, body_len = row_tiles.find_body(out_ptr, V, CONTIGUOUS, L)
    zeros = tl.zeros((K, T, L), tl.float32)
    for tile in range(first_tile, tl.minimum(tl.cdiv(body_len, TILE), stop_tile)):
        row_tiles.store_tile(body_ptr, zeros, tile, body_len, stride_v, CONTIGUOUS, K, T, L)
    if CONTIGUOUS:
        offs_v, valid = row_tiles.edge_columns(prefix, body_len, V, first_tile, T)
        tl.store(out_ptr + offs_v, tl.zeros((1, T, 1), out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def row_factors(dloss, dz_loss, class_weight, token_weight, weights, nll, lse, scalars, num_classes):
    """What `gradient_row` needs of a row: (at_target, A, C, lse2, scale_log2, lse_factor). A has lse_factor in it."""
    class_weight_sum = loss_weights.class_weight_sum(weights, num_classes)
    A, A_minus_B, C = row_formula.gradient_coefficients(
        dloss, dz_loss, class_weight, token_weight, class_weight_sum, lse.to(tl.float32), scalars, num_classes
    )
    at_target = row_formula.gradient_at_target(
        nll, class_weight, A, A_minus_B, None if scalars.smoothing is None else C
    )
    lse_factor, lse2, scale_log2 = row_formula.split_lse(lse, nll, scalars.scale_log2)
    return at_target, A * lse_factor, C, lse2, scale_log2, lse_factor


@triton.jit
def gradient_row(row_ptr, out_ptr, weight_ptr, target_column, target_logit, at_target, A, C, lse2, scale_log2, scalars,
                 V, stride_v, stride_out_v, first_tile, stop_tile, CONTIGUOUS: tl.constexpr, K: tl.constexpr,
                 T: tl.constexpr, E=None):  # fmt: skip
    """Writes tiles [first_tile, stop_tile) of a row's gradient, and the edges with tile 0.

    It writes each element once, after it has read it, so that `out_ptr` may be `row_ptr`. `target_logit` replaces the
    target's logit in the row; None means that the row holds the right one.
    """
    L: tl.constexpr = row_tiles.VECTOR_BYTES * 8 // row_ptr.dtype.element_ty.primitive_bitwidth if CONTIGUOUS else 1
    TILE: tl.constexpr = K * T * L
    tanh_scale = scalars.tanh_scale
    C = None if scalars.smoothing is None else C
    body_ptr, prefix, body_len = row_tiles.find_body(row_ptr, V, CONTIGUOUS, L)
    out_body_ptr, _, _ = row_tiles.find_body(out_ptr, V, CONTIGUOUS, L)
    last_tile, target_tile, segments = row_tiles.find_segments(
        target_column, prefix, body_len, first_tile, stop_tile, TILE
    )
    for segment in range(segments):
        begin, end, limit = row_tiles.segment_bounds(
            segment, segments, first_tile, last_tile, stop_tile, target_tile, body_len
        )
        for tile in range(begin, end):
            logits = row_tiles.load_tile(body_ptr, tile, None, stride_v, CONTIGUOUS, K, T, L)
            capped, slope = row_formula.cap(logits, tanh_scale)
            w = loss_weights.load_tile_weights(weight_ptr, prefix, tile, None, K, T, L)
            g = row_formula.gradient(capped, slope, w, scale_log2, lse2, A, C, None, at_target, E)
            row_tiles.store_tile(out_body_ptr, g, tile, None, stride_out_v, CONTIGUOUS, K, T, L)
        logits = row_tiles.load_tile(body_ptr, end, limit, stride_v, CONTIGUOUS, K, T, L)
        is_target = row_tiles.offsets(end, K, T, L) == target_column - prefix
        logits = logits if target_logit is None else tl.where(is_target, target_logit, logits)
        capped, slope = row_formula.cap(logits, tanh_scale)
        w = loss_weights.load_tile_weights(weight_ptr, prefix, end, limit, K, T, L)
        g = row_formula.gradient(capped, slope, w, scale_log2, lse2, A, C, is_target, at_target, E)
        row_tiles.store_tile(out_body_ptr, g, end, limit, stride_out_v, CONTIGUOUS, K, T, L)
    if CONTIGUOUS:
        offs_v, valid = row_tiles.edge_columns(prefix, body_len, V, first_tile, T)
        logits = tl.load(row_ptr + offs_v, mask=valid, other=0.0).to(tl.float32)
        is_target = offs_v == target_column
        logits = logits if target_logit is None else tl.where(is_target, target_logit, logits)
        capped, slope = row_formula.cap(logits, tanh_scale)
        w = loss_weights.load_column_weights(weight_ptr, offs_v, valid)
        g = row_formula.gradient(capped, slope, w, scale_log2, lse2, A, C, is_target, at_target, E)
        tl.store(out_ptr + offs_v, g.to(out_ptr.dtype.element_ty), mask=valid)


_INTEGERS = ["ignore_index", "R", "V", "first_class", "num_classes", "tiles_per_slice"]
_INTEGERS += ["stride_b", "stride_r", "stride_v", "stride_out_b", "stride_out_r", "stride_out_v"]
_INTEGERS += ["stride_dloss", "stride_dz_loss"]


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=["logits_ptr", "out_ptr"])
def nll_backward_kernel(
    logits_ptr, target_ptr, lse_ptr, nll_ptr, upstream, weights,  # inputs
    out_ptr,  # output
    scalars, ignore_index,  # scalars
    R, V, first_class, num_classes, tiles_per_slice,  # sizes
    stride_b, stride_r, stride_v, stride_out_b, stride_out_r, stride_out_v, stride_dloss, stride_dz_loss,  # strides
    CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    first_tile = tl.program_id(1) * tiles_per_slice
    stop_tile = first_tile + tiles_per_slice
    target = tl.load(target_ptr + row)
    out_ptr = row_tiles.row_pointer(out_ptr, row, R, stride_out_b, stride_out_r)

    # an ignored row is not read: its logits may be NaN
    if row_tiles.is_ignored(target, ignore_index):
        zero_row(out_ptr, first_tile, stop_tile, V, stride_out_v, CONTIGUOUS, K, T)
    else:
        row_ptr = row_tiles.row_pointer(logits_ptr, row, R, stride_b, stride_r)
        target_column = row_tiles.find_target_column(target, first_class, V)
        weight_ptr = None if weights.per_class is None or scalars.smoothing is None else weights.per_class + first_class
        class_weight, token_weight = loss_weights.load_target_weights(row, target, weights, num_classes)
        dloss = tl.load(upstream.dloss + row.to(tl.int64) * stride_dloss)
        dz_loss = None
        if scalars.z_loss is not None:
            dz_loss = tl.load(upstream.dz_loss + row.to(tl.int64) * stride_dz_loss)
        nll = tl.load(nll_ptr + row)
        at_target, A, C, lse2, scale_log2, lse_factor = row_factors(
            dloss, dz_loss, class_weight, token_weight, weights, nll, tl.load(lse_ptr + row), scalars, num_classes,
        )  # fmt: skip
        E, dlse, dentropy, entropy = None, tl.zeros_like(nll), None, None
        if upstream.dlse is not None:
            dlse = tl.load(upstream.dlse + row) * scalars.logit_scale
        if upstream.dentropy is not None:
            dentropy, entropy = tl.load(upstream.dentropy + row) * scalars.logit_scale, tl.load(upstream.entropy + row)
        if upstream.dlse is not None or upstream.dentropy is not None:
            at_target, A, E = row_formula.add_statistics(at_target, A, lse_factor, nll, dlse, dentropy, entropy)
        # nearly all rows use the scale_log2 of the launch; it is a kernel argument and saves their loop a register
        if scale_log2 == scalars.scale_log2:
            gradient_row(
                row_ptr, out_ptr, weight_ptr, target_column, None, at_target, A, C, lse2, scalars.scale_log2, scalars,
                V, stride_v, stride_out_v, first_tile, stop_tile, CONTIGUOUS, K, T, E,
            )  # fmt: skip
        else:
            gradient_row(
                row_ptr, out_ptr, weight_ptr, target_column, None, at_target, A, C, lse2, scale_log2, scalars, V,
                stride_v, stride_out_v, first_tile * K, stop_tile * K, CONTIGUOUS, 1, T, E,
            )  # fmt: skip


def launch_nll_backward(
    logits: Tensor,  # (B, R, V), any strides; row n = b * R + r
    target: Tensor,  # (N,) int32 or int64
    weights: Weights,
    scalars: LossScalars,
    *,
    lse: Tensor,  # (N,) fp64
    nll: Tensor,  # (N,) fp32
    upstream: Upstream,
    out: Tensor,  # (B, R, V), the dtype of logits; in place if it is the logits themselves
    config: LaunchConfig,
    ignore_index: int | None,
    first_class: int = 0,
    num_classes: int | None = None,
) -> None:
    """Writes the gradient of the logits. Their columns are classes first_class, first_class + 1, ... of num_classes."""
    B, R, V = logits.shape
    if B * R == 0:
        return
    stride_b, stride_r, stride_v = logits.stride()
    stride_out_b, stride_out_r, stride_out_v = out.stride()
    contiguous = stride_v == 1 and same_alignment(logits, out)
    with on_device(logits):
        nll_backward_kernel[(B * R, config.slices)](
            logits_ptr=logits, target_ptr=target, lse_ptr=lse, nll_ptr=nll, upstream=upstream, weights=weights,
            out_ptr=out,
            scalars=scalars, ignore_index=ignore_index,
            R=R, V=V, first_class=first_class, num_classes=num_classes or V, tiles_per_slice=config.tiles_per_slice,
            stride_b=stride_b, stride_r=stride_r, stride_v=stride_v,
            stride_out_b=stride_out_b, stride_out_r=stride_out_r, stride_out_v=stride_out_v,
            stride_dloss=upstream.dloss.stride(0),
            stride_dz_loss=0 if upstream.dz_loss is None else upstream.dz_loss.stride(0),
            CONTIGUOUS=contiguous, K=config.vectors * (1 if contiguous else 16 // logits.itemsize), T=config.threads,
            num_warps=config.num_warps, enable_fp_fusion=False, **config.compiler_options,
        )  # fmt: skip
