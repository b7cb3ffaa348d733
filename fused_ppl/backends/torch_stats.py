# SPDX-License-Identifier: Apache-2.0
"""The statistics of a chunk of rows: nll, lse, the parts of S and M, entropy and argmax.

from logits        log_softmax, then nll = -logp[y]
in the fused head  the target is left out of the sum: nll = log(1 + exp(lse_others - z_y)), accurate near 0
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl.backends.shards import LOWEST
from fused_ppl.backends.torch_chunks import Chunks, Rows, transform
from fused_ppl.records import RowStats

# Nearly all logits are such that their maximum need not be subtracted, which saves a pass over each chunk, or two.
# Bounds of a sum of e^z. Below, terms that round to 0 would be missed. Above, 1 / sum would lose digits. MOST_LOGIT
# bounds |z_y|, so that e^z_y is a normal float32 number.
LEAST_SUM, MOST_SUM, MOST_LOGIT = 1e-20, 1e30, 80.0


def within_bounds(sums: Tensor) -> Tensor:
    """(n,): a row is judged by itself, so that its result does not depend on the other rows."""
    return (sums >= LEAST_SUM) & (sums <= MOST_SUM)


def plain_stats(chunks: Chunks) -> tuple[RowStats, Tensor] | None:
    """nll and lse of all rows from sums of e^z, and which of them are to be trusted. None where rows are no matrix.

    There is little Python between the chunks. So they may be small, and a row is in the thread's own cache when it is
    read again.
    """
    every, spec = chunks.all_rows, chunks.spec
    logits = chunks.logits
    if logits.ndim == 3:
        return None
    may_read = logits.dtype == chunks.dtype and spec.logit_scale == 1 and spec.softcap is None
    sums = torch.empty(logits.shape[0], dtype=chunks.dtype, device=logits.device)
    rows = max(1, chunks.rows // 2)
    counted = None if every.counted is None else every.counted.split(rows)
    for k, (x, s) in enumerate(zip(logits.split(rows), sums.split(rows), strict=True)):
        if counted is not None and not bool(counted[k].any()):
            s.fill_(1)
            continue
        e = chunks.buffer[: x.shape[0]]
        torch.sum(torch.exp(x, out=e) if may_read else transform(e.copy_(x), spec).exp_(), 1, out=s)
        if counted is not None:
            s.masked_fill_(~counted[k], 1)
    z_y = target_z(chunks, logits.gather(1, every.target).squeeze(1))
    wide = sums.to(chunks.wide)
    log_sum = wide.log()
    # the same e^z divided out: where the target has all the mass, nll is 0 and not the rounding of e^z
    nll = torch.where(z_y < -MOST_LOGIT, log_sum - z_y, (wide / z_y.exp()).log_().clamp_min_(0)).to(chunks.dtype)
    return row_stats(chunks, every, nll, lse=log_sum if chunks.keep_lse else None), within_bounds(sums)


def chunk_stats(chunks: Chunks, rows: Rows) -> RowStats:
    spec, y, w = chunks.spec, rows.target, chunks.weight
    z = chunks.load(rows)
    # lse = z - logp in every column; in the column of the largest z nothing cancels and logp is finite
    top = argmax(z).unsqueeze(1) if spec.stats or spec.z_loss else y
    top_logit = z.gather(1, top) if chunks.keep_lse else None
    # several chunks share one buffer
    logp = torch.log_softmax(z, 1) if rows.whole else torch.log_softmax(z, 1, out=chunks.work(rows))
    lse = None if top_logit is None else (top_logit.to(chunks.wide) - logp.gather(1, top)).squeeze(1)
    nll = logp.gather(1, y).squeeze(1).neg_()
    smooth = None
    if spec.label_smoothing:
        smooth = -(logp.sum(1) if w is None else logp @ w)
    entropy = _entropy(logp) if spec.stats else None
    predicted = top.squeeze(1) if spec.stats else None
    return row_stats(chunks, rows, nll, lse=lse, smooth=smooth, entropy=entropy, predicted=predicted)


def collect(chunks: Chunks, parts: list[RowStats]) -> RowStats:
    if not parts:
        return chunks.zeros(None)
    stats = parts[0] if len(parts) == 1 else RowStats.concatenate(parts)
    return stats if chunks.on_cpu else _mark_out_of_range(stats, chunks)


def row_stats(
    chunks: Chunks,
    rows: Rows,
    nll: Tensor,
    *,
    lse: Tensor | None,
    smooth: Tensor | None = None,  # sum_v w[v] * (lse - z[v])
    entropy: Tensor | None = None,
    predicted: Tensor | None = None,
) -> RowStats:
    """The statistics of rows, with l and u * w[y]; 0 in ignored rows."""
    a = chunks.spec.label_smoothing
    of_target, u = chunks.target_weight(rows), chunks.token_weight(rows)
    loss = nll if not a and of_target is None else product(1 - a, of_target) * nll
    if smooth is not None:
        loss = loss + (a / rows.source.shape[-1]) * smooth
    loss = product(loss, u)
    weight = torch.ones_like(nll) if u is None and of_target is None else product(1, u, of_target)
    stats = RowStats(loss, weight, nll, lse, entropy, predicted)
    if rows.counted is None:
        return stats
    counted = rows.counted
    return stats.map(lambda t, ignored: torch.where(counted, t, ignored))


def target_z(chunks: Chunks, target_logit: Tensor) -> Tensor:
    """(N,): z of the target of each row; +inf becomes NaN, as in PyTorch."""
    z_y = target_logit.to(chunks.dtype, copy=True)
    transform(z_y, chunks.spec)
    return z_y.masked_fill_(z_y == torch.inf, torch.nan)


class Others(NamedTuple):
    """The statistics of the classes that are not the target.

    Their log-sum-exp is top + excess. It is kept in two parts, because one rounded number would lose the excess beside
    a large top.
    """

    nll: Tensor  # (n,)
    top: Tensor  # (n,)
    excess: Tensor  # (n,)
    plain_sum: Tensor | None  # (n,): sum_v w[v] * z[v], of all classes
    entropy: Tensor | None
    predicted: Tensor | None

    @classmethod
    def none(cls, chunks: Chunks, rows: Rows) -> Others:
        """The fields of rows that are all ignored."""
        zeros = chunks.buffer.new_zeros(rows.target.shape[0])
        entropy, predicted = (zeros, rows.label) if chunks.spec.stats else (None, None)
        return cls(zeros, zeros, zeros, zeros if chunks.spec.label_smoothing else None, entropy, predicted)

    def lse(self, chunks: Chunks, z_y: Tensor) -> Tensor:
        """(n,): lse over all classes.

        The rows are padded to whole vectors, because aten rounds a last partial vector in another way. So the result of
        a row does not depend on its place.
        """
        pairs = torch.stack([self.top.to(chunks.wide) + self.excess, z_y.to(chunks.wide)])
        filled = torch.nn.functional.pad(pairs, (0, -z_y.shape[0] % 64))
        return torch.logaddexp(*filled)[: z_y.shape[0]]


def stats_of_others(chunks: Chunks, parts: list[Others], z_y: Tensor) -> RowStats:
    """The statistics of all rows."""
    if not parts:
        return chunks.zeros(None)
    found = Others(*(None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True)))  # type: ignore[arg-type]  # of one kind
    lse, w = found.lse(chunks, z_y), chunks.weight
    smooth = None
    if found.plain_sum is not None:
        smooth = (chunks.logits.shape[-1] if w is None else w.sum()) * lse.to(chunks.dtype) - found.plain_sum
    asked = {"entropy": found.entropy, "predicted": found.predicted}
    stats = row_stats(chunks, chunks.all_rows, found.nll, lse=lse, smooth=smooth, **asked)
    return stats if chunks.on_cpu else _mark_out_of_range(stats, chunks)


class Softmax(NamedTuple):
    """p of some classes of each row, as p_v = scale * q_v and log p_v = log_q_v + shift."""

    q: Tensor  # (n, V); the gradient takes its memory
    scale: Tensor | None  # (n,), or None for 1
    q_log_q: Tensor | None = None  # (n, V), and 0 where q is 0; None if nobody has computed it
    shift: Tensor | None = None  # (n,), or None for log scale


def without_target(
    chunks: Chunks, rows: Rows, *, target_logit: Tensor, z_y: Tensor, derivative: Tensor | None
) -> tuple[Others, Softmax, Tensor]:
    """The statistics of the other classes, their p, which is 0 at the target, and 1 - p_y."""
    spec, y, z_y = chunks.spec, rows.target, rows.of(z_y)
    logit = rows.of(target_logit)
    x, plain_sum = _chunk_with_target(chunks, rows, logit, derivative)
    if chunks.on_cpu and not spec.stats and x.dtype != rows.source.dtype:  # then x is a copy, and can be made again
        mass = x.scatter_(1, y, -torch.inf).exp_().sum(1)
        trusted = within_bounds(mass) & (z_y <= MOST_LOGIT)
        excess = mass.to(chunks.wide).log()
        nll = torch.nn.functional.softplus(excess - z_y, threshold=40.0).to(chunks.dtype)
        rest = others_mass(nll)
        plain = Others(nll, torch.zeros_like(nll), excess, plain_sum, None, None), Softmax(x, rest / mass), rest
        if bool(trusted.all()):
            return plain
        kept = plain[1]._replace(q=x.clone())
        x, plain_sum = _chunk_with_target(chunks, rows, logit, derivative)
        found, p, rest = _by_maximum(chunks, rows, x, plain_sum, z_y=z_y)
        return _chosen(trusted, (plain[0], kept, plain[2]), (found, p, rest))
    return _by_maximum(chunks, rows, x, plain_sum, z_y=z_y)


def _chosen(
    trusted: Tensor, plain: tuple[Others, Softmax, Tensor], other: tuple[Others, Softmax, Tensor]
) -> tuple[Others, Softmax, Tensor]:
    """Row by row one of two statistics. Both have neither entropy nor prediction."""
    (a, p, rest), (b, q, other_rest) = plain, other
    nll, top, excess = (torch.where(trusted, u, v) for u, v in ((a.nll, b.nll), (a.top, b.top), (a.excess, b.excess)))
    found = Others(nll, top, excess, b.plain_sum, None, None)
    assert p.scale is not None and q.scale is not None
    torch.where(trusted.unsqueeze(1), p.q, q.q, out=q.q)
    return found, Softmax(q.q, torch.where(trusted, p.scale, q.scale)), torch.where(trusted, rest, other_rest)


def _by_maximum(
    chunks: Chunks, rows: Rows, x: Tensor, plain_sum: Tensor | None, *, z_y: Tensor
) -> tuple[Others, Softmax, Tensor]:
    """As `without_target`, whatever the logits are: relative to the largest of the others."""
    spec, y = chunks.spec, rows.target
    predicted = argmax(x) if spec.stats else None
    # the largest of the others takes the place of the target: softmax then gives its share of a sum that it is part of
    x.scatter_(1, y, -torch.inf)
    top = x.amax(1, keepdim=True).clamp_min_(torch.finfo(x.dtype).min)  # if all others are masked they have no mass
    x.scatter_(1, y, top)
    below_top = x - top if spec.stats else None
    torch.softmax(x, 1, out=x)
    share = x.gather(1, y).squeeze(1)
    x.scatter_(1, y, 0)
    top, left = top.squeeze(1), 1 - share
    excess = (left / share).log_()
    nll = torch.nn.functional.softplus(top - z_y + excess, threshold=40.0)
    if rows.bad is not None:
        nll = nll.masked_fill(rows.bad, torch.nan)
    rest = others_mass(nll)
    scale = rest / left.clamp_min_(0.25)  # it is at least 0.5, unless no other class has any mass
    found, p = Others(nll, top, excess, plain_sum, None, predicted), Softmax(x, scale)
    if below_top is not None:
        # among the others log p is below_top - excess, and excess >= 0 unless they have no mass
        lost = excess.clamp(min=0)
        q_log_q = below_top.clamp_(min=-1e3).mul_(x)
        of_others = torch.special.entr(rest) + rest * (lost - q_log_q.sum(1) / left)
        found = found._replace(entropy=torch.where(rest < 1, (1 - rest) * nll, 0) + of_others)
        p = p._replace(q_log_q=q_log_q, shift=rest.clamp(min=torch.finfo(x.dtype).tiny).log() - lost)
    return found, p, rest


def _chunk_with_target(
    chunks: Chunks, rows: Rows, target_logit: Tensor, derivative: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """z of the rows, in memory that may be written to, and sum_v w[v] * z[v] where the smoothing needs it."""
    spec = chunks.spec
    x = chunks.copy(rows)
    if spec.softcap is not None or spec.label_smoothing or spec.stats:
        x.scatter_(1, rows.target, target_logit.unsqueeze(1))
    transform(x, spec, derivative)
    if not spec.label_smoothing:
        return x, None
    return x, x.sum(1) if chunks.weight is None else x @ chunks.weight


def others_mass(nll: Tensor) -> Tensor:
    """1 - p_y = -expm1(-nll), with a small relative error also near 0."""
    return -torch.expm1(-nll)


def argmax(x: Tensor) -> Tensor:
    """(n,): the column of the largest of each row, the first one among equals.

    A CPU looks for the largest of each block of columns first. aten's amax is vectorised, and its argmax is not.
    """
    columns, size = x.shape[1], 256
    if x.device.type != "cpu" or columns < 16 * size:
        return x.argmax(1)
    count = columns // size
    of_blocks = x[:, : count * size].unflatten(1, (count, size)).amax(2)
    of_last = x[:, columns - size :].amax(1, keepdim=True)  # a whole block that ends with the row
    block = torch.cat((of_blocks, of_last), 1).argmax(1)
    first = torch.where(block == count, columns - size, block * size).unsqueeze(1)
    place = x.gather(1, first + torch.arange(size, dtype=torch.int64, device=x.device)).argmax(1, keepdim=True)
    return (first + place).squeeze(1)


def x_log_x(x: Tensor) -> Tensor:
    """x * log x of numbers >= 0, and 0 for 0. On a CPU it takes half the time of torch.special.entr."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log_().mul_(x)


