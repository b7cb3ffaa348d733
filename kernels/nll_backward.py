# SPDX-License-Identifier: Apache-2.0
"""Logits, lse and one upstream factor a row to the gradient of the logits, in place or not.

Grid: (N rows, slices of a row), rows in reverse, so that what the forward read last is still in L2. Reads and writes
N * V logits once. The mathematics: README.md#backward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import primitives, tiles, walk
from fused_ppl.kernels import weights as class_weights
from fused_ppl.kernels.launch import LaunchConfig, Numbers, Upstream, Weights, on_device, same_alignment


@triton.jit
def zero_row(out_ptr, first_tile, stop_tile, V, stride_v, VECTOR: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    L: tl.constexpr = walk.VECTOR_BYTES * 8 // out_ptr.dtype.element_ty.primitive_bitwidth if VECTOR else 1
    TILE: tl.constexpr = K * T * L
    body_ptr, head, body = walk.find_body(out_ptr, V, VECTOR, L)
    zeros = tl.zeros((K, T, L), tl.float32)
    for tile in range(first_tile, tl.minimum(tl.cdiv(body, TILE), stop_tile)):
        walk.store_tile(body_ptr, zeros, tile, body, stride_v, VECTOR, K, T, L)
    if VECTOR:
        offs_v, valid = walk.edge_columns(head, body, V, first_tile, T)
        tl.store(out_ptr + offs_v, tl.zeros((1, T, 1), out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def row_factors(of_s, of_z, class_weight, token_weight, weights, nll, lse, numbers, num_classes):
    """The gradient at the target; A, C, lse in base 2 and the multiplier for all others."""
    weight_sum = class_weights.total(weights, num_classes)
    A, spread, C = primitives.coefficients(
        of_s, of_z, class_weight, token_weight, weight_sum, lse.to(tl.float32), numbers, num_classes
    )
    at_target = primitives.gradient_at_target(nll, class_weight, A, spread, None if numbers.smoothing is None else C)
    low, high, multiplier = primitives.split_lse(lse, nll, numbers.multiplier)
    return at_target, A * low, C, high, multiplier


@triton.jit
def gradient_row(row_ptr, out_ptr, weight_ptr, hole, x_target, at_target, A, C, lse2, multiplier, numbers, V, stride_v,
                 stride_out_v, first_tile, stop_tile, VECTOR: tl.constexpr, K: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Writes tiles [first_tile, stop_tile) of a row's gradient: no element twice, and none that is read afterwards.

    `x_target` is the target's logit, or None where it is what the row holds.
    """
    L: tl.constexpr = walk.VECTOR_BYTES * 8 // row_ptr.dtype.element_ty.primitive_bitwidth if VECTOR else 1
    TILE: tl.constexpr = K * T * L
    squash = numbers.squash
    C = None if numbers.smoothing is None else C
    body_ptr, head, body = walk.find_body(row_ptr, V, VECTOR, L)
    out_body_ptr, _, _ = walk.find_body(out_ptr, V, VECTOR, L)
    last_tile, hole_tile, segments = walk.find_segments(hole, head, body, first_tile, stop_tile, TILE)
    for segment in range(segments):
        begin, end, limit = walk.segment_bounds(segment, segments, first_tile, last_tile, stop_tile, hole_tile, body)
        for tile in range(begin, end):
            a, slope = primitives.cap(walk.load_tile(body_ptr, tile, None, stride_v, VECTOR, K, T, L), squash)
            w = class_weights.of_tile(weight_ptr, head, tile, None, K, T, L)
            g = primitives.gradient(a, slope, w, multiplier, lse2, A, C, None, at_target)
            walk.store_tile(out_body_ptr, g, tile, None, stride_out_v, VECTOR, K, T, L)
        x = walk.load_tile(body_ptr, end, limit, stride_v, VECTOR, K, T, L)
        is_target = tiles.offsets(end, K, T, L) == hole - head
        a, slope = primitives.cap(x if x_target is None else tl.where(is_target, x_target, x), squash)
        w = class_weights.of_tile(weight_ptr, head, end, limit, K, T, L)
        g = primitives.gradient(a, slope, w, multiplier, lse2, A, C, is_target, at_target)
        walk.store_tile(out_body_ptr, g, end, limit, stride_out_v, VECTOR, K, T, L)
    if VECTOR:
        offs_v, valid = walk.edge_columns(head, body, V, first_tile, T)
        x = tl.load(row_ptr + offs_v, mask=valid, other=0.0).to(tl.float32)
        is_target = offs_v == hole
        a, slope = primitives.cap(x if x_target is None else tl.where(is_target, x_target, x), squash)
        w = class_weights.of_columns(weight_ptr, offs_v, valid)
        g = primitives.gradient(a, slope, w, multiplier, lse2, A, C, is_target, at_target)
        tl.store(out_ptr + offs_v, g.to(out_ptr.dtype.element_ty), mask=valid)


