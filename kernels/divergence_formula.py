# SPDX-License-Identifier: Apache-2.0
"""The divergence of two predictions and its gradient, class by class. These functions touch no memory.

    p = softmax(z) of the student, q = softmax(t) of the teacher, m = beta q + (1 - beta) p

    forward         D = sum_v q ln(q / p)                                   dD/dz = p - q
    reverse         D = sum_v p ln(p / q)                                   dD/dz = p (ln(p / q) - D)
    jensen_shannon  D = beta sum_v q ln(q / m) + (1 - beta) K
                    K = sum_v p ln(p / m)                                   dD/dz = (1 - beta) p (ln(p / m) - K)

DIRECTION is 0, 1 or 2 in this order.
"""

import triton
import triton.language as tl

from fused_ppl.kernels import elementary


@triton.jit
def gaps(p, log_p2, q, log_q2, beta, DIRECTION: tl.constexpr):
    """(ln(p / r), ln(q / r)), 0 where the first is 0. r is the other prediction, or the mixture m of both.

    With d = ln(q / p), ln(p / m) = -log1p(beta expm1(d)) and ln(q / m) = -log1p((1 - beta) expm1(-d)) keep the digits of
    a small d. Beyond 80 nats p or q is below 1e-34, and its term has no weight.
    """
    if DIRECTION == 2:
        d = tl.minimum(tl.maximum((log_q2 - log_p2) * elementary.LN2, -80.0), 80.0)
        d = tl.where((p > 0.0) | (q > 0.0), d, 0.0)
        of_p, of_q = (
            elementary.log1p2(beta * elementary.expm1(d)),
            elementary.log1p2((1.0 - beta) * elementary.expm1(-d)),
        )
        return of_p * -elementary.LN2, of_q * -elementary.LN2
    else:
        d = (log_p2 - log_q2) * elementary.LN2
        return tl.where(p > 0.0, d, 0.0), tl.where(q > 0.0, -d, 0.0)


@triton.jit
def difference(p, log_p2, q, log_q2):
    """p - q, accurate relative to itself: for a small d = ln(p / q), sign(d) * max(p, q) * (1 - exp(-|d|))."""
    d = tl.abs(log_p2 - log_q2) * elementary.LN2
    near = elementary.expm1_near(-d) * tl.maximum(p, q)
    return tl.where(d < elementary.NEAR, tl.where(log_p2 < log_q2, near, -near), p - q)
