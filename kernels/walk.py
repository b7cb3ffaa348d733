# SPDX-License-Identifier: Apache-2.0
"""How a program moves along a row of any length, stride and alignment, 16 bytes a load.

    row = [edge, < 16 bytes] [body: tiles of K x T vectors of L elements, 16-byte aligned] [edge, < 16 bytes]

T threads own neighbouring vectors and every thread K of them; reductions over K and L stay inside a thread. The
alignment is found from the address at run time, so that one binary serves odd V, odd strides and offset views. Rows
whose classes are not neighbours (VECTOR is False) are walked in "vectors" of L = 1 element and have no edges.
"""

import triton
import triton.language as tl

from fused_ppl.kernels import primitives, tiles
from fused_ppl.kernels import weights as class_weights

VECTOR_BYTES = tl.constexpr(16)
_INF_BF16, _INF_FP16 = tl.constexpr(-8323200), tl.constexpr(-67044352)  # two of -inf in a word


@triton.jit
def row_pointer(ptr, row, R, stride_b, stride_r):
    """Row b * R + r of a (B, R, V) view; int64, because the product passes 2**31."""
    b = row // R
    return ptr + b.to(tl.int64) * stride_b + (row - b * R).to(tl.int64) * stride_r


@triton.jit
def is_ignored(target, ignore_index):
    return target != target if ignore_index is None else target == ignore_index


@triton.jit
def owned_column(target, v0, V):
    """The target's column in [0, V), or -1 where this slice of the vocabulary does not hold it."""
    column = target.to(tl.int64) - v0
    return tl.where((column >= 0) & (column < V), column, -1).to(tl.int32)


