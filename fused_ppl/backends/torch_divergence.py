# SPDX-License-Identifier: Apache-2.0
"""The divergence of two predictions, and its gradient by the logits of the first, in chunked PyTorch.

    p = softmax(z) of the student, q = softmax(t) of the teacher

    forward         D = sum_v q log(q / p)                                   dD/dz = p - q
    reverse         D = sum_v p log(p / q)                                   dD/dz = p (log(p / q) - D)
    jensen_shannon  D = beta sum_v q log(q / m) + (1 - beta) K,  m = beta q + (1 - beta) p
                    K = sum_v p log(p / m)                                   dD/dz = (1 - beta) p (log(p / m) - K)

A term whose leading factor is 0 is 0. Both log-probabilities of a chunk of rows stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_ppl.backends.torch_chunks import Chunks, Rows, chain
from fused_ppl.backends.torch_stats import argmax, product
from fused_ppl.records import Divergence, DivergenceStats, TokenInputs
from fused_ppl.spec import LossSpec


def divergence(
    logits: Tensor,  # (B, R, V) or (N, V)
    teacher_logits: Tensor,  # the same shape
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    asked: Divergence,
    upstream: Tensor | None,  # () or (N,)
    out: Tensor | None,  # the shape of logits: a buffer, or the logits themselves
    memory_budget: int | None,
) -> DivergenceStats:
    """The divergence of every row; with `upstream`, that times its gradient and the token weight into `out`."""
    of_teacher = spec._replace(logit_scale=asked.teacher_logit_scale, softcap=asked.teacher_softcap)
    student = Chunks(logits, tokens, spec, memory_budget=memory_budget, out=out)
    teacher = Chunks(teacher_logits, tokens, of_teacher, memory_budget=memory_budget)
    teacher.rows = student.rows = min(student.rows, teacher.rows)
    slope = torch.empty_like(student.buffer) if spec.softcap is not None and upstream is not None else None
    parts = []
    for rows, same_rows in zip(student, teacher, strict=True):
        n = rows.target.shape[0]
        if rows.skipped:
            if rows.out is not None:
                rows.out.zero_()
            parts.append(_zeros(student, n))
            continue
        derivative = None if slope is None else slope[:n]
        z, t = student.load(rows, derivative), teacher.load(same_rows).to(student.dtype)
        agrees = argmax(z) == argmax(t) if spec.stats else None
        # of one chunk, because a chunk is not given away before the next one is read
        log_p, log_q = torch.log_softmax(z, 1, out=student.work(rows)), torch.log_softmax(t, 1)
        parts.append(_stats(student, rows, log_p, log_q, agrees=agrees))
        value, gradient = _DIRECTIONS[asked.direction](log_p, log_q, asked.beta, upstream is not None)
        if rows.bad is not None:
            value = value.masked_fill(rows.bad, torch.nan)
        if rows.counted is not None:
            value = torch.where(rows.counted, value, 0)
        parts[-1] = parts[-1]._replace(divergence=value)
        if gradient is not None and upstream is not None:
            _finish(student, rows, gradient, upstream=rows.of(upstream), derivative=derivative)
    if not parts:
        return _zeros(student, 0)
    return DivergenceStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _finish(chunks: Chunks, rows: Rows, gradient: Tensor, *, upstream: Tensor, derivative: Tensor | None) -> None:
    """The gradient of the chunk's logits from the one of z, multiplied and stored."""
    assert rows.out is not None
    factor = product(upstream.to(chunks.dtype), chunks.token_weight(rows))
    gradient.mul_(factor.unsqueeze(1) if factor.ndim else factor)
    chain(gradient, chunks.spec, derivative)
    if rows.counted is not None:
        gradient.masked_fill_(~rows.counted.unsqueeze(1), 0)
    rows.out.copy_(gradient.view(rows.out.shape))


Found = tuple[Tensor, Tensor | None]  # D (n,), and dD/dz (n, V) if it is needed


def _forward(log_p: Tensor, log_q: Tensor, _: float, needed: bool) -> Found:
    q = log_q.exp()
    gap = (log_q - log_p).masked_fill_(q == 0, 0)  # inf or NaN there
    return gap.mul_(q).sum(1), log_p.exp().sub_(q) if needed else None


def _reverse(log_p: Tensor, log_q: Tensor, _: float, needed: bool) -> Found:
    p = log_p.exp()
    return _mean_and_gradient(p, (log_p - log_q).masked_fill_(p == 0, 0), needed)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float, needed: bool) -> Found:
    """With d = log(q / p): log(p / m) = -log1p(beta expm1(d)), and log(q / m) = -log1p((1 - beta) expm1(-d)).

    They keep the digits of a small d. Beyond 80 nats p or q is below 1e-34, and its term has no weight.
    """
    p, q = log_p.exp(), log_q.exp()
    d = (log_q - log_p).nan_to_num_(0.0).clamp_(-80.0, 80.0)  # NaN where both are -inf
    of_p = d.expm1().mul_(beta).log1p_().neg_()
    of_q = d.neg_().expm1_().mul_(1 - beta).log1p_().neg_()
    k, gradient = _mean_and_gradient(p, of_p, needed)
    value = beta * of_q.mul_(q).sum(1) + (1 - beta) * k
    return value, None if gradient is None else gradient.mul_(1 - beta)


def _mean_and_gradient(p: Tensor, gap: Tensor, needed: bool) -> Found:
    """sum p * gap, and p * (gap - sum p * gap), which overwrites the gap.

    Both are taken relative to the gap of the most likely class: of a class with p near 1, little else is left of it.
    """
    center = gap.gather(1, argmax(p).unsqueeze(1)).nan_to_num_(posinf=0.0)
    mean = gap.sub_(center).mul(p).sum(1, keepdim=True)
    return (mean + center).squeeze(1), gap.sub_(mean).mul_(p) if needed else None


_DIRECTIONS: dict[str, Callable[[Tensor, Tensor, float, bool], Found]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jensen_shannon": _jensen_shannon,
}


def _stats(chunks: Chunks, rows: Rows, log_p: Tensor, log_q: Tensor, *, agrees: Tensor | None) -> DivergenceStats:
    """All but the divergence, whose place is taken by another one; 0 in ignored rows."""
    if agrees is None:
        return _zeros(chunks, log_p.shape[0])
    at_target = (log_p.gather(1, rows.target) - log_q.gather(1, rows.target)).squeeze(1)
    entropies = _entropy(log_p), _entropy(log_q)
    if rows.counted is None:
        return DivergenceStats(at_target, *entropies, agrees, at_target)
    counted = rows.counted
    of_p, of_q, at_target = (torch.where(counted, t, 0) for t in (*entropies, at_target))
    return DivergenceStats(at_target, of_p, of_q, agrees & counted, at_target)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -(log_p.clamp(min=torch.finfo(p.dtype).min).mul_(p).sum(1))


def _zeros(chunks: Chunks, n: int) -> DivergenceStats:
    asked = n if chunks.spec.stats else 0
    value, entropy, teacher_entropy, difference = (chunks.buffer.new_zeros(size) for size in (n, asked, asked, asked))
    return DivergenceStats(value, entropy, teacher_entropy, entropy.new_zeros(asked, dtype=torch.bool), difference)
