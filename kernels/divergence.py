# SPDX-License-Identifier: Apache-2.0
"""Two rows of logits, a student's and a teacher's, to their divergence and the gradient of the student's logits.

    p = softmax(z) of the student, q = softmax(t) of the teacher, m = beta q + (1 - beta) p

    forward         D = sum_v q ln(q / p)                                   dD/dz = p - q
    reverse         D = sum_v p ln(p / q)                                   dD/dz = p (ln(p / q) - D)
    jensen_shannon  D = beta sum_v q ln(q / m) + (1 - beta) K
                    K = sum_v p ln(p / m)                                   dD/dz = (1 - beta) p (ln(p / m) - K)

Grid: (N rows,). Passes of a program over its two rows, each from L2 but the first:

1. The maximum and the sum of exponentials of both (`row_sums`), kept by each thread, and added at the end of the row.
2. The divergence. In direction "forward" the gradient is written here, because it does not depend on D.
3. The other two directions write the gradient, if there is one to write.

The obvious single pass is D = sum_v q (t - z) - lse_t + lse_z. It subtracts numbers as large as the logits, and a small D
is lost. Here log p and log q are each relative to their own maximum, and D is 0 where both rows are the same.

Traffic, for logits of b bytes: 2 * N * V * b read and N * V * b written, if L2 holds the rows between the passes.
Accesses have 16 bytes where V is a multiple of 16, which vocabularies of models are padded to.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import elementary, row_formula, row_tiles
from fused_ppl.kernels.launch import DivergenceRows, DivergenceUpstream, LossScalars, on_device

DIRECTIONS = {"forward": 0, "reverse": 1, "jensen_shannon": 2}


@triton.jit
def load_capped(row_ptr, offs_v, V, tanh_scale):
    """Logits in fp32 behind the softcap, -inf from V on, and the slope of the softcap."""
    valid = offs_v < V
    capped, slope = row_formula.cap(tl.load(row_ptr + offs_v, mask=valid, other=0.0).to(tl.float32), tanh_scale)
    return tl.where(valid, capped, float("-inf")), slope


@triton.jit
def row_sums(row_ptr, V, scalars, BLOCK: tl.constexpr):
    """(largest capped logit, log2 of the sum of exponentials relative to it, its lowest column) of one row."""
    largest = tl.full((BLOCK,), row_formula.LOWEST, tl.float32)
    sum_exp, column = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for first in range(0, V, BLOCK):
        offs_v = first + tl.arange(0, BLOCK)
        capped, _ = load_capped(row_ptr, offs_v, V, scalars.tanh_scale)
        column = tl.where(capped > largest, offs_v, column)
        new_largest = tl.maximum(largest, capped)
        kept = sum_exp * elementary.pow2((largest - new_largest) * scalars.scale_log2)
        sum_exp = kept + elementary.pow2((capped - new_largest) * scalars.scale_log2)
        largest = new_largest
    row_max = tl.max(largest, 0)
    total = tl.sum(sum_exp * elementary.pow2((largest - row_max) * scalars.scale_log2), 0)
    whole, fraction = elementary.log2_parts(total - 1.0, total)
    return row_max, whole + fraction, tl.min(tl.where(largest == row_max, column, V), 0)


@triton.jit
def gaps(p, log_p2, q, log_q2, beta, DIRECTION: tl.constexpr):
    """(log2(p / r), log2(q / r)), 0 where the first is 0. r is the other prediction, or the mixture m of both.

    With d = ln(q / p), ln(p / m) = -log1p(beta expm1(d)) and ln(q / m) = -log1p((1 - beta) expm1(-d)) keep the digits of
    a small d. Beyond 80 nats p or q is below 1e-34, and its term has no weight.
    """
    if DIRECTION == 2:
        d = tl.minimum(tl.maximum((log_q2 - log_p2) * elementary.LN2, -80.0), 80.0)
        d = tl.where((p > 0.0) | (q > 0.0), d, 0.0)
        return -elementary.log1p2(beta * elementary.expm1(d)), -elementary.log1p2((1.0 - beta) * elementary.expm1(-d))
    else:
        return tl.where(p > 0.0, log_p2 - log_q2, 0.0), tl.where(q > 0.0, log_q2 - log_p2, 0.0)


@triton.jit
def load_logs(student_ptr, teacher_ptr, offs_v, student_sums, teacher_sums, student, teacher, V):
    """log2 p, log2 q, and the slope of the student's softcap."""
    z, slope = load_capped(student_ptr, offs_v, V, student.tanh_scale)
    t, _ = load_capped(teacher_ptr, offs_v, V, teacher.tanh_scale)
    log_p2 = tl.fma(z - student_sums[0], student.scale_log2, -student_sums[1])
    return log_p2, tl.fma(t - teacher_sums[0], teacher.scale_log2, -teacher_sums[1]), slope


