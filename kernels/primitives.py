# SPDX-License-Identifier: Apache-2.0
"""The row formula, as every kernel uses it, and the elementary functions that it needs.

Nothing here touches memory (walk.py does) or knows a launch. Derivations are in README.md beside this file. All
exponentials are base 2: a logit enters as z * log2(e) = a * multiplier, where a is the logit itself, or
tanh(squash * logit) under a softcap.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a finite start for running maxima: -inf - -inf is NaN


# --- elementary functions: libdevice runs neither in the interpreter nor on every target -------------------------


@triton.jit
def log2_parts(x, y):
    """log2(y) as a whole number and a fraction, accurate relative to the result; where x < 0.5, that of 1 + x.

    Two parts, because log2 of a row's sum joins a float64; 1 + x alone would round a small x away.
    """
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # y / 2**exponent in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    small = x < 0.5
    w = tl.where(small, x, m - 1.0) / tl.where(small, 2.0 + x, m + 1.0)
    square = w * w  # log(m) = 2 atanh(w)
    series = tl.fma(square, 1 / 11, 1 / 9)
    series = tl.fma(tl.fma(tl.fma(tl.fma(series, square, 1 / 7), square, 1 / 5), square, 1 / 3), square, 1.0)
    regular = small | ((y > 0) & (y < float("inf")))
    whole = tl.where(small, 0.0, exponent.to(tl.float32))
    return tl.where(regular, whole, tl.log2(y)), tl.where(regular, w * series * (2 * LOG2E), 0.0)


@triton.jit
def power(x):
    """2**x."""
    return tl.exp2(x)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, accurate relative to the result."""
    series = tl.fma(tl.fma(x, 1 / 5040, 1 / 720), x, 1 / 120)
    series = tl.fma(tl.fma(tl.fma(tl.fma(series, x, 1 / 24), x, 1 / 6), x, 1 / 2), x, 1.0)
    return tl.where(x > -0.35, x * series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)**2, both accurate relative to the result."""
    square = x * x
    odd = tl.fma(tl.fma(square, 0.017241488629190206, -0.05304549305535581), square, 0.13325878942189787)
    odd = tl.fma(odd, square, -0.33333143895720213)  # minimax on [0, 0.5], relative error 1.5e-8
    near = tl.fma(odd * square, x, x)
    root = tl.rsqrt(1.0 + tl.exp2(tl.abs(x) * (2 * LOG2E)))
    q = 2.0 * root * root  # 1 - tanh|x|; two instructions, where a division takes eight
    far = tl.where(x < 0, q - 1.0, 1.0 - q)
    return tl.where(tl.abs(x) < 0.5, near, far), q * (2.0 - q)


@triton.jit
def cap(logits, squash):
    """The factor `a` of z * log2(e) = a * multiplier, and dz / d logits as a share of logit_scale: 1 without a cap."""
    if squash is None:
        return logits, 1.0
    else:
        return tanh_and_slope(logits * squash)


# --- the row formula ---------------------------------------------------------------------------------------------


@triton.jit
def target_reference(a_target, multiplier):
    """8 above the target: an fp32 t is rounded in proportion to |t|, and the terms that matter lie above the target."""
    return tl.fma(a_target, multiplier, 8.0)


@triton.jit
def rescale(s, q, shift):
    """Sums relative to a maximum that rose by -shift."""
    shift = tl.maximum(shift, -1000.0)  # the first maximum rises from LOWEST: 0 * -inf would be NaN
    return s * tl.exp2(shift), tl.exp2(shift) * tl.fma(s, shift, q)


@triton.jit
def accumulate(a, valid, class_weight, here, wins_ties, a_max, s, q, d, best, multiplier, RUNNING_MAX: tl.constexpr,
               ENTROPY: tl.constexpr, PREDICTED: tl.constexpr, SMOOTHING: tl.constexpr):  # fmt: skip
    """Adds a (K, T, L) tile to the sums that each of T threads keeps; nothing crosses a thread.

        s = sum 2**t    q = sum 2**t * t    d = sum class_weight * t    t = a * multiplier - reference

    `a_max` is the reference, fixed (`target_reference`), or the thread's own running maximum of a, that times
    multiplier the reference; then d has none, because shards add theirs.
    """
    if valid is not None:
        a = tl.where(valid, a, float("-inf"))
    if RUNNING_MAX:
        tile_max = tl.max(tl.max(a, 2), 0)
        if PREDICTED:
            wins = tile_max > a_max
            if wins_ties is not None:
                wins = wins | ((tile_max == a_max) & wins_ties)
            best = tl.where(wins, here, best)
        new_max = tl.maximum(a_max, tile_max)
        s, q = rescale(s, q, (a_max - new_max) * multiplier)
        a_max = new_max
        t = (a - new_max[None, :, None]) * multiplier
    else:
        t = tl.fma(a, multiplier, -a_max)
    e = tl.exp2(t)
    s += tl.sum(tl.sum(e, 2), 0)
    if ENTROPY:
        q += tl.sum(tl.sum(e * tl.maximum(t, -1000.0), 2), 0)  # e = 0 there; 0 * -inf would be NaN
    if SMOOTHING:
        u = a * multiplier if RUNNING_MAX else t
        u *= class_weight
        u = u if valid is None else tl.where(valid, u, 0.0)
        d += tl.sum(tl.sum(u, 2), 0)
    return a_max, s, q, d, best


@triton.jit
def nll_of_sum(s, delta):
    """Base-2 NLL, and log2 of the row's sum, in float64; s is the sum without the target, delta the target's t.

    log2(1 + s / 2**delta) needs no difference of large numbers and forgets no small s; with the target so deep that
    this overflows, the difference is harmless.
    """
    depth = delta.to(tl.float32)
    shallow = depth > -100.0
    n = tl.floor(depth + 0.5)  # 2**-n is exact
    rest = (
        s
        * ((127 - n.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
        * tl.exp2((n.to(tl.float64) - delta).to(tl.float32))
    )
    whole, fraction = log2_parts(
        tl.where(shallow, rest, float("inf")), tl.where(shallow, 1.0 + rest, s + tl.exp2(depth))
    )
    whole += tl.where(shallow, depth - depth, 0.0)  # a target of +inf is NaN, as in PyTorch
    log = whole.to(tl.float64) + fraction.to(tl.float64)
    return tl.where(shallow, log, log - delta), tl.where(shallow, log + delta, log)


@triton.jit
def entropy_of_sum(s, q, delta, log2_sum):
    """Entropy in nats from `accumulate`'s s and q, the target's own share added."""
    delta = delta.to(tl.float32)
    share = tl.exp2(delta)
    mean = tl.fma(share, tl.maximum(delta, -1000.0), q) / (s + share)
    return (log2_sum.to(tl.float32) - mean) * LN2


@triton.jit
def coefficients(of_s, of_z, class_weight, token_weight, weight_sum, lse, numbers, num_classes):
    """A, A - B and C of  dz[v] = p[v] * A - C * w[v] - B * [v = target],  times logit_scale.

    A - B apart, because B is nearly A. C is 0 without label smoothing.
    """
    of_row = of_s * numbers.scale * token_weight
    keep = of_row * class_weight
    spread = tl.zeros_like(keep)
    if numbers.z_loss is not None:
        spread += of_z * numbers.scale * (token_weight * class_weight) * (2.0 * numbers.z_loss) * lse
    if numbers.smoothing is None:
        return keep + spread, spread, 0.0
    else:
        pull = of_row * (numbers.smoothing / num_classes)
        spread += pull * weight_sum
        return keep * (1.0 - numbers.smoothing) + spread, spread, pull


@triton.jit
def split_lse(lse, nll, multiplier):
    """lse in base 2 as two fp32: the factor that its low part is, and the high part; and the multiplier to go with it.

    The factor joins A, or |z| = 1e4 would cost 1e-3 of every p. From 2**30 on it would be no fp32. There the logits that
    are the row's largest share all of the mass, and any multiplier says so; under a power of 2 the largest is exact.
    What they share it among is in nll, if the target is one of them, and in lse as far as a float64 holds it.
    """
    lse2 = lse * LOG2E
    high = lse2.to(tl.float32)
    narrow = tl.cast(multiplier, tl.float32)
    exact, guess = narrow.to(tl.float64), (1.0 / narrow).to(tl.float64)
    a_max = (lse2 * (guess * (2.0 - exact * guess))).to(tl.float32)
    coarse = (narrow.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    far = tl.abs(high) >= 1073741824.0
    low = (high.to(tl.float64) - lse2).to(tl.float32)
    shared = (a_max.to(tl.float64) * exact - lse2).to(tl.float32)
    shared = tl.where(tl.abs(high) < 1e14, tl.minimum(shared, 0.0), 0.0)
    shared = tl.where(nll < 40.0, nll * -LOG2E, shared)
    return power(tl.where(far, shared, low)), tl.where(far, a_max * coarse, high), tl.where(far, coarse, narrow)


@triton.jit
def gradient(a, slope, class_weight, multiplier, lse2, A, C, is_target, at_target):
    """(p * A - C * w) * slope of a tile, `at_target` * slope at the target; p = 0 where the logit is -inf."""
    p = tl.exp2(tl.fma(a, multiplier, -lse2))
    g = p * A if C is None else tl.fma(p, A, -C * class_weight)
    g = g if is_target is None else tl.where(is_target, at_target, g)
    return g * slope


@triton.jit
def others_mass(nll):
    """1 - p[y], accurate relative to the result."""
    return -expm1(-nll)


@triton.jit
def gradient_at_target(nll, class_weight, A, spread, C):
    """p * A - B - C * w with p - 1 = expm1(-nll): accurate relative to the result also where p is nearly 1."""
    g = tl.fma(A, expm1(-nll), spread)
    return g if C is None else g - C * class_weight