_INTEGERS = ["ignore_index", "R", "V", "v0", "num_classes", "tiles_per_slice", "stride_b", "stride_r", "stride_v"]
_INTEGERS += ["stride_out_b", "stride_out_r", "stride_out_v", "stride_of_s", "stride_of_z"]


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=["logits_ptr", "out_ptr"])
def nll_backward_kernel(
    logits_ptr, target_ptr, lse_ptr, nll_ptr, upstream, weights,  # inputs
    out_ptr,  # output
    numbers, ignore_index,  # scalars
    R, V, v0, num_classes, tiles_per_slice,  # sizes
    stride_b, stride_r, stride_v, stride_out_b, stride_out_r, stride_out_v, stride_of_s, stride_of_z,  # strides
    VECTOR: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    first_tile = tl.program_id(1) * tiles_per_slice
    stop_tile = first_tile + tiles_per_slice
    target = tl.load(target_ptr + row)
    out_ptr = walk.row_pointer(out_ptr, row, R, stride_out_b, stride_out_r)

    # leaves at once, whatever the logits hold
    if walk.is_ignored(target, ignore_index):
        zero_row(out_ptr, first_tile, stop_tile, V, stride_out_v, VECTOR, K, T)
    else:
        row_ptr = walk.row_pointer(logits_ptr, row, R, stride_b, stride_r)
        hole = walk.owned_column(target, v0, V)
        weight_ptr = None if weights.per_class is None or numbers.smoothing is None else weights.per_class + v0
        class_weight, token_weight = class_weights.of_target(row, target, weights, num_classes)
        of_s = tl.load(upstream.of_s + row.to(tl.int64) * stride_of_s)
        of_z = None
        if numbers.z_loss is not None:
            of_z = tl.load(upstream.of_z + row.to(tl.int64) * stride_of_z)
        at_target, A, C, lse2, multiplier = row_factors(
            of_s, of_z, class_weight, token_weight, weights, tl.load(nll_ptr + row), tl.load(lse_ptr + row), numbers,
            num_classes,
        )  # fmt: skip
        # apart from the rest, because one multiplier for all rows is no register
        if multiplier == numbers.multiplier:
            gradient_row(
                row_ptr, out_ptr, weight_ptr, hole, None, at_target, A, C, lse2, numbers.multiplier, numbers, V,
                stride_v, stride_out_v, first_tile, stop_tile, VECTOR, K, T,
            )  # fmt: skip
        else:
            gradient_row(
                row_ptr, out_ptr, weight_ptr, hole, None, at_target, A, C, lse2, multiplier, numbers, V,
                stride_v, stride_out_v, first_tile * K, stop_tile * K, VECTOR, 1, T,
            )  # fmt: skip


def launch_nll_backward(
    logits: Tensor,  # (B, R, V), any strides; row n = b * R + r
    target: Tensor,  # (N,) int32 or int64
    lse: Tensor,  # (N,) fp64
    nll: Tensor,  # (N,) fp32
    upstream: Upstream,
    weights: Weights,
    out: Tensor,  # (B, R, V), the dtype of logits; the logits themselves for in place
    numbers: Numbers,
    *,
    config: LaunchConfig,
    ignore_index: int | None,
    v0: int = 0,
    num_classes: int | None = None,
) -> None:
    """Writes the gradient of the logits, whose columns are classes v0, v0 + 1, ... of num_classes."""
    B, R, V = logits.shape
    if B * R == 0:
        return
    stride_b, stride_r, stride_v = logits.stride()
    stride_out_b, stride_out_r, stride_out_v = out.stride()
    vector = stride_v == 1 and same_alignment(logits, out)
    with on_device(logits):
        nll_backward_kernel[(B * R, config.slices)](
            logits_ptr=logits, target_ptr=target, lse_ptr=lse, nll_ptr=nll, upstream=upstream, weights=weights,
            out_ptr=out,
            numbers=numbers, ignore_index=ignore_index,
            R=R, V=V, v0=v0, num_classes=num_classes or V, tiles_per_slice=config.tiles_per_slice,
            stride_b=stride_b, stride_r=stride_r, stride_v=stride_v,
            stride_out_b=stride_out_b, stride_out_r=stride_out_r, stride_out_v=stride_out_v,
            stride_of_s=upstream.of_s.stride(0), stride_of_z=0 if upstream.of_z is None else upstream.of_z.stride(0),
            VECTOR=vector, K=config.vectors * (1 if vector else 16 // logits.itemsize), T=config.threads,
            num_warps=config.num_warps, enable_fp_fusion=False, **config.compiler_options,
        )  # fmt: skip
