# SPDX-License-Identifier: Apache-2.0
"""Where the elements of a row lie in memory, and which thread owns which of them; tiles are loaded and stored here.

    row  = [prefix, < 16 bytes] [body: tiles of whole vectors, 16-byte aligned] [suffix, < 16 bytes]
    tile = (K, T, L): T threads own neighbouring vectors of L elements, each thread owns K vectors, T vectors apart

A vector has 16 bytes, so L is 8 for bf16 and fp16 and 4 for fp32. A reduction over K and L stays inside one thread.
All loads and stores of the body move 16 bytes. Prefix and suffix together are the edges: at most 14 elements, one per
thread, in one masked access.

`find_body` finds the alignment from the address at run time. One binary therefore serves odd V, odd strides and views
that begin anywhere. The obvious way is Triton's own specialisation for divisible strides. With it, an odd V compiles to
loads of 2 bytes, and each new stride compiles again.

Where the classes of a row are not neighbours in memory, CONTIGUOUS is False. L is then 1, the body is the whole row,
and there are no edges.
"""

import triton
import triton.language as tl

VECTOR_BYTES = tl.constexpr(16)
_INF_BF16, _INF_FP16 = tl.constexpr(-8323200), tl.constexpr(-67044352)  # two of -inf in a word


@triton.jit
def row_pointer(ptr, row, R, stride_b, stride_r):
    """The address of row b * R + r of a (B, R, V) view. It is computed in int64, because the product passes 2**31."""
    b = row // R
    return ptr + b.to(tl.int64) * stride_b + (row - b * R).to(tl.int64) * stride_r


@triton.jit
def is_ignored(target, ignore_index):
    """True if the row does not count. Without an ignore_index every row counts."""
    return target != target if ignore_index is None else target == ignore_index


@triton.jit
def find_target_column(target, first_class, V):
    """The target's column in [0, V), or -1 if these V classes do not hold it."""
    column = target.to(tl.int64) - first_class
    return tl.where((column >= 0) & (column < V), column, -1).to(tl.int32)


