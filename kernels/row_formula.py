# SPDX-License-Identifier: Apache-2.0
"""The formula of one row, which every kernel uses.

For a row of logits x with target y, class weights w and V classes:

    z[v]  = logit_scale * x[v]                             without a softcap
    z[v]  = softcap * tanh(logit_scale * x[v] / softcap)   with one
    lse   = ln sum_v e^z[v]          p[v] = e^(z[v] - lse)          nll = lse - z[y]
    dz[v] = A * p[v] - C * w[v] - B * [v = y]              (`gradient_coefficients`)
    dz[v] = p[v] * (dlse - dentropy * (ln p[v] + entropy))  is added for lse and entropy (`add_statistics`)
    dx[v] = dz[v] * logit_scale * slope[v]                 slope = 1, or 1 - (z / softcap)^2 under a softcap

All exponentials have base 2, because the hardware has an instruction for them. A logit enters as
z * log2(e) = scale_log2 * capped. `capped` is x, or tanh(tanh_scale * x) under a softcap. A name that ends in 2 is a
logarithm in base 2: lse2 = lse * log2(e).

These functions touch no memory. The obvious code, softmax minus one-hot, loses digits where the target holds nearly all
of the mass: 1 - p[y] is 0 in float32 below 6e-8. The functions here leave the target out of the sum and use log(1 + s)
and expm1. The nll and the gradient are then accurate relative to themselves.
"""

import triton
import triton.language as tl

from fused_ppl.kernels.elementary import LN2, LOG2E, expm1, log2_parts, pow2, tanh_and_slope

LOWEST = tl.constexpr(-3.4028234663852886e38)  # running maxima start here, because -inf - -inf is NaN


@triton.jit
def cap(logits, tanh_scale):
    """`capped`, and its slope: dz/dx divided by logit_scale. The slope is 1 without a softcap."""
    if tanh_scale is None:
        return logits, 1.0
    else:
        return tanh_and_slope(logits * tanh_scale)


@triton.jit
def rescale(sum_exp, sum_exp_t, change):
    """The sums relative to a new shift. `change` is the old shift minus the new one, in base 2, and at most 0.

    The sums of most tiles meet a change of 0, and must keep their bits. They do, because 2**0 is exactly 1 on every GPU:
    the table of special values of `ex2` in NVIDIA's PTX ISA says so, and that of V_EXP_F32 in AMD's ISA documents.
    """
    change = tl.maximum(change, -1000.0)  # the first maximum replaces LOWEST: 0 * -inf would be NaN
    return sum_exp * tl.exp2(change), tl.exp2(change) * tl.fma(sum_exp, change, sum_exp_t)


@triton.jit
def accumulate(capped, valid, class_weight, tile_base, wins_ties, capped_max, sum_exp, sum_exp_t, sum_w_t, argmax_base,
               scale_log2, RUNNING_MAX: tl.constexpr, ENTROPY: tl.constexpr, PREDICTED: tl.constexpr,
               SMOOTHING: tl.constexpr):  # fmt: skip
    """Adds a (K, T, L) tile to the sums that each of T threads keeps. No value crosses a thread.

        t = z * log2(e) - shift    sum_exp = sum 2**t    sum_exp_t = sum 2**t * t    sum_w_t = sum class_weight * t

    Without RUNNING_MAX, `capped_max` is the shift itself and stays as it is. With it, `capped_max` is the thread's
    running maximum of `capped`, and the shift is scale_log2 times that. `sum_w_t` is then taken without a
    shift, because shards add theirs. `argmax_base` says in which tile each thread met its maximum (`find_argmax`).
    """
    if valid is not None:
        capped = tl.where(valid, capped, float("-inf"))
    if RUNNING_MAX:
        tile_max = tl.max(tl.max(capped, 2), 0)
        if PREDICTED:
            wins = tile_max > capped_max
            if wins_ties is not None:
                wins = wins | ((tile_max == capped_max) & wins_ties)
            argmax_base = tl.where(wins, tile_base, argmax_base)
        new_max = tl.maximum(capped_max, tile_max)
        sum_exp, sum_exp_t = rescale(sum_exp, sum_exp_t, (capped_max - new_max) * scale_log2)
        capped_max = new_max
        t = (capped - new_max[None, :, None]) * scale_log2
    else:
        t = tl.fma(capped, scale_log2, -capped_max)
    exp_t = tl.exp2(t)
    sum_exp += tl.sum(tl.sum(exp_t, 2), 0)
    if ENTROPY:
        sum_exp_t += tl.sum(tl.sum(exp_t * tl.maximum(t, -1000.0), 2), 0)  # 2**t is 0 there; 0 * -inf would be NaN
    if SMOOTHING:
        w_t = capped * scale_log2 if RUNNING_MAX else t
        w_t *= class_weight
        w_t = w_t if valid is None else tl.where(valid, w_t, 0.0)
        sum_w_t += tl.sum(tl.sum(w_t, 2), 0)
    return capped_max, sum_exp, sum_exp_t, sum_w_t, argmax_base


