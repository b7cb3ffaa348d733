# SPDX-License-Identifier: Apache-2.0
"""The row formula in chunked PyTorch: any device, any dtype, nothing of size N x V.

aten's log_softmax and softmax work on chunks of rows that stay in cache: on the caller's own memory where that is
fp32 and contiguous, on an fp32 buffer otherwise. Interface and shapes: `fused_ppl.backends`. The statistics of a row
are in `torch_stats`, its gradient is here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl.backends.torch_stats import (
    Others,
    chunk_stats,
    collect,
    others_mass,
    product,
    shard_stats,
    stats_of_others,
    target_z,
    without_target,
)
from fused_ppl.backends.torch_walk import Rows, Walk, transform
from fused_ppl.spec import LossSpec, RowStats, Totals


def nll_forward(
    logits: Tensor,  # (B, R, V) or (N, V)
    target: Tensor,  # (N,)
    spec: LossSpec,
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    num_items: Tensor | None,
    memory_budget: int | None,
    keep_lse: bool = True,
) -> tuple[RowStats, Totals | None]:
    """nll, lse and the rows' parts of S and M; entropy and argmax on request."""
    walk = Walk(logits, target, spec, memory_budget, keep_lse=keep_lse)
    if weight is not None:
        weight = weight.to(walk.dtype)
    parts = [walk.zeros(rows) if rows.skipped else chunk_stats(walk, rows, weight, token_weight) for rows in walk]
    return collect(walk, parts), None


def nll_backward(
    logits: Tensor,  # (B, R, V) or (N, V)
    target: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    nll: Tensor,  # (N,)
    of_s: Tensor,  # (N,) or (): upstream gradient of S
    of_z: Tensor | None,  # (N,) or (): upstream gradient of Z
    spec: LossSpec,
    weight: Tensor | None,
    token_weight: Tensor | None,
    out: Tensor,  # the shape of logits: a buffer, or the logits themselves
    memory_budget: int | None,
    columns: tuple[int, int] | None = None,
) -> None:
    """The gradient of every row into `out`.

    `columns = (first, num_classes)` says that the logits are a slice of the vocabulary that begins at `first`: then
    `lse` normalises them, and `weight` is that of all classes.
    """
    first, num_classes = columns or (0, logits.shape[-1])
    walk = Walk(logits, target, spec, memory_budget, out, columns)
    if weight is not None:
        weight = weight.to(walk.dtype)
    slope = None if spec.softcap is None else torch.empty_like(walk.buffer)
    for rows in walk:
        assert rows.out is not None
        if rows.skipped:
            rows.out.zero_()
            continue
        derivative = None if slope is None else slope[: rows.target.shape[0]]
        z, p = walk.load(rows, derivative), walk.work(rows)
        of_norm = None if of_z is None else rows.of(of_z) * (2 * spec.z_loss) * rows.of(lse).to(walk.dtype)
        c = coefficients(rows, spec, weight, token_weight, num_classes, rows.of(of_s), of_norm, walk.dtype)
        at_target = c.at_target(-others_mass(rows.of(nll)))
        if columns is None:
            torch.softmax(z, 1, out=p)
            p.mul_(_column(c.a))
        else:
            probabilities(z, rows.of(lse), rows.of(nll), c.a, p)
        finish_gradient(walk, rows, p, c, at_target, weight, derivative, first)
        walk.store(rows, p)


def probabilities(z: Tensor, lse: Tensor, nll: Tensor, factor: Tensor, out: Tensor) -> None:
    """factor * exp(z - lse) of the rows."""
    out.mul_((factor * exponentials(z, lse, nll, out)).unsqueeze(1))


def exponentials(z: Tensor, lse: Tensor, nll: Tensor, out: Tensor) -> Tensor:
    """exp(z - lse) up to a factor of each row, which is returned: the low part of lse, lost by an fp32 lse.

    Where neighbours are over 60 nats apart, the largest logits share all of the mass, and `high` is what they are. What
    they share it among a float64 soon does not hold: it is in nll, if the target is one of them.
    """
    high = lse.to(z.dtype)
    torch.sub(z, high.unsqueeze(1), out=out).exp_()
    far = high.abs() >= 2**30 if z.dtype == torch.float32 else high.abs() >= 2**59
    return torch.where(far & (nll < 40), -nll, high - lse).exp_().to(z.dtype)


