# SPDX-License-Identifier: Apache-2.0
"""The row formula in chunked PyTorch: any device, any dtype, nothing of size N x V.

aten's log_softmax and softmax work on chunks of rows that stay in cache: on the caller's own memory where that is
fp32 and contiguous, on an fp32 buffer otherwise. Interface and shapes: `fused_ppl.backends`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl.backends.shards import LOWEST
from fused_ppl.backends.torch_walk import Rows, Walk
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
    parts = [walk.zeros(rows) if rows.skipped else _chunk_stats(walk, rows, weight, token_weight) for rows in walk]
    return collect(walk, parts), None


def collect(walk: Walk, parts: list[RowStats]) -> RowStats:
    if not parts:
        return walk.zeros(None)
    stats = parts[0] if len(parts) == 1 else RowStats.concatenate(parts)
    return stats if walk.on_cpu else _mark_out_of_range(stats, walk)


def _chunk_stats(walk: Walk, rows: Rows, w: Tensor | None, token_weight: Tensor | None) -> RowStats:
    spec, y = walk.spec, rows.target
    z = walk.load(rows)
    # lse = z - logp in any column; in the largest nothing cancels, and a target of probability zero does no harm
    top = z.argmax(1, keepdim=True) if spec.stats or spec.z_loss else y
    top_logit = z.gather(1, top) if walk.keep_lse else None
    # one chunk leaves its memory to the allocator; many share theirs
    logp = torch.log_softmax(z, 1) if rows.whole else torch.log_softmax(z, 1, out=walk.work(rows))
    lse = None if top_logit is None else (top_logit.to(walk.wide) - logp.gather(1, top)).squeeze(1)
    nll = logp.gather(1, y).squeeze(1).neg_()
    smooth = None
    if spec.label_smoothing:
        smooth = -(logp.sum(1) if w is None else logp @ w)
    entropy = _entropy(logp) if spec.stats else None
    predicted = top.squeeze(1) if spec.stats else None
    return _row_stats(walk, rows, nll, lse, smooth, entropy, predicted, w, token_weight)


def _row_stats(
    walk: Walk,
    rows: Rows,
    nll: Tensor,
    lse: Tensor | None,
    smooth: Tensor | None,  # sum_v w[v] * (lse - z[v])
    entropy: Tensor | None,
    predicted: Tensor | None,
    w: Tensor | None,
    token_weight: Tensor | None,
) -> RowStats:
    """l and u * w[y] of the rows beside what is known of them; 0 where ignored."""
    a = walk.spec.label_smoothing
    of_target = None if w is None else w[rows.label]
    u = None if token_weight is None else rows.of(token_weight).to(walk.dtype)
    loss = nll if not a and w is None else _product(1 - a, of_target) * nll
    if smooth is not None:
        loss = loss + (a / rows.source.shape[-1]) * smooth
    loss = _product(loss, u)
    weight = torch.ones_like(nll) if u is None and of_target is None else _product(1, u, of_target)
    stats = RowStats(loss, weight, nll, lse, entropy, predicted)
    if rows.counted is None:
        return stats
    counted = rows.counted
    return stats.map(lambda t, ignored: torch.where(counted, t, ignored))


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
            probabilities(z, rows.of(lse), c.a, p)
        finish_gradient(walk, rows, p, c, at_target, weight, derivative, first)
        walk.store(rows, p)


def probabilities(z: Tensor, lse: Tensor, factor: Tensor, out: Tensor) -> None:
    """factor * exp(z - lse) of the rows, with lse in two parts: the low one, lost by an fp32 lse, scales the row."""
    high = lse.to(z.dtype)
    torch.sub(z, high.unsqueeze(1), out=out).exp_()
    out.mul_((factor * (high - lse).exp().to(z.dtype)).unsqueeze(1))


def others_mass(nll: Tensor) -> Tensor:
    """1 - p_y, accurate relative to the result."""
    return -torch.expm1(-nll)


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
    parts = []
    for rows in walk:
        if rows.skipped:
            logits[rows.span] = 0
            parts.append(walk.zeros(rows))
            continue
        derivative = None if slope is None else slope[: rows.target.shape[0]]
        stats, p, of_others, others = without_target(
            walk, rows, rows.of(target_logit), weight, token_weight, derivative
        )
        parts.append(stats)
        if upstream is not None:
            of_s = torch.full_like(stats.nll, upstream)
            of_norm = None
            if spec.z_loss and stats.lse is not None:
                of_norm = of_s * (2 * spec.z_loss) * stats.lse.to(walk.dtype)
            c = coefficients(rows, spec, weight, token_weight, logits.shape[-1], of_s, of_norm, walk.dtype)
            p.mul_((c.a * of_others).unsqueeze(1))
            finish_gradient(walk, rows, p, c, c.at_target(-others), weight, derivative, 0)
            walk.store(rows, p)
    return collect(walk, parts)


def without_target(
    walk: Walk,
    rows: Rows,
    target_logit: Tensor,
    w: Tensor | None,
    token_weight: Tensor | None,
    derivative: Tensor | None,
) -> tuple[RowStats, Tensor, Tensor, Tensor]:
    """Statistics of the rows; p of the classes that are not the target, up to a factor of the row; that factor; and
    the mass of those classes, 1 - p_y."""
    spec, y = walk.spec, rows.target
    x = walk.copy(rows)
    x.scatter_(1, y, target_logit.unsqueeze(1))
    walk.transform(x, derivative)
    z_y = x.gather(1, y).squeeze(1)
    plain_sum = None
    if spec.label_smoothing:
        plain_sum = x.sum(1) if w is None else x @ w
    predicted = x.argmax(1) if spec.stats else None
    # the largest of the others takes the target's place: its share then tells the others' sum, which is not less
    x.scatter_(1, y, -torch.inf)
    top = x.amax(1, keepdim=True)
    none = top == -torch.inf  # no other class has any mass: V = 1, or all others are masked
    x.scatter_(1, y, torch.where(none, 0, top))
    torch.softmax(x, 1, out=x)
    share = x.gather(1, y).squeeze(1)
    x.scatter_(1, y, 0)
    # the others' lse is top + excess, kept in two parts: rounded to one, it would lose what a large logit covers
    top, excess = top.squeeze(1), torch.log((1 - share) / share)
    nll = torch.nn.functional.softplus(top - z_y + excess, threshold=40.0)
    nll = nll.masked_fill(z_y == torch.inf, torch.nan)  # as in PyTorch
    if rows.bad is not None:
        nll = nll.masked_fill(rows.bad, torch.nan)
    others = others_mass(nll)
    normalize = 1 / (1 - share).clamp_min(0.25)  # from 0.5 on, unless no other class has any mass
    lse = torch.logaddexp(top.to(walk.wide) + excess, z_y.to(walk.wide))
    smooth = None
    if plain_sum is not None:
        smooth = (x.shape[1] if w is None else w.sum()) * lse.to(walk.dtype) - plain_sum
    entropy = None
    if spec.stats:
        rest = torch.special.entr(others) + others * (normalize * torch.special.entr(x).sum(1) - normalize.log())
        entropy = torch.where(others < 1, (1 - others) * nll, 0) + rest
    stats = _row_stats(walk, rows, nll, lse, smooth, entropy, predicted, w, token_weight)
    return stats, x, others * normalize, others


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
    g, smoothing = _product(of_s, u), spec.label_smoothing
    c = g * (smoothing / num_classes) if smoothing else None
    b = _product(g * (1 - smoothing) if smoothing else g, of_target)
    rest = None if c is None else c * (num_classes if weight is None else weight.sum())
    if of_norm is not None:
        of_norm = _product(of_norm, u, of_target)
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


def _mark_out_of_range(stats: RowStats, walk: Walk) -> RowStats:
    """NaN where a target is out of range; a CPU has raised already."""
    bad = walk.out_of_range()
    loss, nll = (t.masked_fill(bad, torch.nan) for t in (stats.loss, stats.nll))
    lse = None if stats.lse is None else stats.lse.masked_fill(bad, torch.nan)
    return stats._replace(loss=loss, nll=nll, lse=lse)


def _column(of_rows: Tensor) -> Tensor:
    """(n, 1) from (n,); one number stays one."""
    return of_rows.unsqueeze(1) if of_rows.ndim else of_rows


def _product(first: Tensor | float, *factors: Tensor | None) -> Tensor:
    """The product of those that are there, at least one of them a tensor."""
    for factor in factors:
        if factor is not None:
            first = first * factor
    return first  # type: ignore[return-value]


def _entropy(logp: Tensor) -> Tensor:
    """-sum p log p, 0 where p is; `logp` is used up."""
    p = logp.exp()
    return p.mul_(logp.clamp_(min=torch.finfo(logp.dtype).min)).sum(1).neg_()


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
        walk.transform(x, None)
        parts.append(_shard_stats(walk, x, y, owned.unsqueeze(1), w))
        if rows.counted is not None:
            parts[-1].masked_fill_(~rows.counted.unsqueeze(1), 0)
    return torch.cat(parts)


def _shard_stats(walk: Walk, z: Tensor, y: Tensor, owned: Tensor, w: Tensor | None) -> Tensor:
    of_target = z.gather(1, y)
    top, column = z.max(1, keepdim=True)
    top = top.clamp(min=LOWEST)
    spread = torch.zeros_like(top)
    if walk.spec.label_smoothing:
        z.scatter_(1, y, torch.where(owned, 0, of_target))
        spread = z.sum(1, keepdim=True) if w is None else (z @ w).unsqueeze(1)
    z.scatter_(1, y, torch.where(owned, -torch.inf, of_target))
    z.sub_(top)
    e = z.exp() if walk.spec.stats else z.exp_()
    tail = (z.clamp_(min=-1e3) * e).sum(1, keepdim=True) if walk.spec.stats else spread
    fields = (top, e.sum(1, keepdim=True), torch.where(owned, of_target, 0), spread, tail, column)
    return torch.cat([f.to(walk.wide) for f in fields], 1)
