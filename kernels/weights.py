# SPDX-License-Identifier: Apache-2.0
"""Class weights and token weights, each of which may be absent: then it is 1, at compile time."""

import triton
import triton.language as tl

from fused_ppl.kernels import tiles


@triton.jit
def of_target(row, target, weights, num_classes):
    """The class weight of the row's target and the weight of its token: 1 where there are none."""
    class_weight, token_weight = 1.0, 1.0
    if weights.per_class is not None:
        inside = (target >= 0) & (target < num_classes)
        class_weight = tl.load(weights.per_class + target, mask=inside, other=0.0).to(tl.float32)
    if weights.per_token is not None:
        token_weight = tl.load(weights.per_token + row).to(tl.float32)
    return class_weight, token_weight


@triton.jit
def total(weights, num_classes):
    """sum_v w[v], over the whole vocabulary also in a slice of it."""
    if weights.total is None:
        return num_classes.to(tl.float32)
    else:
        return tl.load(weights.total).to(tl.float32)


@triton.jit
def of_tile(weight_ptr, head, tile, limit, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """The class weights of a tile, or 1 where there are none to apply."""
    if weight_ptr is None:
        return 1.0
    elif L == 8:
        # two halves of 4 stay in the thread that holds their 8 logits; 8 at once would be shuffled there
        first = of_vectors(weight_ptr, head, 0, tile, limit, K, T, L)
        second = of_vectors(weight_ptr, head, 4, tile, limit, K, T, L)
        return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), (K, T, L))
    else:
        return of_vectors(weight_ptr, head, 0, tile, limit, K, T, L)


@triton.jit
def of_vectors(weight_ptr, head, begin, tile, limit, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """The weights of up to 4 logits of every vector, from the one at `begin` on."""
    vectors = (tile * K + tl.arange(0, K)[:, None, None]) * T + tl.arange(0, T)[None, :, None]
    PART: tl.constexpr = 4 if L > 4 else L
    offs_v = vectors * L + begin + tl.arange(0, PART)[None, None, :]
    mask = None if limit is None else offs_v < limit
    ptrs = tiles.addresses(weight_ptr + head, offs_v, PART)
    return tl.load(ptrs, mask=mask).to(tl.float32)


@triton.jit
def of_columns(weight_ptr, columns, mask):
    """The class weights of columns of any shape, or 1 where there are none to apply."""
    if weight_ptr is None:
        return 1.0
    else:
        return tl.load(weight_ptr + columns, mask=mask).to(tl.float32)