@triton.jit
def find_body(row_ptr, V, VECTOR: tl.constexpr, L: tl.constexpr):
    """The first 16-byte boundary of the row, the elements before it, and the elements in whole vectors after it."""
    if VECTOR:
        address = row_ptr.to(tl.int64)
        to_boundary = -address & (VECTOR_BYTES - 1)
        head = tl.minimum((to_boundary * L // VECTOR_BYTES).to(tl.int32), V)
        body_ptr = tl.multiple_of((address + to_boundary).to(row_ptr.dtype), VECTOR_BYTES)
        return body_ptr, head, (V - head) // L * L
    else:
        return row_ptr, 0, V


@triton.jit
def find_segments(hole, head, body, first_tile, stop_tile, TILE: tl.constexpr):
    """Whole tiles up to the target's; that tile, masked; whole tiles to the end; the rest, masked.

    Returns the end of the whole tiles, the target's tile, and 2 segments, or 1 where no whole tile holds the target.
    """
    last_tile = tl.minimum(body // TILE, stop_tile)
    hole_tile = tl.where(hole >= head, (hole - head) // TILE, -1)
    return last_tile, hole_tile, tl.where((hole_tile >= first_tile) & (hole_tile < last_tile), 2, 1)


@triton.jit
def segment_bounds(segment, segments, first_tile, last_tile, stop_tile, hole_tile, body):
    """The whole tiles of a segment, and the element that ends the masked tile behind them."""
    begin = tl.where(segment == 0, first_tile, hole_tile + 1)
    end = tl.where(segment == segments - 1, last_tile, hole_tile)
    # an unaligned row may end before its last slice begins
    return begin, end, tl.where((end >= first_tile) & (end < stop_tile), body, 0)


@triton.jit
def load_tile(body_ptr, tile, limit, stride_v, VECTOR: tl.constexpr, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """A (K, T, L) tile of the body in fp32; -inf from element `limit` of the body on."""
    if VECTOR:
        mask = None if limit is None else tiles.vector_mask(tile, limit, K, T, L)
        if L == 8:
            # as words: one instruction widens a logit, where a conversion takes two
            words_ptr = tl.multiple_of(body_ptr.to(tl.pointer_type(tl.int32)), VECTOR_BYTES)
            BF16: tl.constexpr = body_ptr.dtype.element_ty == tl.bfloat16
            other = None if limit is None else (_INF_BF16 if BF16 else _INF_FP16)
            words = tl.load(tiles.vector_addresses(words_ptr, tile, K, T, L // 2), mask=mask, other=other)
            if BF16:
                low = (words << 16).to(tl.float32, bitcast=True)
                high = (words & -65536).to(tl.float32, bitcast=True)
            else:
                low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            return tl.reshape(tl.join(low, high), (K, T, L))
        else:
            other = None if limit is None else float("-inf")
            return tl.load(tiles.vector_addresses(body_ptr, tile, K, T, L), mask=mask, other=other).to(tl.float32)
    else:
        offs_v = tiles.offsets(tile, K, T, L)
        mask = None if limit is None else offs_v < limit
        other = None if limit is None else float("-inf")
        ptrs = tiles.addresses(body_ptr, offs_v.to(tl.int64) * stride_v, 1)
        return tl.load(ptrs, mask=mask, other=other).to(tl.float32)


@triton.jit
def store_tile(
    body_ptr, values, tile, limit, stride_v, VECTOR: tl.constexpr, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr
):
    """Rounds once to the dtype of the row; writes nothing from element `limit` of the body on."""
    values = values.to(body_ptr.dtype.element_ty)
    if VECTOR:
        mask = None if limit is None else tiles.vector_mask(tile, limit, K, T, L)
        tl.store(tiles.vector_addresses(body_ptr, tile, K, T, L), values, mask=mask)
    else:
        offs_v = tiles.offsets(tile, K, T, L)
        mask = None if limit is None else offs_v < limit
        ptrs = tiles.addresses(body_ptr, offs_v.to(tl.int64) * stride_v, 1)
        tl.store(ptrs, values, mask=mask)


@triton.jit
def edge_columns(head, body, V, first_tile, T: tl.constexpr):
    """The columns outside the body, one a thread: lanes 0..7 before it, lanes 8..15 after it; for the first slice."""
    lane = tl.arange(0, T)[None, :, None]
    columns = tl.where(lane < 8, lane, head + body + lane - 8)
    before, after = tl.where(first_tile == 0, head, 0), tl.where(first_tile == 0, V, 0)
    return columns, tl.where(lane < 8, lane < before, (lane < 16) & (columns < after))


@triton.jit
def find_column(
    row_ptr, a_max, best, top, hole, V, stride_v, squash, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr
):
    """The lowest column that holds `top`, looked for in the one tile where each thread met its maximum; else V.

    What stands in the hole is not looked at: it may be another number than the target's logit.
    """
    offs_v = best[None, :, None] + tiles.offsets(0, K, T, L)
    mask = (offs_v < V) & (offs_v != hole) & (a_max == top)[None, :, None]
    a, _ = primitives.cap(tl.load(row_ptr + offs_v.to(tl.int64) * stride_v, mask=mask).to(tl.float32), squash)
    return tl.min(tl.min(tl.min(tl.where(mask & (a == top), offs_v, V), 2), 0), 0)


@triton.jit
def sum_row(row_ptr, weight_ptr, hole, a_target, multiplier, squash, V, stride_v, first_tile, stop_tile,
            RUNNING_MAX: tl.constexpr, ENTROPY: tl.constexpr, PREDICTED: tl.constexpr, SMOOTHING: tl.constexpr,
            VECTOR: tl.constexpr, K: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """`primitives.accumulate` over tiles [first_tile, stop_tile) of a row, without column `hole` if it is >= 0.

    The target is that hole: its share is added at the end, or 1 + the rest would forget a rest below 2**-24.
    Returns the reference (as accumulate takes it), s, q, d, and the first column of the maximum (V if not asked).
    """
    L: tl.constexpr = VECTOR_BYTES * 8 // row_ptr.dtype.element_ty.primitive_bitwidth if VECTOR else 1
    TILE: tl.constexpr = K * T * L
    body_ptr, head, body = find_body(row_ptr, V, VECTOR, L)
    last_tile, hole_tile, segments = find_segments(hole, head, body, first_tile, stop_tile, TILE)
    s, q, d, best = (tl.zeros((T,), tl.float32),) * 3 + (tl.zeros((T,), tl.int32),)
    if RUNNING_MAX:
        reference = tl.full((T,), primitives.LOWEST, tl.float32)
    else:
        reference = primitives.target_reference(a_target, multiplier)

    for segment in range(segments):
        begin, end, limit = segment_bounds(segment, segments, first_tile, last_tile, stop_tile, hole_tile, body)
        for tile in range(begin, end):
            a, _ = primitives.cap(load_tile(body_ptr, tile, None, stride_v, VECTOR, K, T, L), squash)
            w = class_weights.of_tile(weight_ptr, head, tile, None, K, T, L)
            reference, s, q, d, best = primitives.accumulate(
                a, None, w, head + tile * TILE, None, reference, s, q, d, best, multiplier,
                RUNNING_MAX, ENTROPY, PREDICTED, SMOOTHING,
            )  # fmt: skip
        a, _ = primitives.cap(load_tile(body_ptr, end, limit, stride_v, VECTOR, K, T, L), squash)
        offs_v = tiles.offsets(end, K, T, L)
        valid = offs_v != hole - head
        if SMOOTHING or squash is not None:
            valid = valid & (offs_v < limit)  # elsewhere the -inf of load_tile adds nothing, for fewer registers
        w = class_weights.of_tile(weight_ptr, head, end, limit, K, T, L)
        reference, s, q, d, best = primitives.accumulate(
            a, valid, w, head + end * TILE, None, reference, s, q, d, best, multiplier,
            RUNNING_MAX, ENTROPY, PREDICTED, SMOOTHING,
        )  # fmt: skip
    if VECTOR:
        offs_v, valid = edge_columns(head, body, V, first_tile, T)
        valid = valid & (offs_v != hole)
        a, _ = primitives.cap(tl.load(row_ptr + offs_v, mask=valid).to(tl.float32), squash)
        w = class_weights.of_columns(weight_ptr, offs_v, valid)
        here = tl.reshape(offs_v, (T,)) - tl.arange(0, T) * L  # find_column adds the thread's place in a tile
        reference, s, q, d, best = primitives.accumulate(
            a, valid, w, here, tl.arange(0, T) < 8, reference, s, q, d, best, multiplier,
            RUNNING_MAX, ENTROPY, PREDICTED, SMOOTHING,
        )  # fmt: skip

    column = V
    if RUNNING_MAX:
        top = tl.maximum(tl.max(reference, 0), a_target)
        if PREDICTED:
            column = find_column(row_ptr, reference, best, top, hole, V, stride_v, squash, K, T, L)
        s, q = primitives.rescale(s, q, (reference - top) * multiplier)
        reference = top
    return reference, tl.sum(s, 0), tl.sum(q, 0), tl.sum(d, 0), column
