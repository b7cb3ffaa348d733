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

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl.backends.torch_chunks import Chunks, Rows, chain
from fused_ppl.backends.torch_stats import argmax, product
from fused_ppl.records import Divergence, DivergenceStats, TokenInputs
from fused_ppl.spec import LossSpec

BUFFERS = 8  # of the size of a chunk: those of `Pair`, one of each `Chunks`, and the derivative of a softcap


class Pair(NamedTuple):
    """Both log-probabilities of some rows, and memory of their size. All of it is overwritten."""

    log_p: Tensor  # (n, V): the gradient takes its place
    log_q: Tensor  # (n, V)
    p: Tensor  # (n, V)
    q: Tensor  # (n, V)
    largest: Tensor  # (n, V)
    mask: Tensor  # (n, V) bool


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
    count = min(student.rows, teacher.rows) // 2  # the buffers below shall stay in cache as well
    if memory_budget is not None:
        count = min(count, memory_budget // (BUFFERS * student.dtype.itemsize * logits.shape[-1]))
    teacher.rows = student.rows = max(1, count)
    slope = torch.empty_like(student.buffer) if spec.softcap is not None and upstream is not None else None
    make = functools.partial(torch.empty, device=logits.device, dtype=student.dtype)
    shape = (student.rows, logits.shape[-1])
    log_p, log_q, p, q, largest = (make(shape) for _ in range(5))
    memory = Pair(log_p, log_q, p, q, largest, make(shape, dtype=torch.bool))
    parts = []
    for rows, same_rows in zip(student, teacher, strict=True):
        n = rows.target.shape[0]
        if rows.skipped:
            if rows.out is not None:
                rows.out.zero_()
            parts.append(_zeros(student, n))
            continue
        pair, derivative = Pair(*(t[:n] for t in memory)), None if slope is None else slope[:n]
        z, t = student.load(rows, derivative), teacher.load(same_rows).to(student.dtype)
        agrees = argmax(z) == argmax(t) if spec.stats else None
        own = pair.log_p if rows.out is None else student.work(rows)
        log_p, log_q = torch.log_softmax(z, 1, out=own), torch.log_softmax(t, 1, out=pair.log_q)
        pair = pair._replace(log_p=log_p, log_q=log_q)
        stats = _stats(student, rows, pair, agrees=agrees)
        value = _DIRECTIONS[asked.direction](pair, asked.beta, upstream is not None)
        if rows.bad is not None:
            value = value.masked_fill(rows.bad, torch.nan)
        if rows.counted is not None:
            value = torch.where(rows.counted, value, 0)
        parts.append(stats._replace(divergence=value))
        if upstream is not None:
            _finish(student, rows, pair.log_p, upstream=rows.of(upstream), derivative=derivative)
    if not parts:
        return _zeros(student, 0)
    return DivergenceStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _finish(chunks: Chunks, rows: Rows, gradient: Tensor, *, upstream: Tensor, derivative: Tensor | None) -> None:
    """The gradient of the chunk's logits from the one of z, multiplied and stored."""
    factor = product(upstream.to(chunks.dtype), chunks.token_weight(rows))
    gradient.mul_(factor.unsqueeze(1) if factor.ndim else factor)
    chain(gradient, chunks.spec, derivative)
    if rows.counted is not None:
        gradient.masked_fill_(~rows.counted.unsqueeze(1), 0)
    chunks.store(rows, gradient)


def _forward(pair: Pair, _: float, needed: bool) -> Tensor:
    gap = _gap(pair)
    change, q = _change(pair, gap), pair.q
    # sum q (log q - log p) alone keeps the rounding of both lse; with p - q it cancels, and each term is >= 0
    value = gap.mul_(q).masked_fill_(torch.eq(q, 0, out=pair.mask), 0).neg_().add_(change).sum(1)
    if needed:
        pair.log_p.copy_(change)
    return value


def _reverse(pair: Pair, _: float, needed: bool) -> Tensor:
    gap, p = _gap(pair), pair.p
    change = _change(pair, gap)
    gap.masked_fill_(torch.eq(p, 0, out=pair.mask), 0)
    value = torch.mul(gap, p, out=pair.largest).sub_(change).sum(1)  # as in `_forward`
    if needed:
        _center(p, gap, work=pair.q)
    return value


def _jensen_shannon(pair: Pair, beta: float, needed: bool) -> Tensor:
    """With d = log(q / p): log(p / m) = -log1p(beta expm1(d)), and log(q / m) = -log1p((1 - beta) expm1(-d)).

    They keep the digits of a small d. Beyond 80 nats p or q is below 1e-34, and its term has no weight.
    """
    d = torch.neg(_gap(pair), out=pair.log_q).clamp_(-80.0, 80.0)
    of_p = torch.expm1(d, out=pair.log_p).mul_(beta).log1p_().neg_()
    of_q = d.neg_().expm1_().mul_(1 - beta).log1p_().neg_().mul_(pair.q).sum(1)
    k = _center(pair.p, of_p, work=d)
    if needed:
        of_p.mul_(1 - beta)
    return beta * of_q + (1 - beta) * k


def _gap(pair: Pair) -> Tensor:
    """log p - log q in the memory of log p, and 0 where p and q are 0; p, q and the larger one in their own."""
    torch.exp(pair.log_p, out=pair.p)
    torch.exp(pair.log_q, out=pair.q)
    torch.maximum(pair.p, pair.q, out=pair.largest)
    return pair.log_p.sub_(pair.log_q).masked_fill_(torch.eq(pair.largest, 0, out=pair.mask), 0)


def _change(pair: Pair, gap: Tensor) -> Tensor:
    """p - q = sign(gap) * max(p, q) * (1 - exp(-|gap|)) in the memory of log q, accurate relative to itself."""
    share = torch.abs(gap, out=pair.log_q).neg_().expm1_()
    return share.mul_(pair.largest).copysign_(gap)


def _center(p: Tensor, gap: Tensor, *, work: Tensor) -> Tensor:
    """K = sum p * gap; the gap becomes p * (gap - K).

    Both are taken relative to the gap of the most likely class. Where p is near 1, gap - K subtracts nearly equal
    numbers.
    """
    center = gap.gather(1, argmax(p).unsqueeze(1)).nan_to_num_(nan=torch.nan, posinf=0.0)
    mean = torch.mul(gap.sub_(center), p, out=work).sum(1, keepdim=True)
    gap.sub_(mean).mul_(p)
    return (mean + center).squeeze(1)


_DIRECTIONS: dict[str, Callable[[Pair, float, bool], Tensor]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jensen_shannon": _jensen_shannon,
}


def _stats(chunks: Chunks, rows: Rows, pair: Pair, *, agrees: Tensor | None) -> DivergenceStats:
    """All but the divergence, whose place is taken by another one; 0 in ignored rows."""
    log_p, log_q = pair.log_p, pair.log_q
    if agrees is None:
        return _zeros(chunks, log_p.shape[0])
    of_p, of_q = (log.gather(1, rows.target).squeeze(1) for log in (log_p, log_q))
    at_target = torch.where(of_p == of_q, 0, of_p - of_q)  # a class may be excluded by both
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
    make = functools.partial(torch.zeros, device=chunks.logits.device, dtype=chunks.dtype)
    value, entropy, teacher_entropy, difference = make(n), make(asked), make(asked), make(asked)
    return DivergenceStats(value, entropy, teacher_entropy, entropy.bool(), difference)
