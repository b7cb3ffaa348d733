# SPDX-License-Identifier: Apache-2.0
"""Which elements of a tile each thread owns: offsets, addresses and masks of shape (K, T, L).

T threads own neighbouring vectors of L elements, and every thread owns K of them, T vectors apart.
"""

import triton
import triton.language as tl


@triton.jit
def offsets(tile, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    vectors = (tile * K + tl.arange(0, K)[:, None, None]) * T + tl.arange(0, T)[None, :, None]
    return vectors * L + tl.arange(0, L)[None, None, :]


@triton.jit
def addresses(ptr, offs, L: tl.constexpr):
    """ptr + offs of a (K, T, L) tile, laid out so that lanes lie along T and registers along K.

    Triton orders the dimensions by contiguity. Before version 3.7 it resolves the tie of K and T the other way round,
    and every reduction over K then crosses lanes. The 2 is not true, and ends the tie. The width of an access does not
    follow from it: that is set by the last dimension, and by the alignment, which is known for whole vectors only.
    """
    return tl.max_contiguous(ptr + offs, [1, 2, L])


@triton.jit
def vector_addresses(ptr, tile, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """Added in this order, one address serves all K accesses of a thread; the rest are immediate offsets."""
    thread_ptrs = ptr + tile * (K * T * L) + tl.arange(0, T)[None, :, None] * L
    return addresses(thread_ptrs + tl.arange(0, K)[:, None, None] * (T * L), tl.arange(0, L)[None, None, :], L)


@triton.jit
def vector_mask(tile, limit, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """One bit a vector, or the compiler cannot see that a whole vector may be loaded."""
    return (tile * K + tl.arange(0, K)[:, None, None]) * (T * L) + tl.arange(0, T)[None, :, None] * L < limit
