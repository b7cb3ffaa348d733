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

from fused_ppl import backends, reduction
from fused_ppl.engines import memory
from fused_ppl.engines.head import Head, HeadLoop, empty_gradients, empty_unscaled, scale_into
from fused_ppl.engines.logits import as_rows, empty_gradient, token_inputs
from fused_ppl.engines.ops import op
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


def _forward_fake(inputs: LogitsInputs, _: Tensor, spec: LossSpec, __: Execution, **___: object) -> DivergenceSums:
    return _fake_sums(inputs.target, inputs.logits, spec, reduction.wide_dtype(inputs.logits.dtype))


@op(_forward_fake)
def divergence_forward(
    inputs: LogitsInputs, teacher_logits: Tensor, spec: LossSpec, execution: Execution, *, asked: Divergence
) -> DivergenceSums:
    tokens = token_inputs(inputs)
    stats = backends.load_divergence(execution.backend).divergence(
        as_rows(inputs.logits),
        _rows_like(teacher_logits, inputs.logits),
        tokens,
        spec,
        asked=asked,
        upstream=None,
        out=None,
        memory_budget=execution.memory_budget,
    )
    return _sums(stats, tokens, spec, inputs.target.shape)


@op(lambda inputs, *_, **__: empty_gradient(inputs.logits))
def divergence_backward(
    inputs: LogitsInputs,
    teacher_logits: Tensor,
    spec: LossSpec,
    execution: Execution,
    *,
    asked: Divergence,
    upstream: Upstream,
) -> Tensor:
    out, rows = empty_gradient(inputs.logits), as_rows(inputs.logits)
    wide = reduction.wide_dtype(inputs.logits.dtype)
    backends.load_divergence(execution.backend).divergence(
        rows,
        _rows_like(teacher_logits, inputs.logits),
        token_inputs(inputs),
        spec._replace(stats=False),
        asked=asked,
        upstream=reduction.row_upstream(upstream, spec, inputs.target.shape, wide).grad_s,
        out=out if out.ndim == 2 else out.view(rows.shape),
        memory_budget=execution.memory_budget,
    )
    return out


def _rows_like(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """The rows of the teacher, in the two or three dimensions that the student's rows have."""
    rows = as_rows(logits)
    own = as_rows(teacher_logits)
    return own if own.shape == rows.shape else teacher_logits.reshape(rows.shape)


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
    other = _teacher_head(inputs, teacher, spec, execution, dtype=teacher_dtype)
    stats, unscaled = _both_heads(inputs, other, spec, execution, asked=asked, upstream=one)
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
    spec = spec._replace(stats=False)
    other = _teacher_head(inputs, teacher, spec, execution, dtype=teacher_dtype)
    _, unscaled = _both_heads(inputs, other, spec, execution, asked=asked, upstream=of_rows)
    made = empty_gradients(inputs, execution.grads)
    for out, gradient, needed in zip(made, unscaled, execution.grads, strict=True):
        if needed:
            scale_into(out, gradient, gradient.new_ones(()))
    return made


def _both_heads(
    inputs: HeadInputs,
    other: Head,
    spec: LossSpec,
    execution: HeadExecution,
    *,
    asked: Divergence,
    upstream: Tensor,  # () or (N,)
) -> tuple[DivergenceStats, Unscaled]:
    """The loop over chunks of rows. Without a gradient to make, `upstream` is not used."""
    backend, needed = backends.load_divergence(execution.backend), any(execution.grads)
    loop = HeadLoop(inputs, spec, execution, kind="rows" if needed else "forward", teacher=other)
    loop.clear()
    head, n = loop.head, inputs.target.numel()
    upstream, parts = head.of_rows(upstream), []
    shape = (min(loop.plan.rows, max(head.num_rows, 1)), loop.case.num_classes)
    buffer = memory.empty(shape, other.dtype, inputs.hidden.device)
    for chunk in loop.chunks():
        teacher_logits = buffer[: chunk.hidden.shape[0]]
        head.logits(chunk.hidden, chunk.logits)
        other.logits(other.hidden[chunk.rows].to(other.dtype), teacher_logits)
        parts.append(
            backend.divergence(
                chunk.logits,
                teacher_logits,
                chunk.tokens,
                spec,
                asked=asked,
                upstream=(upstream[chunk.rows] if upstream.ndim else upstream) if needed else None,
                out=chunk.logits if needed else None,
                memory_budget=execution.memory_budget,
            )
        )
        if needed:
            loop.add_gradients(chunk)
    return _of_all(parts, head, spec, n), loop.finished()


def _teacher_head(
    inputs: HeadInputs, teacher: Teacher, spec: LossSpec, execution: HeadExecution, *, dtype: torch.dtype
) -> Head:
    hidden, weight, bias = teacher
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
