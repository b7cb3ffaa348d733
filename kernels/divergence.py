# SPDX-License-Identifier: Apache-2.0
"""Two rows of logits, a student's and a teacher's, to their divergence and the gradient of the student's logits.

Grid: (N rows,). Passes of a program over its two rows, each from L2 but the first:

1. The sums of both rows (`row_sums.sum_row`), with entropy and argmax.
2. The divergence. In direction "forward" the gradient is written here, because it does not depend on D.
3. The other two directions write the gradient, if there is one to write.

The obvious single pass, D = sum_v q (t - z) - lse_t + lse_z, subtracts numbers as large as the logits, and loses a small D.
Traffic, for logits of b bytes: 2 * N * V * b read and N * V * b written, if L2 holds the rows between the passes. All
accesses have 16 bytes where both rows begin at the same place between two boundaries, as those of a head do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_ppl.kernels import divergence_formula, elementary, nll_backward, row_formula, row_sums, row_tiles
from fused_ppl.kernels.launch import DivergenceRows, DivergenceUpstream, LaunchConfig, LossScalars, on_device

DIRECTIONS = {"forward": 0, "reverse": 1, "jensen_shannon": 2}


@triton.jit
def row_log_sum(row_ptr, V, scalars, ENTROPY: tl.constexpr, COLUMN: tl.constexpr, CONTIGUOUS: tl.constexpr,
                K: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """(largest capped logit, log2 of the sum of exponentials relative to it, its lowest column, entropy) of a row."""
    largest, sum_exp, sum_exp_t, _, column = row_sums.sum_row(
        row_ptr, None, -1, row_formula.LOWEST, scalars.scale_log2, scalars.tanh_scale, V, 1, 0, V + 1, True, ENTROPY,
        COLUMN, False, CONTIGUOUS, K, T,
    )  # fmt: skip
    whole, fraction = elementary.log2_parts(sum_exp - 1.0, sum_exp)
    log_sum = tl.where(sum_exp > 0.0, whole + fraction, float("-inf"))
    return largest, log_sum, tl.where(column < V, column, 0), (log_sum - sum_exp_t / sum_exp) * elementary.LN2


@triton.jit
def logs(capped_z, capped_t, sums, student, teacher):
    """log2 p and log2 q. `sums` are those of `row_log_sum`: of the student, then of the teacher."""
    z_max, z_log2, t_max, t_log2 = sums
    log_p2 = tl.fma(capped_z - z_max, student.scale_log2, -z_log2)
    return log_p2, tl.fma(capped_t - t_max, teacher.scale_log2, -t_log2)


@triton.jit
def fold(capped_z, slope, capped_t, sums, of_p, value, center, mean, factor, student, teacher, beta,
         DIRECTION: tl.constexpr):  # fmt: skip
    """The sums of p * (gap of p - center), and of the terms of D or of its q part, and the gradient of the logits.

    sum q ln(q / p) alone would keep the rounding of both lse. With p - q it cancels, and each term is >= 0.
    """
    log_p2, log_q2 = logs(capped_z, capped_t, sums, student, teacher)
    p, q = elementary.pow2(log_p2), elementary.pow2(log_q2)
    gap_p, gap_q = divergence_formula.gaps(p, log_p2, q, log_q2, beta, DIRECTION)
    terms, dz = q * gap_q, p * ((gap_p - center) - mean)
    if DIRECTION == 0:
        dz = divergence_formula.difference(p, log_p2, q, log_q2)
        terms += dz
    elif DIRECTION == 1:
        terms = p * gap_p - divergence_formula.difference(p, log_p2, q, log_q2)
    of_p += tl.sum(tl.sum(p * (gap_p - center), 2), 0)
    value += tl.sum(tl.sum(terms, 2), 0)
    return of_p, value, dz if factor is None else dz * slope * factor


@triton.jit
def capped_tile(body_ptr, tile, limit, tanh_scale, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
                L: tl.constexpr):  # fmt: skip
    """A tile behind the softcap, -inf from `limit` on, and the slope of the softcap."""
    capped, slope = row_formula.cap(row_tiles.load_tile(body_ptr, tile, limit, 1, CONTIGUOUS, K, T, L), tanh_scale)
    if tanh_scale is not None and limit is not None:  # the cap of -inf is finite
        capped = tl.where(row_tiles.offsets(tile, K, T, L) < limit, capped, float("-inf"))
    return capped, slope


@triton.jit
def walk(student_ptr, teacher_ptr, out_ptr, sums, center, mean, factor, student, teacher, beta, V,
         DIRECTION: tl.constexpr, WRITE: tl.constexpr, CONTIGUOUS: tl.constexpr, K: tl.constexpr,
         T: tl.constexpr):  # fmt: skip
    """A pass over both rows: the two sums of `fold`, and with WRITE the gradient into `out_ptr`."""
    L: tl.constexpr = row_tiles.VECTOR_BYTES * 8 // student_ptr.dtype.element_ty.primitive_bitwidth if CONTIGUOUS else 1
    body_ptr, prefix, body_len = row_tiles.find_body(student_ptr, V, CONTIGUOUS, L)
    teacher_body = row_tiles.find_body(teacher_ptr, V, CONTIGUOUS, L)[0]
    out_body = row_tiles.find_body(out_ptr, V, CONTIGUOUS, L)[0] if WRITE else None
    of_p, value = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    last_tile = body_len // (K * T * L)
    for tile in range(0, last_tile):
        z, slope = capped_tile(body_ptr, tile, None, student.tanh_scale, CONTIGUOUS, K, T, L)
        t = capped_tile(teacher_body, tile, None, teacher.tanh_scale, CONTIGUOUS, K, T, L)[0]
        of_p, value, g = fold(z, slope, t, sums, of_p, value, center, mean, factor, student, teacher, beta, DIRECTION)
        if WRITE:
            row_tiles.store_tile(out_body, g, tile, None, 1, CONTIGUOUS, K, T, L)
    z, slope = capped_tile(body_ptr, last_tile, body_len, student.tanh_scale, CONTIGUOUS, K, T, L)
    t = capped_tile(teacher_body, last_tile, body_len, teacher.tanh_scale, CONTIGUOUS, K, T, L)[0]
    of_p, value, g = fold(z, slope, t, sums, of_p, value, center, mean, factor, student, teacher, beta, DIRECTION)
    if WRITE:
        row_tiles.store_tile(out_body, g, last_tile, body_len, 1, CONTIGUOUS, K, T, L)
    if CONTIGUOUS:
        offs_v, valid = row_tiles.edge_columns(prefix, body_len, V, 0, T)
        z, slope = row_formula.cap(tl.load(student_ptr + offs_v, mask=valid).to(tl.float32), student.tanh_scale)
        t = row_formula.cap(tl.load(teacher_ptr + offs_v, mask=valid).to(tl.float32), teacher.tanh_scale)[0]
        z, t = tl.where(valid, z, float("-inf")), tl.where(valid, t, float("-inf"))
        of_p, value, g = fold(z, slope, t, sums, of_p, value, center, mean, factor, student, teacher, beta, DIRECTION)
        if WRITE:
            tl.store(out_ptr + offs_v, g.to(out_ptr.dtype.element_ty), mask=valid)
    return tl.sum(of_p, 0), tl.sum(value, 0)


@triton.jit
def logs_at(column, student_ptr, teacher_ptr, sums, student, teacher):
    """log2 p and log2 q of one class."""
    z, _ = row_formula.cap(tl.load(student_ptr + column).to(tl.float32), student.tanh_scale)
    t, _ = row_formula.cap(tl.load(teacher_ptr + column).to(tl.float32), teacher.tanh_scale)
    return logs(z, t, sums, student, teacher)


@triton.jit
def store_facts(row, rows, entropy, teacher_entropy, agrees, difference):
    if rows.entropy is not None:
        tl.store(rows.entropy + row, entropy)
        tl.store(rows.teacher_entropy + row, teacher_entropy)
        tl.store(rows.agrees + row, agrees)
        tl.store(rows.log_prob_difference + row, difference)


@triton.jit
def divergence_row(row, student_ptr, teacher_ptr, out_ptr, target, rows, factor, student, teacher, beta, V,
                   DIRECTION: tl.constexpr, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """All passes over one row. `factor` is the upstream gradient with dz/dx apart from the slope, or None."""
    STATS: tl.constexpr = rows.entropy is not None
    z_max, z_log2, z_column, z_entropy = row_log_sum(
        student_ptr, V, student, STATS, STATS or DIRECTION != 0, CONTIGUOUS, K, T
    )
    t_max, t_log2, t_column, t_entropy = row_log_sum(teacher_ptr, V, teacher, STATS, STATS, CONTIGUOUS, K, T)
    sums = (z_max, z_log2, t_max, t_log2)
    column = row_tiles.find_target_column(target, 0, V)
    if STATS:  # before the gradient takes the place of the logits
        target_p2, target_q2 = logs_at(tl.maximum(column, 0), student_ptr, teacher_ptr, sums, student, teacher)
        agrees = (z_column == t_column).to(tl.int32)
        gap = tl.where(target_p2 == target_q2, 0.0, target_p2 - target_q2)  # a class may be excluded by both
        store_facts(row, rows, z_entropy, t_entropy, agrees, gap * elementary.LN2)
        if DIRECTION == 0:
            tl.debug_barrier()  # every thread has read the target's logit, which another one will overwrite

    # gap - D subtracts nearly equal numbers where p is near 1: both are taken relative to the gap of the likeliest class
    center = 0.0
    if DIRECTION != 0:
        top_p2, top_q2 = logs_at(z_column, student_ptr, teacher_ptr, sums, student, teacher)
        center, _ = divergence_formula.gaps(
            elementary.pow2(top_p2), top_p2, elementary.pow2(top_q2), top_q2, beta, DIRECTION
        )
        center = tl.where(center < float("inf"), center, 0.0)
    unknown = (z_log2 - z_log2) + (t_log2 - t_log2)  # NaN of a row that holds NaN or +inf, or nothing but -inf, else 0
    WRITES: tl.constexpr = factor is not None
    if WRITES:
        factor += unknown
    mean, value = walk(
        student_ptr, teacher_ptr, out_ptr, sums, center, 0.0, factor, student, teacher, beta, V, DIRECTION,
        WRITES and DIRECTION == 0, CONTIGUOUS, K, T,
    )  # fmt: skip
    if DIRECTION == 2:
        value = beta * value + (1.0 - beta) * (mean + center)
    tl.store(rows.divergence + row, tl.where(column >= 0, value + unknown, float("nan")))
    if WRITES and DIRECTION != 0:
        if DIRECTION == 2:
            factor *= 1.0 - beta
        walk(
            student_ptr, teacher_ptr, out_ptr, sums, center, mean, factor, student, teacher, beta, V, DIRECTION, True,
            CONTIGUOUS, K, T,
        )  # fmt: skip


_INTEGERS = ["ignore_index", "V", "R", "student_b", "student_r", "teacher_b", "teacher_r", "out_b", "out_r"]


@triton.jit(
    do_not_specialize=[*_INTEGERS, "beta"], do_not_specialize_on_alignment=["student_ptr", "teacher_ptr", "out_ptr"]
)
def divergence_kernel(
    student_ptr, teacher_ptr, target_ptr,  # inputs
    rows, out_ptr,  # outputs
    upstream, student, teacher, beta, ignore_index,  # scalars
    V, R,  # sizes
    student_b, student_r, teacher_b, teacher_r, out_b, out_r,  # strides
    DIRECTION: tl.constexpr, CONTIGUOUS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    own_out = out_ptr if out_ptr is None else row_tiles.row_pointer(out_ptr, row, R, out_b, out_r)
    if row_tiles.is_ignored(target, ignore_index):  # it is not read: its logits may be NaN
        tl.store(rows.divergence + row, 0.0)
        store_facts(row, rows, 0.0, 0.0, 0, 0.0)
        if out_ptr is not None:
            nll_backward.zero_row(own_out, 0, V + 1, V, 1, CONTIGUOUS, K, T)
    else:
        if out_ptr is not None:  # and then there is an upstream gradient
            factor = tl.load(upstream.gradient + row) * student.logit_scale
            if upstream.token_weight is not None:
                factor *= tl.load(upstream.token_weight + row).to(tl.float32)
        else:
            factor = None
        divergence_row(
            row, row_tiles.row_pointer(student_ptr, row, R, student_b, student_r),
            row_tiles.row_pointer(teacher_ptr, row, R, teacher_b, teacher_r), own_out, target, rows, factor, student,
            teacher, beta, V, DIRECTION, CONTIGUOUS, K, T,
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
    config: LaunchConfig,
    contiguous: bool,  # whether the rows of all have their 16-byte boundaries at the same columns
    ignore_index: int | None,
) -> None:
    """Writes `rows`, and with `upstream` the gradient of the logits into `out`."""
    B, R, V = logits.shape
    if B * R == 0:
        return
    (student_b, student_r, _), (teacher_b, teacher_r, _) = logits.stride(), teacher_logits.stride()
    out_b, out_r, _ = (0, 0, 1) if out is None else out.stride()
    with on_device(logits):
        divergence_kernel[(B * R,)](
            student_ptr=logits, teacher_ptr=teacher_logits, target_ptr=target,
            rows=rows, out_ptr=out,
            upstream=upstream, student=student, teacher=teacher, beta=beta, ignore_index=ignore_index,
            V=V, R=R,
            student_b=student_b, student_r=student_r, teacher_b=teacher_b, teacher_r=teacher_r, out_b=out_b, out_r=out_r,
            DIRECTION=DIRECTIONS[direction], CONTIGUOUS=contiguous, K=config.vectors, T=config.threads,
            num_warps=config.num_warps, enable_fp_fusion=False, **config.compiler_options,
        )  # fmt: skip