def nll_forward_backward(
    logits: Tensor,  # (R, V): a buffer of the caller's, used up
    target_logit: Tensor,  # (R,) fp32: takes the place of logits[i, y_i]
    target: Tensor,  # (R,)
    spec: LossSpec,
    weight: Tensor | None,
    token_weight: Tensor | None,
    upstream: float | None,
    memory_budget: int | None,
) -> RowStats:
    """The chunk primitive of the fused LM head: statistics, and `upstream` times the gradient of l over the logits.

    The target is left out of the sum, so that nothing of it is lost where it holds nearly all of the mass:

        lse_o = log sum_{v != y} exp z_v,    nll = log(1 + exp(lse_o - z_y)) >= 0,    1 - p_y = -expm1(-nll)

    `upstream` None computes no gradient.
    """
    walk = Walk(logits, target, spec, memory_budget, logits)
    if weight is not None:
        weight = weight.to(walk.dtype)
    slope = torch.empty_like(walk.buffer) if spec.softcap is not None and upstream is not None else None
    z_y = target_z(walk, target_logit)
    parts = []
    for rows in walk:
        if rows.skipped:
            logits[rows.span] = 0
            parts.append(Others.none(walk, rows))
            continue
        derivative = None if slope is None else slope[: rows.target.shape[0]]
        found, p, of_others, others = without_target(walk, rows, target_logit, z_y, weight, derivative)
        parts.append(found)
        if upstream is not None:
            of_s = torch.full_like(found.nll, upstream)
            of_norm = None
            if spec.z_loss:
                of_norm = of_s * (2 * spec.z_loss) * found.lse(walk, rows.of(z_y)).to(walk.dtype)
            c = coefficients(rows, spec, weight, token_weight, logits.shape[-1], of_s, of_norm, walk.dtype)
            p.mul_((c.a * of_others).unsqueeze(1))
            finish_gradient(walk, rows, p, c, c.at_target(-others), weight, derivative, 0)
            walk.store(rows, p)
    return stats_of_others(walk, parts, z_y, weight, token_weight)


class Coefficients(NamedTuple):
    """Of one row each: dz[v] = p_v * a - c * w[v] - b * [v = y], a = b + rest."""

    a: Tensor
    rest: Tensor | None
    c: Tensor | None

    def at_target(self, p_minus_one: Tensor) -> Tensor:
        """p_y * a - b, with a - b kept apart so that a target with p -> 1 loses no digits."""
        value = p_minus_one * self.a
        return value if self.rest is None else value.add_(self.rest)


def coefficients(
    rows: Rows,
    spec: LossSpec,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_classes: int,
    of_s: Tensor,
    of_norm: Tensor | None,  # upstream of Z times d(z_loss * lse^2) / d lse
    dtype: torch.dtype,
) -> Coefficients:
    of_target = None if weight is None else weight[rows.label]
    u = None if token_weight is None else rows.of(token_weight).to(dtype)
    g, smoothing = product(of_s, u), spec.label_smoothing
    c = g * (smoothing / num_classes) if smoothing else None
    b = product(g * (1 - smoothing) if smoothing else g, of_target)
    rest = None if c is None else c * (num_classes if weight is None else weight.sum())
    if of_norm is not None:
        of_norm = product(of_norm, u, of_target)
        rest = of_norm if rest is None else rest + of_norm
    return Coefficients(b if rest is None else b + rest, rest, c)


def finish_gradient(
    walk: Walk,
    rows: Rows,
    p: Tensor,  # (n, V): p * a, made into the gradient
    c: Coefficients,
    at_target: Tensor,
    weight: Tensor | None,
    derivative: Tensor | None,
    first: int,
) -> None:
    if rows.owned is not None:
        at_target = torch.where(rows.owned, at_target, p.gather(1, rows.target).squeeze(1))
    p.scatter_(1, rows.target, at_target.unsqueeze(1))
    if c.c is not None:
        if weight is None:
            p.sub_(_column(c.c))
        else:
            p.addcmul_(_column(c.c), weight[first : first + p.shape[1]], value=-1)
    if derivative is not None:
        p.mul_(derivative)
    elif walk.spec.logit_scale != 1:
        p.mul_(walk.spec.logit_scale)
    if rows.counted is not None:
        p.masked_fill_(~rows.counted.unsqueeze(1), 0)


def _column(of_rows: Tensor) -> Tensor:
    """(n, 1) from (n,); one number stays one."""
    return of_rows.unsqueeze(1) if of_rows.ndim else of_rows


def nll_forward_shard(
    logits: Tensor,  # (B, R, V of this shard) or (N, V of this shard)
    target: Tensor,  # (N,)
    target_logit: Tensor | None,  # (N,): takes the place of the target's logit, where that is in the shard
    spec: LossSpec,
    weight: Tensor | None,  # (num_classes,)
    memory_budget: int | None,
    columns: tuple[int, int],
) -> Tensor:
    """(N, 6) float64: of a shard, the largest z; sum e^(z - largest), the target left out; the target's z, or 0; sum
    w z and sum e^(z - largest) (z - largest), the target left out; the column of the largest. 0 where ignored."""
    walk = Walk(logits, target, spec, memory_budget, None, columns)
    first = columns[0]
    w = None if weight is None else weight[first : first + logits.shape[-1]].to(walk.dtype)
    parts = [torch.zeros(0, 6, dtype=walk.wide, device=logits.device)]
    for rows in walk:
        if rows.skipped:
            parts.append(parts[0].new_zeros(rows.target.shape[0], 6))
            continue
        y, owned = rows.target, rows.owned
        assert owned is not None
        x = walk.buffer[: y.shape[0]]
        x.view(rows.source.shape).copy_(rows.source)
        if target_logit is not None:
            given = rows.of(target_logit).to(walk.dtype).unsqueeze(1)
            x.scatter_(1, y, torch.where(owned.unsqueeze(1), given, x.gather(1, y)))
        transform(x, walk.spec)
        parts.append(shard_stats(walk, x, y, owned.unsqueeze(1), w))
        if rows.counted is not None:
            parts[-1].masked_fill_(~rows.counted.unsqueeze(1), 0)
    return torch.cat(parts)
