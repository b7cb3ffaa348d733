# SPDX-License-Identifier: Apache-2.0
"""The sums of one row in one read of its logits: an online softmax that keeps all of its sums inside threads.

    t[v] = z[v] * log2(e) - shift        sum_exp = sum 2**t        sum_exp_t = sum 2**t * t        sum_w_t = sum w * t

Without an argmax or an entropy, the shift is the target's logit (`target_shift`). Nothing then depends on
an earlier logit except additions: one multiply-add, one exponential and one addition per logit. The sums leave the
target out, and its share 2**target_t is added at the end. A small sum is then not rounded away beside it.

The sum overflows if a logit is more than about 85 nats above the target. It loses digits if all logits are more than
about 53 nats below the target, because the hardware takes 2**t below 2**-126 as 0. `finish_row_sums` sees both and reads
the row a second time with a running maximum. An argmax, an entropy and shards need the running maximum from the start.

The obvious online softmax keeps one maximum for the whole program. It crosses threads in every tile and rescales with
every new maximum: about twice the instructions per logit, and four barriers per tile. Here each of T threads keeps its
own sums over vectors (K, T, L), and they are added once, at the end of the row.
"""

import triton
import triton.language as tl

from fused_ppl.kernels import elementary, loss_weights, row_formula, row_tiles

SMALLEST_SHARE = tl.constexpr(2.0**-102)


@triton.jit
def target_shift(capped_target, scale_log2):
    """The shift without a running maximum: 8 above the target's logit in base 2.

    A float32 t is rounded in proportion to |t|. The terms that matter lie above the target, so the shift does as well.
    """
    return tl.fma(capped_target, scale_log2, 8.0)