@triton.jit
def find_body(row_ptr, V, CONTIGUOUS: tl.constexpr, L: tl.constexpr):
    """The address of the body, the length of the prefix, and the length of the body, both in elements."""
    if CONTIGUOUS:
        address = row_ptr.to(tl.int64)
        to_boundary = -address & (VECTOR_BYTES - 1)
        prefix = tl.minimum((to_boundary * L // VECTOR_BYTES).to(tl.int32), V)
        body_ptr = tl.multiple_of((address + to_boundary).to(row_ptr.dtype), VECTOR_BYTES)
        return body_ptr, prefix, (V - prefix) // L * L
    else:
        return row_ptr, 0, V


@triton.jit
def find_segments(target_column, prefix, body_len, first_tile, stop_tile, TILE: tl.constexpr):
    """Splits tiles [first_tile, stop_tile) into segments: some whole tiles, then one tile that needs a mask.

    The first segment ends with the target's tile, the last one with the rest of the body. Returns the end of the whole
    tiles, the target's tile, and the number of segments: 1 if no whole tile holds the target, otherwise 2.
    """
    last_tile = tl.minimum(body_len // TILE, stop_tile)
    target_tile = tl.where(target_column >= prefix, (target_column - prefix) // TILE, -1)
    return last_tile, target_tile, tl.where((target_tile >= first_tile) & (target_tile < last_tile), 2, 1)


@triton.jit
def segment_bounds(segment, segments, first_tile, last_tile, stop_tile, target_tile, body_len):
    """(begin, end, limit): the whole tiles [begin, end) of a segment; tile `end` is valid below element `limit`."""
    begin = tl.where(segment == 0, first_tile, target_tile + 1)
    end = tl.where(segment == segments - 1, last_tile, target_tile)
    # the body of an unaligned row may end before its last slice begins: the masked tile is empty there
    return begin, end, tl.where((end >= first_tile) & (end < stop_tile), body_len, 0)


@triton.jit
def offsets(tile, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """(K, T, L) positions in the body of the elements of a tile."""
    vectors = (tile * K + tl.arange(0, K)[:, None, None]) * T + tl.arange(0, T)[None, :, None]
    return vectors * L + tl.arange(0, L)[None, None, :]


@triton.jit
def addresses(ptr, offs, L: tl.constexpr):
    """ptr + offs of a (K, T, L) tile, in a layout with threads along T and registers along K.

    Triton orders the dimensions by contiguity. K and T are equal in that, and before version 3.7 Triton puts threads
    along K, so that every reduction over K crosses threads. The 2 is false and decides for T. It does not change the
    width of an access, which follows from the last dimension and the known alignment.
    """
    return tl.max_contiguous(ptr + offs, [1, 2, L])


@triton.jit
def vector_addresses(ptr, tile, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """The addresses of a tile. In this order of additions a thread holds one address, and K are immediate offsets."""
    thread_ptrs = ptr + tile * (K * T * L) + tl.arange(0, T)[None, :, None] * L
    return addresses(thread_ptrs + tl.arange(0, K)[:, None, None] * (T * L), tl.arange(0, L)[None, None, :], L)


@triton.jit
def vector_mask(tile, limit, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """(K, T, 1): one bit for each vector. With one for each element the compiler would split the loads."""
    return (tile * K + tl.arange(0, K)[:, None, None]) * (T * L) + tl.arange(0, T)[None, :, None] * L < limit


@triton.jit
def load_tile(
    body_ptr, tile, limit, stride_v, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr
):
    """A (K, T, L) tile of the body in fp32. Elements from `limit` on are -inf; None means that all are valid."""
    if CONTIGUOUS:
        mask = None if limit is None else vector_mask(tile, limit, K, T, L)
        if L == 8:
            # 4-byte words hold two logits: widening one from a word takes one instruction, a conversion takes two
            words_ptr = tl.multiple_of(body_ptr.to(tl.pointer_type(tl.int32)), VECTOR_BYTES)
            BF16: tl.constexpr = body_ptr.dtype.element_ty == tl.bfloat16
            other = None if limit is None else (_INF_BF16 if BF16 else _INF_FP16)
            words = tl.load(vector_addresses(words_ptr, tile, K, T, L // 2), mask=mask, other=other)
            if BF16:
                low = (words << 16).to(tl.float32, bitcast=True)
                high = (words & -65536).to(tl.float32, bitcast=True)
            else:
                low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            return tl.reshape(tl.join(low, high), (K, T, L))
        else:
            other = None if limit is None else float("-inf")
            return tl.load(vector_addresses(body_ptr, tile, K, T, L), mask=mask, other=other).to(tl.float32)
    else:
        offs_v = offsets(tile, K, T, L)
        mask = None if limit is None else offs_v < limit
        other = None if limit is None else float("-inf")
        ptrs = addresses(body_ptr, offs_v.to(tl.int64) * stride_v, 1)
        return tl.load(ptrs, mask=mask, other=other).to(tl.float32)


@triton.jit
def store_tile(
    body_ptr, values, tile, limit, stride_v, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr
):
    """Rounds a tile to the dtype of the row and writes it. Elements from `limit` on are not written."""
    values = values.to(body_ptr.dtype.element_ty)
    if CONTIGUOUS:
        mask = None if limit is None else vector_mask(tile, limit, K, T, L)
        tl.store(vector_addresses(body_ptr, tile, K, T, L), values, mask=mask)
    else:
        offs_v = offsets(tile, K, T, L)
        mask = None if limit is None else offs_v < limit
        ptrs = addresses(body_ptr, offs_v.to(tl.int64) * stride_v, 1)
        tl.store(ptrs, values, mask=mask)


@triton.jit
def edge_columns(prefix, body_len, V, first_tile, T: tl.constexpr):
    """(1, T, 1) columns of the edges and their mask. Threads 0 to 7 own the prefix, threads 8 to 15 own the suffix.

    The slice that begins with tile 0 handles both edges. In all other slices the mask is False.
    """
    thread = tl.arange(0, T)[None, :, None]
    columns = tl.where(thread < 8, thread, prefix + body_len + thread - 8)
    prefix_end, suffix_end = tl.where(first_tile == 0, prefix, 0), tl.where(first_tile == 0, V, 0)
    return columns, tl.where(thread < 8, thread < prefix_end, (thread < 16) & (columns < suffix_end))
