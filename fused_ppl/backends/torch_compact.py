# SPDX-License-Identifier: Apache-2.0
"""What the compact fused head asks of its rows, in chunked PyTorch. Interface: `fused_ppl.backends`.

The gradient of a row is its softmax part, dz[v] = ((a * p[v]) - (a - rest) * [v = y]) * dz/dx, less pull * w[v] where
labels are smoothed; the latter is a product already, and left to the engine.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fused_ppl.backends.torch_rows import (
    Coefficients,
    coefficients,
    collect,
    finish_gradient,
    others_mass,
    probabilities,
    without_target,
)
from fused_ppl.backends.torch_walk import Rows, Walk
from fused_ppl.spec import Columns, Factors, LossSpec, RowStats


def nll_columns(
    logits: Tensor,  # (R, V): left as they are
    target_logit: Tensor,  # (R,) fp32: takes the place of logits[i, y_i]
    target: Tensor,  # (R,)
    spec: LossSpec,
    weight: Tensor | None,
    token_weight: Tensor | None,
    signed: bool,
    memory_budget: int | None,
) -> tuple[RowStats, Columns, Factors]:
    """The statistics of `nll_forward_backward`, bit for bit, and sums over the columns of the softmax part.

    `signed`: rows may differ in sign, and the sums with their signs are wanted as well.
    """
    v = logits.shape[1]
    walk = Walk(logits.unsqueeze(0), target, spec, memory_budget)
    if weight is not None:
        weight = weight.to(walk.dtype)
    slope = None if spec.softcap is None else torch.empty_like(walk.buffer)
    sums = Columns(*(walk.buffer.new_zeros(size) for size in (v, v, v if signed else 0)))
    parts, factors = [], []
    for rows in walk:
        derivative = None if slope is None else slope[: rows.target.shape[0]]
        stats, p, of_others, others = without_target(
            walk, rows, target_logit[rows.span], weight, token_weight, derivative
        )
        parts.append(stats)
        assert stats.lse is not None
        of_s = torch.ones_like(stats.nll)
        of_norm = 2 * spec.z_loss * stats.lse.to(walk.dtype) if spec.z_loss else None
        c = coefficients(rows, spec, weight, token_weight, v, of_s, of_norm, walk.dtype)
        if derivative is not None:
            p.mul_(derivative)
        if rows.counted is not None:
            p.masked_fill_(~rows.counted.unsqueeze(1), 0)
        of_row, found = _factors(spec, rows, p, c, of_others, others, derivative)
        factors.append(found)
        # products with one number a row, which read what is in cache once
        sums.size.addmv_(p.t(), of_row.abs())
        if signed:
            sums.total.addmv_(p.t(), of_row)
        sums.square.addmv_(p.square_().t(), of_row.square())
    stats = collect(walk, parts)
    if not factors:
        nothing = sums.size[:0]
        return stats, sums, Factors(nothing, nothing, nothing, nothing, nothing)
    a, rest, pull, row_sum, at_target = (torch.cat(f) for f in zip(*(f[:5] for f in factors), strict=True))
    return stats, sums, Factors(a, rest, pull, row_sum, at_target)


def _factors(
    spec: LossSpec,
    rows: Rows,
    p: Tensor,  # (n, V): p of the others up to a factor of the row, times the cap's slope
    c: Coefficients,
    of_others: Tensor,  # (n,): that factor
    others: Tensor,  # (n,): 1 - p_y
    derivative: Tensor | None,
) -> tuple[Tensor, Factors]:
    """What multiplies `p` of each row, and its `Factors`."""
    rest = torch.zeros_like(others) if c.rest is None else c.rest
    pull = rest[:0] if c.c is None else c.c * spec.logit_scale
    at_target = c.at_target(-others)
    if derivative is None:
        of_row, at_target, row_sum = (x * spec.logit_scale for x in (c.a * of_others, at_target, rest))
    else:
        of_row, at_target = c.a * of_others, at_target * derivative.gather(1, rows.target).squeeze(1)
        row_sum = p.sum(1) * of_row + at_target
    values = (of_row, c.a, rest, pull, row_sum, at_target)
    if rows.counted is not None:
        values = tuple(torch.where(rows.counted, x, 0) if x.numel() else x for x in values)  # type: ignore[assignment]
    of_row, a, rest, pull, row_sum, at_target = values
    return of_row, Factors(a, rest, pull, row_sum, at_target)


def nll_kept(
    logits: Tensor,  # (R, V): left as they are
    index: Tensor,  # (K,): the kept columns
    place: Tensor,  # (R,): the target's column among them
    stats: RowStats,
    factors: Factors,
    spec: LossSpec,
    out: Tensor,  # (R, K)
    memory_budget: int | None,
) -> Tensor:
    """The softmax part of the gradient in the kept columns; returns what is left of the row sums, (R,)."""
    torch.gather(logits, 1, index.expand(out.shape), out=out)
    assert stats.lse is not None
    walk = _kept_walk(out, place, spec, memory_budget)
    slope = None if spec.softcap is None else torch.empty_like(walk.buffer)
    left = []
    for rows in walk:
        i = rows.span
        derivative = None if slope is None else slope[: rows.target.shape[0]]
        p = walk.copy(rows)
        walk.transform(p, derivative)
        probabilities(p, stats.lse[i], factors.a[i], p)
        c = Coefficients(factors.a[i], factors.rest[i], None)
        finish_gradient(walk, rows, p, c, c.at_target(-others_mass(stats.nll[i])), None, derivative, 0)
        left.append(factors.row_sum[i] - p.sum(1))
        walk.store(rows, p)
    return torch.cat(left) if left else factors.a


def nll_rescreen(
    logits: Tensor,  # (R, K): those of the kept columns, made into their gradient
    screened: Tensor,  # (R, V): what the screen says of all
    index: Tensor,  # (K,): the kept columns
    place: Tensor,  # (R,): the target's column among them
    stats: RowStats,  # of the screened logits
    factors: Factors,  # of the screened logits
    spec: LossSpec,
    weight_sum: float | Tensor,  # over all classes
    memory_budget: int | None,
) -> tuple[RowStats, Tensor, Tensor]:
    """`nll_kept` where the statistics come from a screen, which the kept columns correct.

        1 - p_y  ~  rest of the screen's mass + sum of the kept columns' mass, over exp(lse) of the screen
        nll       = log(1 + that / p_y)

    Returns the statistics, what is left of the row sums, and an estimate of the error of nll, (R,): the rest's share
    times what the kept columns' mass was wrong by. Entropy and argmax stay the screen's.
    """
    assert stats.lse is not None
    walk = _kept_walk(logits, place, spec, memory_budget)
    slope, other = (torch.empty_like(walk.buffer) for _ in range(2))
    parts = []
    for rows in walk:
        i, n = rows.span, rows.target.shape[0]
        old, one = stats.nll[i], torch.ones_like(stats.nll[i])
        q, derivative = other[:n], None if spec.softcap is None else slope[:n]
        q.copy_(torch.gather(screened[i], 1, index.expand(n, -1)))
        walk.transform(q, derivative)
        probabilities(q, stats.lse[i], one, q)
        q.scatter_(1, rows.target, 0)
        mass_before = q.sum(1)
        part_before = mass_before * spec.logit_scale if derivative is None else q.mul_(derivative).sum(1)
        p = walk.copy(rows)
        walk.transform(p, derivative)
        probabilities(p, stats.lse[i], one, p)
        p.scatter_(1, rows.target, 0)
        mass = p.sum(1)
        rest = (others_mass(old) - mass_before).clamp_min_(0)
        nll = torch.nn.functional.softplus((rest + mass).log() + old, threshold=40.0)
        shrink = 1 - others_mass(nll - old)
        p.mul_((factors.a[i] * shrink).unsqueeze(1))
        c = Coefficients(factors.a[i], factors.rest[i], None)
        finish_gradient(walk, rows, p, c, c.at_target(-others_mass(nll)), None, derivative, 0)
        left = (factors.row_sum[i] - factors.at_target[i] - factors.a[i] * part_before) * shrink
        walk.store(rows, p)
        wrong = rest * shrink * (mass.log() - mass_before.log()).nan_to_num_(0, 0, 0).abs()
        parts.append((nll, left, wrong))
    if not parts:
        return stats, factors.a, factors.a
    nll, left, wrong = (torch.cat(x) for x in zip(*parts, strict=True))
    change = nll - stats.nll
    loss = stats.loss + (factors.a - factors.rest) * change
    if factors.pull.numel():
        loss = loss + factors.pull * (change * weight_sum / spec.logit_scale)
    return stats._replace(nll=nll, lse=stats.lse + change, loss=loss), left, wrong


def _kept_walk(logits: Tensor, place: Tensor, spec: LossSpec, memory_budget: int | None) -> Walk:
    """In place, over rows that are all taken: those which are not counted have factors of 0."""
    rows = logits.unsqueeze(0)
    return Walk(rows, place, dataclasses.replace(spec, ignore_index=None), memory_budget, rows, (0, logits.shape[1]))