@triton.jit
def rescale_row(sum_exp, sum_exp_t, old_max, new_max, scale_log2):
    """The sums of a row relative to a new maximum, in the whole range of float32.

    The hardware takes 2**change as 0 below 2**-126, and the product with a larger sum would be lost. The power of 2
    therefore comes in two exact factors, each at least 2**-126. The rest of the exponent is less than 2.
    """
    change = (old_max.to(tl.float64) - new_max.to(tl.float64)) * tl.cast(scale_log2, tl.float64)
    half = tl.maximum(tl.floor(0.5 * change.to(tl.float32)), -126.0)
    power = ((127 + half.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    rest = elementary.pow2(tl.maximum((change - 2.0 * half).to(tl.float32), -1000.0))
    change = tl.maximum(change.to(tl.float32), -1000.0)
    return sum_exp * rest * power * power, tl.fma(sum_exp, change, sum_exp_t) * rest * power * power


@triton.jit
def find_argmax(
    row_ptr, capped_max, argmax_base, row_max, target_column, V, stride_v, tanh_scale, K: tl.constexpr,
    T: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """The lowest column that holds `row_max`, or V if only the target does.

    It loads one tile again, the one in which each thread met its maximum. The target's column is left out, because the
    fused head stores another number there than the target's logit.
    """
    offs_v = argmax_base[None, :, None] + row_tiles.offsets(0, K, T, L)
    mask = (offs_v < V) & (offs_v != target_column) & (capped_max == row_max)[None, :, None]
    capped, _ = row_formula.cap(tl.load(row_ptr + offs_v.to(tl.int64) * stride_v, mask=mask).to(tl.float32), tanh_scale)
    return tl.min(tl.min(tl.min(tl.where(mask & (capped == row_max), offs_v, V), 2), 0), 0)


@triton.jit
def sum_row(row_ptr, weight_ptr, target_column, capped_target, scale_log2, tanh_scale, V, stride_v, first_tile,
            stop_tile, RUNNING_MAX: tl.constexpr, ENTROPY: tl.constexpr, PREDICTED: tl.constexpr,
            SMOOTHING: tl.constexpr, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """(shift, sum_exp, sum_exp_t, sum_w_t, argmax) of tiles [first_tile, stop_tile), without the target's column.

    If first_tile is 0, the sums include both edges. With RUNNING_MAX `shift` is the maximum of `capped`, otherwise
    `target_shift`. `argmax` is V unless PREDICTED is set.
    """
    L: tl.constexpr = row_tiles.VECTOR_BYTES * 8 // row_ptr.dtype.element_ty.primitive_bitwidth if CONTIGUOUS else 1
    TILE: tl.constexpr = K * T * L
    body_ptr, prefix, body_len = row_tiles.find_body(row_ptr, V, CONTIGUOUS, L)
    last_tile, target_tile, segments = row_tiles.find_segments(
        target_column, prefix, body_len, first_tile, stop_tile, TILE
    )
    sum_exp, sum_exp_t, sum_w_t, argmax_base = (tl.zeros((T,), tl.float32),) * 3 + (tl.zeros((T,), tl.int32),)
    if RUNNING_MAX:
        shift = tl.full((T,), row_formula.LOWEST, tl.float32)
    else:
        shift = target_shift(capped_target, scale_log2)

    for segment in range(segments):
        begin, end, limit = row_tiles.segment_bounds(
            segment, segments, first_tile, last_tile, stop_tile, target_tile, body_len
        )
        for tile in range(begin, end):
            logits = row_tiles.load_tile(body_ptr, tile, None, stride_v, CONTIGUOUS, K, T, L)
            capped, _ = row_formula.cap(logits, tanh_scale)
            w = loss_weights.load_tile_weights(weight_ptr, prefix, tile, None, K, T, L)
            shift, sum_exp, sum_exp_t, sum_w_t, argmax_base = row_formula.accumulate(
                capped, None, w, prefix + tile * TILE, None, shift, sum_exp, sum_exp_t, sum_w_t, argmax_base,
                scale_log2, RUNNING_MAX, ENTROPY, PREDICTED, SMOOTHING,
            )  # fmt: skip
        logits = row_tiles.load_tile(body_ptr, end, limit, stride_v, CONTIGUOUS, K, T, L)
        capped, _ = row_formula.cap(logits, tanh_scale)
        offs_v = row_tiles.offsets(end, K, T, L)
        valid = offs_v != target_column - prefix
        if SMOOTHING or tanh_scale is not None:
            # in all other cases the -inf that load_tile gives adds nothing, and that takes fewer registers
            valid = valid & (offs_v < limit)
        w = loss_weights.load_tile_weights(weight_ptr, prefix, end, limit, K, T, L)
        shift, sum_exp, sum_exp_t, sum_w_t, argmax_base = row_formula.accumulate(
            capped, valid, w, prefix + end * TILE, None, shift, sum_exp, sum_exp_t, sum_w_t, argmax_base,
            scale_log2, RUNNING_MAX, ENTROPY, PREDICTED, SMOOTHING,
        )  # fmt: skip
    if CONTIGUOUS:
        offs_v, valid = row_tiles.edge_columns(prefix, body_len, V, first_tile, T)
        valid = valid & (offs_v != target_column)
        capped, _ = row_formula.cap(tl.load(row_ptr + offs_v, mask=valid).to(tl.float32), tanh_scale)
        w = loss_weights.load_column_weights(weight_ptr, offs_v, valid)
        tile_base = tl.reshape(offs_v, (T,)) - tl.arange(0, T) * L  # find_argmax adds the position in a tile
        shift, sum_exp, sum_exp_t, sum_w_t, argmax_base = row_formula.accumulate(
            capped, valid, w, tile_base, tl.arange(0, T) < 8, shift, sum_exp, sum_exp_t, sum_w_t, argmax_base,
            scale_log2, RUNNING_MAX, ENTROPY, PREDICTED, SMOOTHING,
        )  # fmt: skip

    argmax = V
    if RUNNING_MAX:
        others_max = tl.max(shift, 0)
        row_max = tl.maximum(others_max, capped_target)
        if PREDICTED:
            argmax = find_argmax(row_ptr, shift, argmax_base, row_max, target_column, V, stride_v, tanh_scale, K, T, L)
        sum_exp, sum_exp_t = row_formula.rescale(sum_exp, sum_exp_t, (shift - others_max) * scale_log2)
        shift = row_max
    sum_exp, sum_exp_t = tl.sum(sum_exp, 0), tl.sum(sum_exp_t, 0)
    if RUNNING_MAX:
        sum_exp, sum_exp_t = rescale_row(sum_exp, sum_exp_t, others_max, row_max, scale_log2)
    return shift, sum_exp, sum_exp_t, tl.sum(sum_w_t, 0), argmax


@triton.jit
def finish_row_sums(row_ptr, weight_ptr, target_column, capped_target, shift, sum_exp, sum_exp_t, sum_w_t, argmax,
                    scale_log2, tanh_scale, V, stride_v, RUNNING_MAX: tl.constexpr, SMOOTHING: tl.constexpr,
                    CONTIGUOUS: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The sums of a whole row in their final form. The row is read again if its sums have overflowed or lost digits.

    Returns (target_z2, shift2, w_shift2, sum_exp, sum_exp_t, sum_w_t, argmax). shift2 is the shift of sum_exp and
    sum_exp_t in base 2, w_shift2 that of sum_w_t. argmax takes the target into account.
    """
    # t is capped * scale_log2 - (row_max * scale_log2 + w_shift2)
    row_max, w_shift2 = tl.zeros_like(shift), shift
    if RUNNING_MAX:
        row_max, w_shift2 = shift, row_max
        argmax = tl.where((target_column >= 0) & (capped_target == row_max), tl.minimum(argmax, target_column), argmax)
        argmax = tl.where(argmax < V, argmax, 0)  # torch.argmax is 0 for a row of -inf
    else:
        # sum_exp has overflowed, or |shift| is so large that float32 cannot represent the target's logit + 8. For fp32
        # logits the limit is lower: above 2**18 the largest t has lost so many bits that its gradient would show it.
        # Each term below 2**-126 was taken as 0. V of them may be 2**-24 of a sum that is smaller than V * 2**-102
        LIMIT: tl.constexpr = 262144.0 if row_ptr.dtype.element_ty == tl.float32 else 1e37
        lowest = V.to(tl.float32) * SMALLEST_SHARE
        if not ((sum_exp < LIMIT) & (sum_exp > lowest) & (tl.abs(shift) < 67108864.0)):
            w_shift2 = row_max
            row_max, sum_exp, sum_exp_t, sum_w_t, argmax = sum_row(
                row_ptr, weight_ptr, target_column, capped_target, scale_log2, tanh_scale, V, stride_v, 0, V + 1,
                True, False, False, SMOOTHING, CONTIGUOUS, 1, T,
            )  # fmt: skip
    scale = tl.cast(scale_log2, tl.float64)
    target_z2 = capped_target.to(tl.float64) * scale
    shift2 = row_max.to(tl.float64) * scale + w_shift2.to(tl.float64)
    return target_z2, shift2, w_shift2, sum_exp, sum_exp_t, sum_w_t, argmax
