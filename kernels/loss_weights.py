# SPDX-License-Identifier: Apache-2.0
"""Loads class weights w[v], (V,), and token weights, (N,).

A weight that is not given is 1 at compile time, so that it costs no instruction. Only label smoothing needs the weights
of all classes. Without it the kernels load one class weight per row, the weight of the target.
"""

import triton
import triton.language as tl

from fused_ppl.kernels import row_tiles


@triton.jit
def load_target_weights(row, target, weights, num_classes):
    """The class weight of the row's target, and the row's token weight. A target out of range has class weight 0."""
    class_weight, token_weight = 1.0, 1.0
    if weights.per_class is not None:
        mask = (target >= 0) & (target < num_classes)
        class_weight = tl.load(weights.per_class + target, mask=mask, other=0.0).to(tl.float32)
    if weights.per_token is not None:
        token_weight = tl.load(weights.per_token + row).to(tl.float32)
    return class_weight, token_weight


@triton.jit
def class_weight_sum(weights, num_classes):
    """sum_v w[v] over the whole vocabulary, also where the logits are a shard of it."""
    if weights.per_class_sum is None:
        return num_classes.to(tl.float32)
    else:
        return tl.load(weights.per_class_sum).to(tl.float32)


@triton.jit
def load_tile_weights(weight_ptr, prefix, tile, limit, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """The class weights of a (K, T, L) tile of the body, or 1 without class weights."""
    if weight_ptr is None:
        return 1.0
    elif L == 8:
        # two loads of 4 put the weights into the thread that owns their 8 logits; one load of 8 would need shuffles
        first = load_vector_weights(weight_ptr, prefix, 0, tile, limit, K, T, L)
        second = load_vector_weights(weight_ptr, prefix, 4, tile, limit, K, T, L)
        return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), (K, T, L))
    else:
        return load_vector_weights(weight_ptr, prefix, 0, tile, limit, K, T, L)


@triton.jit
def load_vector_weights(weight_ptr, prefix, begin, tile, limit, K: tl.constexpr, T: tl.constexpr, L: tl.constexpr):
    """The weights of up to 4 logits of every vector; `begin` is the first of them within the vector."""
    vectors = (tile * K + tl.arange(0, K)[:, None, None]) * T + tl.arange(0, T)[None, :, None]
    PART: tl.constexpr = 4 if L > 4 else L
    offs_v = vectors * L + begin + tl.arange(0, PART)[None, None, :]
    mask = None if limit is None else offs_v < limit
    ptrs = row_tiles.addresses(weight_ptr + prefix, offs_v, PART)
    return tl.load(ptrs, mask=mask).to(tl.float32)


@triton.jit
def load_column_weights(weight_ptr, columns, mask):
    """The class weights of columns, in a tensor of any shape, or 1 without class weights."""
    if weight_ptr is None:
        return 1.0
    else:
        return tl.load(weight_ptr + columns, mask=mask).to(tl.float32)