@triton.jit
def nll_of_sum(sum_exp, target_t):
    """The NLL in base 2 and log2 of the whole sum, in float64. `sum_exp` leaves the target out; its t is `target_t`.

        nll2 = log2(1 + sum_exp / 2**target_t)

    This form subtracts no large numbers and keeps a small sum_exp. Where the target is so far below the rest that the
    quotient overflows, nll2 = log2(sum_exp + 2**target_t) - target_t loses nothing.
    """
    depth = target_t.to(tl.float32)
    shallow = depth > -100.0
    n = tl.floor(depth + 0.5)  # 2**-n is exact
    rest = (
        sum_exp
        * ((127 - n.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
        * tl.exp2((n.to(tl.float64) - target_t).to(tl.float32))
    )
    whole, fraction = log2_parts(
        tl.where(shallow, rest, float("inf")), tl.where(shallow, 1.0 + rest, sum_exp + tl.exp2(depth))
    )
    whole += tl.where(shallow, depth - depth, 0.0)  # a target of +inf is NaN, as in PyTorch
    log = whole.to(tl.float64) + fraction.to(tl.float64)
    return tl.where(shallow, log, log - target_t), tl.where(shallow, log + target_t, log)


@triton.jit
def entropy_of_sum(sum_exp, sum_exp_t, target_t, log2_sum):
    """Entropy in nats, lse - sum_v p[v] * z[v], from the sums without the target and the target's t."""
    target_t = target_t.to(tl.float32)
    target_exp = tl.exp2(target_t)
    mean_t = tl.fma(target_exp, tl.maximum(target_t, -1000.0), sum_exp_t) / (sum_exp + target_exp)
    return (log2_sum.to(tl.float32) - mean_t) * LN2


@triton.jit
def gradient_coefficients(dloss, dz_loss, class_weight, token_weight, class_weight_sum, lse, scalars, num_classes):
    """A, A - B and C of  dz[v] = A * p[v] - C * w[v] - B * [v = y],  all of them times logit_scale.

        B = (1 - smoothing) * dloss * token_weight * w[y]            C = smoothing / V * dloss * token_weight
        A - B = C * sum_v w[v] + 2 * z_loss * lse * dz_loss * token_weight * w[y]

    A - B is returned because B is nearly A, and their difference would lose digits. C is 0 without label smoothing.
    """
    dloss = dloss * scalars.logit_scale * token_weight
    B = dloss * class_weight  # before smoothing
    A_minus_B = tl.zeros_like(B)
    if scalars.z_loss is not None:
        A_minus_B += dz_loss * scalars.logit_scale * (token_weight * class_weight) * (2.0 * scalars.z_loss) * lse
    if scalars.smoothing is None:
        return B + A_minus_B, A_minus_B, 0.0
    else:
        C = dloss * (scalars.smoothing / num_classes)
        A_minus_B += C * class_weight_sum
        return B * (1.0 - scalars.smoothing) + A_minus_B, A_minus_B, C


@triton.jit
def split_lse(lse, nll, scale_log2):
    """(lse_factor, lse2, scale_log2), all float32, so that p = lse_factor * 2**(capped * scale_log2 - lse2).

    lse2 is the float64 lse rounded, and lse_factor is 2 to the rest. Callers multiply A by it once per row. Without it,
    |z| = 1e4 would cost 1e-3 of every p.

    From |lse2| = 2**30 on, 2 to the rest is not a float32. Neighbouring logits are then so far apart that only the
    largest have a p above 0. Such a row gets a power of 2 as its scale_log2, under which the largest logit is exact.
    Its lse_factor is 1 / their number, taken from nll if the target is one of them, otherwise from lse.
    """
    lse2 = lse * LOG2E
    high = lse2.to(tl.float32)
    scale32 = tl.cast(scale_log2, tl.float32)
    exact, guess = scale32.to(tl.float64), (1.0 / scale32).to(tl.float64)
    largest = (lse2 * (guess * (2.0 - exact * guess))).to(tl.float32)
    power_of_2 = (scale32.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    far = tl.abs(high) >= 1073741824.0
    low = (high.to(tl.float64) - lse2).to(tl.float32)
    shared = (largest.to(tl.float64) * exact - lse2).to(tl.float32)
    shared = tl.where(tl.abs(high) < 1e14, tl.minimum(shared, 0.0), 0.0)
    shared = tl.where(nll < 40.0, nll * -LOG2E, shared)
    return (
        pow2(tl.where(far, shared, low)),
        tl.where(far, largest * power_of_2, high),
        tl.where(far, power_of_2, scale32),
    )


@triton.jit
def gradient(capped, slope, class_weight, scale_log2, lse2, A, C, is_target, at_target, E=None):
    """((A + E * log2 p) * p - C * w) * slope of a tile, and at_target * slope at the target. p is 0 for a logit of -inf.

    E is None unless the entropy has an upstream gradient.
    """
    log2_p = tl.fma(capped, scale_log2, -lse2)
    p = tl.exp2(log2_p)
    if E is not None:
        A = tl.fma(tl.maximum(log2_p, -1000.0), E, A)  # p is 0 there, and 0 * -inf would be NaN
    g = p * A if C is None else tl.fma(p, A, -C * class_weight)
    g = g if is_target is None else tl.where(is_target, at_target, g)
    return g * slope


@triton.jit
def one_minus_p(nll):
    """1 - p[y], accurate relative to itself."""
    return -expm1(-nll)


@triton.jit
def add_statistics(at_target, A, lse_factor, nll, dlse, dentropy, entropy):
    """(at_target, A, E) with the upstream gradients of lse and entropy; A and E are multiplied by lse_factor.

        lse      dz[v] = dlse * p[v]
        entropy  H = -sum_v p[v] ln p[v],    dz[v] = -dentropy * p[v] * (ln p[v] + H)

    `dentropy` is None where the entropy has no upstream gradient, and E is None then. All are times logit_scale. ln p
    is z - lse, which `gradient` rounds by the log of lse_factor.
    """
    nll = tl.minimum(nll, 1000.0)  # p is 0 there, and 0 * inf would be NaN
    p = tl.exp2(nll * -LOG2E)
    if dentropy is None:
        return tl.fma(p, dlse, at_target), tl.fma(dlse, lse_factor, A), None
    else:
        at_target = tl.fma(p, tl.fma(dentropy, nll - entropy, dlse), at_target)
        E = dentropy * -LN2
        of_all = tl.fma(E, tl.log2(lse_factor), tl.fma(-dentropy, entropy, dlse))
        return at_target, tl.fma(of_all, lse_factor, A), E * lse_factor


@triton.jit
def gradient_at_target(nll, class_weight, A, A_minus_B, C):
    """A * p[y] - B - C * w[y] = A * expm1(-nll) + (A - B) - C * w[y]; it is accurate also if p[y] is nearly 1."""
    g = tl.fma(A, expm1(-nll), A_minus_B)
    return g if C is None else g - C * class_weight
