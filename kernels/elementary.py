# SPDX-License-Identifier: Apache-2.0
"""Elementary functions of the row formula, each accurate relative to itself, and the constants of base 2.

They are written out because libdevice runs neither in Triton's interpreter nor on AMD.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEAR = tl.constexpr(0.35)


@triton.jit
def log2_parts(x, y):
    """log2(y) as a whole number and a fraction; y is 1 + x, and x is used instead of y where x < 0.5.

    The result is accurate relative to itself, because 1 + x would round a small x away. It has two parts because the
    caller adds it to a float64.
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
def log1p2(x):
    """log2(1 + x) for x > -1, accurate relative to itself."""
    whole, fraction = log2_parts(tl.where(x > -0.25, x, 1.0), 1.0 + x)  # 1 + x is good enough from -0.25 down
    return whole + fraction


@triton.jit
def pow2(x):
    """2**x; other kernel files call this, because no other file may name an exponential."""
    return tl.exp2(x)


@triton.jit
def expm1_near(x):
    """exp(x) - 1 for |x| < NEAR, accurate relative to itself."""
    series = tl.fma(tl.fma(x, 1 / 5040, 1 / 720), x, 1 / 120)
    return x * tl.fma(tl.fma(tl.fma(tl.fma(series, x, 1 / 24), x, 1 / 6), x, 1 / 2), x, 1.0)


@triton.jit
def expm1(x):
    """exp(x) - 1, accurate relative to itself."""
    return tl.where(tl.abs(x) < NEAR, expm1_near(x), tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)**2, both accurate relative to itself."""
    square = x * x
    odd = tl.fma(tl.fma(square, 0.017241488629190206, -0.05304549305535581), square, 0.13325878942189787)
    odd = tl.fma(odd, square, -0.33333143895720213)  # minimax on [0, 0.5], relative error 1.5e-8
    near = tl.fma(odd * square, x, x)
    root = tl.rsqrt(1.0 + tl.exp2(tl.abs(x) * (2 * LOG2E)))
    complement = 2.0 * root * root  # 1 - tanh|x|; this takes two instructions, a division takes eight
    far = tl.where(x < 0, complement - 1.0, 1.0 - complement)
    return tl.where(tl.abs(x) < 0.5, near, far), complement * (2.0 - complement)
