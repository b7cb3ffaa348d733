# SPDX-License-Identifier: Apache-2.0
"""The divergence of a student's predictions from a teacher's: from logits, and through two heads by chunks of rows.

Through heads, a chunk of rows has the logits of both at the same time, and the student's become their gradient in
place. With one upstream gradient for all tokens that happens in forward, unscaled, as in `linear_rows`. Upstream
gradients of each token are known only in backward, which computes both chunks of logits again.

    forward + backward   2NV(D + D_teacher) FLOPs for the logits, 2NVD for each gradient

The largest buffers are the two chunks of logits, and the float32 gradient of the student's weight, V x D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl import reduction
from fused_ppl.engines import memory
from fused_ppl.engines.comparison import Comparison
from fused_ppl.engines.head import Head, HeadLoop, empty_gradients, empty_unscaled, scale_into
from fused_ppl.engines.logits import as_rows, empty_gradient, token_inputs
from fused_ppl.engines.ops import op
from fused_ppl.engines.top_k import compare_named, named_by, rows_of
from fused_ppl.records import (
    Divergence,
    DivergenceStats,
    DivergenceSums,
    Execution,
    HeadDivergenceSums,
    HeadExecution,
    HeadInputs,
    LogitsInputs,
    RowStats,
    Teacher,
    TokenInputs,
    Unscaled,
    Upstream,
)
from fused_ppl.spec import LossSpec

_CONSTANT = (False, False, False)


def _sums(stats: DivergenceStats, tokens: TokenInputs, spec: LossSpec, shape: torch.Size) -> DivergenceSums:
    """S and M of every group, and the statistics in the shape of the target."""
    weight = torch.ones_like(stats.divergence) if tokens.token_weight is None else tokens.token_weight
    weight = weight.to(stats.divergence.dtype)
    loss = stats.divergence * weight
    if spec.ignore_index is not None:  # an ignored row may have any weight
        counted = tokens.target != spec.ignore_index
        weight, loss = (torch.where(counted, t, 0) for t in (weight, loss))
    rows = RowStats(loss, weight, stats.divergence, None, None, None)
    s, m, _ = reduction.sum_rows(rows, spec, shape)
    of_tokens = DivergenceStats(*(t.view(shape) if t.numel() == loss.numel() else t for t in stats))
    return DivergenceSums(torch.stack((s, m)), of_tokens)


def _fake_sums(target: Tensor, like: Tensor, spec: LossSpec, dtype: torch.dtype) -> DivergenceSums:
    groups, asked = (
        reduction.group_shape(spec.reduction, target.shape),
        target.shape if spec.stats else torch.Size((0,)),
    )
    sums = like.new_empty((2, *groups), dtype=reduction.sum_dtype(like.device))
    value, entropy, teacher_entropy, difference = (
        like.new_empty(shape, dtype=dtype) for shape in (target.shape, asked, asked, asked)
    )
    agrees = like.new_empty(asked, dtype=torch.bool)
    return DivergenceSums(sums, DivergenceStats(value, entropy, teacher_entropy, agrees, difference))


# --- from logits ---------------------------------------------------------------------------------------------------


def _forward_fake(inputs: LogitsInputs, _: Teacher, spec: LossSpec, __: Execution, **___: object) -> DivergenceSums:
    return _fake_sums(inputs.target, inputs.logits, spec, reduction.wide_dtype(inputs.logits.dtype))


@op(_forward_fake)
def divergence_forward(
    inputs: LogitsInputs, teacher: Teacher, spec: LossSpec, execution: Execution, *, asked: Divergence
) -> DivergenceSums:
    how, tokens = Comparison(spec, asked, *execution), token_inputs(inputs)
    stats = _of_logits(inputs, teacher, tokens, how, upstream=None, out=None)
    return _sums(stats, tokens, spec, inputs.target.shape)


@op(lambda inputs, *_, **__: empty_gradient(inputs.logits))
def divergence_backward(
    inputs: LogitsInputs,
    teacher: Teacher,
    spec: LossSpec,
    execution: Execution,
    *,
    asked: Divergence,
    upstream: Upstream,
) -> Tensor:
    out, shape = empty_gradient(inputs.logits), as_rows(inputs.logits).shape
    wide = reduction.wide_dtype(inputs.logits.dtype)
    of_rows = reduction.row_upstream(upstream, spec, inputs.target.shape, wide).grad_s
    how = Comparison(spec._replace(stats=False), asked, *execution)
    rows = out if out.ndim == 2 else out.view(shape)
    _of_logits(inputs, teacher, token_inputs(inputs), how, upstream=of_rows, out=rows)
    return out


def _of_logits(
    inputs: LogitsInputs,
    teacher: Teacher,
    tokens: TokenInputs,
    how: Comparison,
    *,
    upstream: Tensor | None,  # (N,)
    out: Tensor | None,
) -> DivergenceStats:
    rows = as_rows(inputs.logits)
    if teacher.teacher_input is None:
        wide = reduction.wide_dtype(rows.dtype)
        known = named_by(rows_of(teacher), tokens, how, num_classes=rows.shape[-1], dtype=wide)
        return compare_named(rows, known, tokens, how, upstream=upstream, out=out)
    own = as_rows(teacher.teacher_input)
    if own.shape != rows.shape:  # other strides
        own = teacher.teacher_input.reshape(rows.shape)
    return how.of_logits(rows, own, tokens, upstream=upstream, out=out)


# --- through two heads ---------------------------------------------------------------------------------------------


def _linear_fake(
    inputs: HeadInputs, _: Teacher, spec: LossSpec, execution: HeadExecution, **__: object
) -> HeadDivergenceSums:
    of_tokens = _fake_sums(inputs.target, inputs.hidden, spec, reduction.wide_dtype(execution.dtype))
    return HeadDivergenceSums(of_tokens, empty_unscaled(inputs, execution))


@op(_linear_fake)
def linear_divergence(
    inputs: HeadInputs,
    teacher: Teacher,
    spec: LossSpec,
    execution: HeadExecution,
    *,
    asked: Divergence,
    teacher_dtype: torch.dtype,
) -> HeadDivergenceSums:
    """The statistics of every token, and the unscaled gradients that `execution` asks for."""
    one = torch.ones((), dtype=torch.float32, device=inputs.hidden.device)
    how = Comparison(spec, asked, execution.backend, execution.memory_budget)
    stats, unscaled = _by_chunks(inputs, teacher, how, execution, teacher_dtype=teacher_dtype, upstream=one)
    return HeadDivergenceSums(_sums(stats, token_inputs(inputs), spec, inputs.target.shape), unscaled)


@op(lambda inputs, _, __, execution, **___: empty_gradients(inputs, execution.grads, fake=True))
def linear_divergence_backward(
    inputs: HeadInputs,
    teacher: Teacher,
    spec: LossSpec,
    execution: HeadExecution,
    *,
    asked: Divergence,
    teacher_dtype: torch.dtype,
    upstream: Upstream,
) -> Unscaled:
    """The gradients from upstream gradients of each token, in the dtype of their tensors."""
    wide = reduction.wide_dtype(execution.dtype)
    of_rows = reduction.row_upstream(upstream, spec, inputs.target.shape, wide).grad_s
    how = Comparison(spec._replace(stats=False), asked, execution.backend, execution.memory_budget)
    _, unscaled = _by_chunks(inputs, teacher, how, execution, teacher_dtype=teacher_dtype, upstream=of_rows)
    made = empty_gradients(inputs, execution.grads)
    for out, gradient, needed in zip(made, unscaled, execution.grads, strict=True):
        if needed:
            scale_into(out, gradient, gradient.new_ones(()))
    return made


def _by_chunks(
    inputs: HeadInputs,
    teacher: Teacher,
    how: Comparison,
    execution: HeadExecution,
    *,
    teacher_dtype: torch.dtype,
    upstream: Tensor,  # () or (N,)
) -> tuple[DivergenceStats, Unscaled]:
    """The loop over chunks of rows. Without a gradient to make, `upstream` is not used."""
    needed, n = any(execution.grads), inputs.target.numel()
    other = _teacher_head(inputs, teacher, how.spec, execution, dtype=teacher_dtype)
    loop = HeadLoop(inputs, how.spec, execution, kind="rows" if needed else "forward", teacher=other)
    loop.clear()
    head, columns = loop.head, loop.case.num_classes
    upstream, parts = head.of_rows(upstream), []
    if other is None:
        ids, log_probs = (head.of_rows(t) for t in rows_of(teacher))
        named = named_by((ids, log_probs), head.tokens, how, num_classes=columns, dtype=head.wide)
    else:
        shape = (min(loop.plan.rows, max(head.num_rows, 1)), columns)
        buffer = memory.empty(shape, other.dtype, inputs.hidden.device)
    for chunk in loop.chunks():
        head.logits(chunk.hidden, chunk.logits)
        here = (upstream[chunk.rows] if upstream.ndim else upstream) if needed else None
        out = chunk.logits if needed else None
        if other is None:
            known = named.of(chunk.rows)
            parts.append(compare_named(chunk.logits, known, chunk.tokens, how, upstream=here, out=out))
        else:
            logits = buffer[: chunk.hidden.shape[0]]
            other.logits(other.hidden[chunk.rows].to(other.dtype), logits)
            parts.append(how.of_logits(chunk.logits, logits, chunk.tokens, upstream=here, out=out))
        if needed:
            loop.add_gradients(chunk)
    return _of_all(parts, head, how.spec, n), loop.finished()


def _teacher_head(
    inputs: HeadInputs, teacher: Teacher, spec: LossSpec, execution: HeadExecution, *, dtype: torch.dtype
) -> Head | None:
    """The second head, or None of a top-k teacher."""
    hidden, weight, bias, *_ = teacher
    if hidden is None or weight is None:
        return None
    given = HeadInputs(hidden, weight, bias, inputs.target, weight=None, token_weight=None, num_items=None)
    return Head(given, spec, HeadExecution(execution.backend, execution.memory_budget, dtype, _CONSTANT))


def _of_all(parts: list[DivergenceStats], head: Head, spec: LossSpec, num_tokens: int) -> DivergenceStats:
    """The statistics of every token, 0 where ignored, from those of the rows that take part."""
    if not parts:
        value = head.zeros(num_tokens)
        asked = head.zeros(num_tokens if spec.stats else 0)
        return DivergenceStats(value, asked, asked.clone(), asked.bool(), asked.clone())
    found = DivergenceStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if head.counted_rows is None:
        return found
    return DivergenceStats(*(head.for_all_tokens(t, num_tokens) if t.numel() else t for t in found))