@triton.jit
def store_gradient(out_ptr, offs_v, dz, slope, factor, V):
    tl.store(out_ptr + offs_v, (dz * slope * factor).to(out_ptr.dtype.element_ty), mask=offs_v < V)


@triton.jit
def store_row(row, rows, value, entropy, teacher_entropy, agrees, difference):
    tl.store(rows.divergence + row, value)
    if rows.entropy is not None:
        tl.store(rows.entropy + row, entropy)
        tl.store(rows.teacher_entropy + row, teacher_entropy)
        tl.store(rows.agrees + row, agrees)
        tl.store(rows.log_prob_difference + row, difference)


@triton.jit
def divergence_row(row, student_ptr, teacher_ptr, out_ptr, target, rows, factor, student, teacher, beta, V,
                   DIRECTION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """All passes over one row. `factor` is the upstream gradient with dz/dx apart from the slope, or None."""
    STATS: tl.constexpr = rows.entropy is not None
    z_max, z_log2, z_column = row_sums(student_ptr, V, student, BLOCK)
    t_max, t_log2, t_column = row_sums(teacher_ptr, V, teacher, BLOCK)
    student_sums, teacher_sums = (z_max, z_log2), (t_max, t_log2)

    of_p, of_q = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    entropy_p, entropy_q = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    difference = 0.0
    if STATS:  # before the gradient takes the place of the logits
        column = row_tiles.find_target_column(target, 0, V)
        at_p, at_q, _at_slope = load_logs(
            student_ptr, teacher_ptr, tl.maximum(column, 0), student_sums, teacher_sums, student, teacher, V
        )
        difference = (at_p - at_q) * elementary.LN2
    # p * (gap - D) is taken relative to the gap of the most likely class: with p near 1, little else is left of it
    top_p2, top_q2, _top_slope = load_logs(
        student_ptr, teacher_ptr, z_column, student_sums, teacher_sums, student, teacher, V
    )
    center, _top_gap_q = gaps(elementary.pow2(top_p2), top_p2, elementary.pow2(top_q2), top_q2, beta, DIRECTION)
    center = tl.where(center < float("inf"), center, 0.0)
    for first in range(0, V, BLOCK):
        offs_v = first + tl.arange(0, BLOCK)
        log_p2, log_q2, slope = load_logs(
            student_ptr, teacher_ptr, offs_v, student_sums, teacher_sums, student, teacher, V
        )
        p, q = elementary.pow2(log_p2), elementary.pow2(log_q2)
        gap_p, gap_q = gaps(p, log_p2, q, log_q2, beta, DIRECTION)
        of_p += p * (gap_p - center)
        of_q += q * gap_q
        if STATS:
            entropy_p += p * tl.maximum(log_p2, -1000.0)
            entropy_q += q * tl.maximum(log_q2, -1000.0)
        if DIRECTION == 0 and factor is not None:
            store_gradient(out_ptr, offs_v, p - q, slope, factor, V)
    mean = tl.sum(of_p, 0)
    k_p, k_q = (mean + center) * elementary.LN2, tl.sum(of_q, 0) * elementary.LN2
    value = k_q if DIRECTION == 0 else (k_p if DIRECTION == 1 else beta * k_q + (1.0 - beta) * k_p)
    value = tl.where((target >= 0) & (target < V), value, float("nan"))
    store_row(
        row, rows, value, -tl.sum(entropy_p, 0) * elementary.LN2, -tl.sum(entropy_q, 0) * elementary.LN2,
        z_column == t_column, difference,
    )  # fmt: skip

    if DIRECTION != 0 and factor is not None:
        share = 1.0 if DIRECTION == 1 else 1.0 - beta
        for first in range(0, V, BLOCK):
            offs_v = first + tl.arange(0, BLOCK)
            log_p2, log_q2, slope = load_logs(
                student_ptr, teacher_ptr, offs_v, student_sums, teacher_sums, student, teacher, V
            )
            p = elementary.pow2(log_p2)
            gap_p, gap_q = gaps(p, log_p2, elementary.pow2(log_q2), log_q2, beta, DIRECTION)
            store_gradient(out_ptr, offs_v, share * p * ((gap_p - center) - mean), slope, factor * elementary.LN2, V)


@triton.jit(do_not_specialize=["ignore_index", "V", "beta"])
def divergence_kernel(
    student_ptr, teacher_ptr, target_ptr,  # inputs
    rows, out_ptr,  # outputs
    upstream, student, teacher, beta, ignore_index,  # scalars
    V, R,  # sizes
    student_b, student_r, teacher_b, teacher_r, out_b, out_r,  # strides
    DIRECTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    ignored = row_tiles.is_ignored(target, ignore_index)
    own_out = out_ptr if out_ptr is None else row_tiles.row_pointer(out_ptr, row, R, out_b, out_r)
    # an ignored row is not read: its logits may be NaN
    if ignored:
        store_row(row, rows, 0.0, 0.0, 0.0, False, 0.0)
        if out_ptr is not None:
            for first in range(0, V, BLOCK):
                offs_v = first + tl.arange(0, BLOCK)
                tl.store(own_out + offs_v, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=offs_v < V)
    else:
        factor = None
        if upstream is not None:
            factor = tl.load(upstream.gradient + row) * student.logit_scale
            if upstream.token_weight is not None:
                factor *= tl.load(upstream.token_weight + row).to(tl.float32)
        divergence_row(
            row, row_tiles.row_pointer(student_ptr, row, R, student_b, student_r),
            row_tiles.row_pointer(teacher_ptr, row, R, teacher_b, teacher_r), own_out, target, rows, factor, student,
            teacher, beta, V, DIRECTION, BLOCK,
        )  # fmt: skip


def launch_divergence(
    logits: Tensor,  # (B, R, V), stride(2) = 1
    teacher_logits: Tensor,  # the same
    target: Tensor,  # (B * R,) int32 or int64
    *,
    rows: DivergenceRows,
    upstream: DivergenceUpstream | None,
    out: Tensor | None,  # (B, R, V), stride(2) = 1; given with `upstream`, and may be the logits
    student: LossScalars,
    teacher: LossScalars,
    direction: str,
    beta: float,
    ignore_index: int | None,
) -> None:
    """Writes `rows`, and with `upstream` the gradient of the logits into `out`."""
    B, R, V = logits.shape
    if B * R == 0:
        return
    num_warps = 4 if V < 8192 else 8
    strides = logits.stride()[:2], teacher_logits.stride()[:2], (0, 0) if out is None else out.stride()[:2]
    (student_b, student_r), (teacher_b, teacher_r), (out_b, out_r) = strides
    with on_device(logits):
        divergence_kernel[(B * R,)](
            student_ptr=logits, teacher_ptr=teacher_logits, target_ptr=target,
            rows=rows, out_ptr=out,
            upstream=upstream, student=student, teacher=teacher, beta=beta, ignore_index=ignore_index,
            V=V, R=R,
            student_b=student_b, student_r=student_r, teacher_b=teacher_b, teacher_r=teacher_r, out_b=out_b, out_r=out_r,
            DIRECTION=DIRECTIONS[direction], BLOCK=num_warps * 32 * 16 // min(logits.itemsize, teacher_logits.itemsize),
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