def _mark_out_of_range(stats: RowStats, chunks: Chunks) -> RowStats:
    """NaN in rows whose target is out of range. On a CPU the range check has raised."""
    bad = chunks.out_of_range()
    loss, nll = (t.masked_fill(bad, torch.nan) for t in (stats.loss, stats.nll))
    lse = None if stats.lse is None else stats.lse.masked_fill(bad, torch.nan)
    return stats._replace(loss=loss, nll=nll, lse=lse)


def _entropy(logp: Tensor) -> Tensor:
    """-sum p log p, where p = 0 counts as 0. `logp` is overwritten."""
    p = logp.exp()
    return p.mul_(logp.clamp_(min=torch.finfo(logp.dtype).min)).sum(1).neg_()


def product(first: Tensor | float, *factors: Tensor | None) -> Tensor:
    """The product of the factors that are not None. At least one factor is a tensor."""
    for factor in factors:
        if factor is not None:
            first = first * factor
    return first  # type: ignore[return-value]  # a tensor, as one of the factors is


def shard_stats(chunks: Chunks, z: Tensor, y: Tensor, *, owned: Tensor) -> Tensor:
    """The fields of `RowBackend.nll_forward_shard`."""
    w = chunks.own_weight
    of_target = z.gather(1, y)
    column = argmax(z).unsqueeze(1)
    top = z.gather(1, column).clamp(min=LOWEST)
    spread = torch.zeros_like(top)
    if chunks.spec.label_smoothing:
        z.scatter_(1, y, torch.where(owned, 0, of_target))
        spread = z.sum(1, keepdim=True) if w is None else (z @ w).unsqueeze(1)
    z.scatter_(1, y, torch.where(owned, -torch.inf, of_target))
    z.sub_(top)
    e = z.exp() if chunks.spec.stats else z.exp_()
    tail = (z.clamp_(min=-1e3) * e).sum(1, keepdim=True) if chunks.spec.stats else spread
    fields = (top, e.sum(1, keepdim=True), torch.where(owned, of_target, 0), spread, tail, column)
    return torch.cat([f.to(chunks.wide) for f in fields], 1)
