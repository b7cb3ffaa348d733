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

from fused_ppl import checks
from fused_ppl.backends.torch_chunks import Chunks, Rows, chain, transform
from fused_ppl.backends.torch_stats import (
    Others,
    Softmax,
    chunk_stats,
    collect,
    others_mass,
    plain_stats,
    product,
    shard_stats,
    stats_of_others,
    target_z,
    without_target,
    x_log_x,
)
from fused_ppl.backends.torch_threads import ALL, Part, in_parts
from fused_ppl.records import Normalizers, RowFunction, RowStats, RowUpstream, Shard, TokenInputs, Totals
from fused_ppl.spec import LossSpec


def nll_forward(
    logits: Tensor,  # (B, R, V) or (N, V)
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    num_items: Tensor | None,
    memory_budget: int | None,
    keep_lse: bool = True,
) -> tuple[RowStats, Totals | None]:
    """nll, lse and the parts of S and M of every row; entropy and argmax with `stats`."""

    def of_part(part: Part) -> RowStats:
        own_tokens, budget = part.of_tokens(tokens), part.budget(memory_budget)
        return _forward(part.of_logits(logits), own_tokens, spec, memory_budget=budget, keep_lse=keep_lse)

    def check() -> object:
        return checks.check_target_range(tokens.target, logits.shape[-1], spec.ignore_index)

    return RowStats.concatenate(in_parts(logits, of_part, check=check)), None


def _forward(
    logits: Tensor, tokens: TokenInputs, spec: LossSpec, *, memory_budget: int | None, keep_lse: bool
) -> RowStats:
    chunks = Chunks(logits, tokens, spec, memory_budget=memory_budget, keep_lse=keep_lse)
    if chunks.on_cpu and chunks.rows < tokens.target.shape[0] and not (spec.stats or spec.label_smoothing):
        found = plain_stats(chunks)
        if found is not None:
            return _redone(*found, chunks, tokens)
    return _by_chunks(chunks)


def _by_chunks(chunks: Chunks) -> RowStats:
    return collect(chunks, [chunks.zeros(rows) if rows.skipped else chunk_stats(chunks, rows) for rows in chunks])


def _redone(stats: RowStats, trusted: Tensor, chunks: Chunks, tokens: TokenInputs) -> RowStats:
    """Rows that are not to be trusted, once more by their maximum, a chunk of them at a time."""
    if bool(trusted.all()):
        return stats
    for rows in (~trusted).nonzero().squeeze(1).split(chunks.rows):
        own = tokens.of_rows(rows)
        again = _by_chunks(Chunks(chunks.logits[rows], own, chunks.spec, memory_budget=None, keep_lse=chunks.keep_lse))
        for whole, part in zip(stats, again, strict=True):
            if whole is not None and part is not None:
                whole.index_copy_(0, rows, part)
    return stats


def nll_backward(
    logits: Tensor,  # (B, R, V) or (N, V)
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    normalizers: Normalizers,
    upstream: RowUpstream,
    out: Tensor,  # the shape of logits: a buffer, or the logits themselves
    memory_budget: int | None,
    shard: Shard | None = None,
) -> None:
    """The gradient of every row into `out`."""

    def of_part(part: Part) -> None:
        _backward(
            part.of_logits(logits),
            part.of_tokens(tokens),
            spec,
            normalizers=Normalizers(*(part.of(t) for t in normalizers)),
            upstream=upstream.map(part.of),
            out=part.of_logits(out),
            memory_budget=part.budget(memory_budget),
            shard=shard,
        )

    in_parts(logits, of_part)


def _backward(
    logits: Tensor,
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    normalizers: Normalizers,
    upstream: RowUpstream,
    out: Tensor,
    memory_budget: int | None,
    shard: Shard | None,
) -> None:
    lse, nll = normalizers
    chunks = Chunks(logits, tokens, spec, memory_budget=memory_budget, out=out, shard=shard)
    slope = None if spec.softcap is None else torch.empty_like(chunks.buffer)
    for rows in chunks:
        assert rows.out is not None
        if rows.skipped:
            rows.out.zero_()
            continue
        derivative = None if slope is None else slope[: rows.target.shape[0]]
        z, p = chunks.load(rows, derivative), chunks.work(rows)
        if shard is None:
            softmax = Softmax(torch.softmax(z, 1, out=p), None)
        else:
            softmax = Softmax(p, exponentials(z, rows.of(lse), rows.of(nll), p))
        of_rows = upstream.map(rows.of)
        grad_lse = None
        if of_rows.grad_z is not None:
            grad_lse = of_rows.grad_z * (2 * spec.z_loss) * rows.of(lse).to(chunks.dtype)
        c = coefficients(chunks, rows, grad_s=of_rows.grad_s, grad_lse=grad_lse)
        at_target = c.at_target(-others_mass(rows.of(nll)))
        if of_rows.grad_lse is not None or of_rows.grad_entropy is not None:
            at_target += statistics_at_target(of_rows, rows.of(nll))
        softmax_part(softmax, c.a, of_rows)
        finish_gradient(chunks, rows, p, c=c, at_target=at_target, derivative=derivative)
        chunks.store(rows, p)


def softmax_part(p: Softmax, a: Tensor, upstream: RowUpstream) -> None:
    """q becomes p_v * (a + grad_lse - grad_entropy * (log p_v + H)) by rows; H is the entropy, a is (n,) or ()."""
    if upstream.grad_lse is not None:
        a = a + upstream.grad_lse
    of_entropy = upstream.grad_entropy
    if of_entropy is None or upstream.entropy is None:
        p.q.mul_(_column(product(a, p.scale)))
        return
    q_log_q, shift = p.q_log_q, p.shift
    if q_log_q is None:
        q_log_q = x_log_x(p.q)
        shift = None if p.scale is None else p.scale.log()
    a = a - of_entropy * (upstream.entropy if shift is None else upstream.entropy + shift)
    p.q.mul_(_column(product(a, p.scale))).addcmul_(q_log_q, _column(product(of_entropy, p.scale)), value=-1)


def statistics_at_target(upstream: RowUpstream, nll: Tensor) -> Tensor:
    """(n,): p_y * (grad_lse - grad_entropy * (log p_y + H)), where log p_y = -nll."""
    nll = nll.clamp(max=1e3)  # e^-1000 is 0, and 0 * inf would be NaN
    factor = 0 if upstream.grad_lse is None else upstream.grad_lse
    if upstream.grad_entropy is not None and upstream.entropy is not None:
        factor = factor + upstream.grad_entropy * (nll - upstream.entropy)
    return torch.exp(-nll) * factor


def exponentials(z: Tensor, lse: Tensor, nll: Tensor, out: Tensor) -> Tensor:
    """exp(z - lse) into `out`, up to a factor of each row, which is returned: it holds the low part of lse.

    If |lse| is so large that neighbouring float32 numbers are over 60 nats apart, only the largest logits have mass,
    and they equal `high`. lse - high is then not exact in float64 either, and nll is used if the target is one of them.
    """
    high = lse.to(z.dtype)
    torch.sub(z, high.unsqueeze(1), out=out).exp_()
    far = high.abs() >= 2**30 if z.dtype == torch.float32 else high.abs() >= 2**59
    return torch.where(far & (nll < 40), -nll, high - lse).exp_().to(z.dtype)


def nll_forward_backward(
    logits: Tensor,  # (R, V): a buffer, which becomes the gradient
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor,  # (R,) fp32
    upstream: float | RowFunction | None,
    memory_budget: int | None,
) -> RowStats:
    """The statistics of a chunk of the fused LM head; its logits become their gradient, see `fused_ppl.backends`.

    The target is left out of the sum, so that nothing of it is lost where it holds nearly all of the mass:

        lse_o = log sum_{v != y} exp z_v,    nll = log(1 + exp(lse_o - z_y)) >= 0,    1 - p_y = -expm1(-nll)
    """

    def of_part(part: Part) -> RowStats:
        return _forward_backward(
            part.of_logits(logits),
            part.of_tokens(tokens),
            spec,
            target_logit=part.of(target_logit),
            upstream=upstream,
            memory_budget=part.budget(memory_budget),
        )

    if callable(upstream):  # a function runs in the caller's thread
        return of_part(ALL)
    return RowStats.concatenate(in_parts(logits, of_part))


def _forward_backward(
    logits: Tensor,
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor,
    upstream: float | RowFunction | None,
    memory_budget: int | None,
) -> RowStats:
    out = None if upstream is None else logits
    chunks = Chunks(logits, tokens, spec, memory_budget=memory_budget, out=out)
    slope = torch.empty_like(chunks.buffer) if spec.softcap is not None and upstream is not None else None
    z_y = target_z(chunks, target_logit)
    parts = []
    for rows in chunks:
        if rows.skipped:
            if upstream is not None:
                logits[rows.span] = 0
            parts.append(Others.none(chunks, rows))
            continue
        derivative = None if slope is None else slope[: rows.target.shape[0]]
        found, p, rest = without_target(chunks, rows, target_logit=target_logit, z_y=z_y, derivative=derivative)
        parts.append(found)
        if upstream is None:
            continue
        if callable(upstream):
            of_rows = upstream(found.nll, found.entropy, rows.span)
        else:
            of_rows = RowUpstream(torch.full_like(found.nll, upstream), None)
        grad_lse = None
        if spec.z_loss:
            grad_lse = of_rows.grad_s * (2 * spec.z_loss) * found.lse(chunks, rows.of(z_y)).to(chunks.dtype)
        c = coefficients(chunks, rows, grad_s=of_rows.grad_s, grad_lse=grad_lse)
        at_target = c.at_target(-rest)
        if of_rows.grad_entropy is not None:
            at_target += statistics_at_target(of_rows, found.nll)
        softmax_part(p, c.a, of_rows)
        finish_gradient(chunks, rows, p.q, c=c, at_target=at_target, derivative=derivative)
        chunks.store(rows, p.q)
    return stats_of_others(chunks, parts, z_y)


class Coefficients(NamedTuple):
    """The coefficients of each row: dz[v] = p_v * a - c * w[v] - b * [v = y], a = b + rest."""

    a: Tensor
    rest: Tensor | None
    c: Tensor | None

    def at_target(self, p_minus_one: Tensor) -> Tensor:
        """p_y * a - b = (p_y - 1) * a + rest, so that a target with p near 1 loses no digits."""
        value = p_minus_one * self.a
        return value if self.rest is None else value.add_(self.rest)


def coefficients(
    chunks: Chunks,
    rows: Rows,
    *,
    grad_s: Tensor,
    grad_lse: Tensor | None,  # upstream of Z times d(z_loss * lse^2) / d lse
) -> Coefficients:
    weight, num_classes = chunks.weight, chunks.num_classes
    of_target, u = chunks.target_weight(rows), chunks.token_weight(rows)
    g, smoothing = product(grad_s, u), chunks.spec.label_smoothing
    c = g * (smoothing / num_classes) if smoothing else None
    b = product(g * (1 - smoothing) if smoothing else g, of_target)
    rest = None if c is None else c * (num_classes if weight is None else weight.sum())
    if grad_lse is not None:
        grad_lse = product(grad_lse, u, of_target)
        rest = grad_lse if rest is None else rest + grad_lse
    return Coefficients(b if rest is None else b + rest, rest, c)


def finish_gradient(
    chunks: Chunks,
    rows: Rows,
    p: Tensor,  # (n, V): p * a; it becomes the gradient
    *,
    c: Coefficients,
    at_target: Tensor,
    derivative: Tensor | None,
) -> None:
    if rows.owned is not None:
        at_target = torch.where(rows.owned, at_target, p.gather(1, rows.target).squeeze(1))
    p.scatter_(1, rows.target, at_target.unsqueeze(1))
    if c.c is not None:
        weight = chunks.own_weight
        if weight is None:
            p.sub_(_column(c.c))
        else:
            p.addcmul_(_column(c.c), weight, value=-1)
    chain(p, chunks.spec, derivative)
    if rows.counted is not None:
        p.masked_fill_(~rows.counted.unsqueeze(1), 0)


def _column(of_rows: Tensor) -> Tensor:
    """(n, 1) from (n,); a 0-d tensor stays 0-d."""
    return of_rows.unsqueeze(1) if of_rows.ndim else of_rows


def nll_forward_shard(
    logits: Tensor,  # (B, R, V of this shard) or (N, V of this shard)
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor | None,  # (N,): where the target is in the shard
    memory_budget: int | None,
    shard: Shard,
) -> Tensor:
    """(N, 6) float64, the fields that `RowBackend` names."""
    chunks = Chunks(logits, tokens, spec, memory_budget=memory_budget, shard=shard)
    parts = [torch.zeros(0, 6, dtype=chunks.wide, device=logits.device)]
    for rows in chunks:
        if rows.skipped:
            parts.append(parts[0].new_zeros(rows.target.shape[0], 6))
            continue
        y, owned = rows.target, rows.owned
        assert owned is not None
        x = chunks.buffer[: y.shape[0]]
        x.view(rows.source.shape).copy_(rows.source)
        if target_logit is not None:
            given = rows.of(target_logit).to(chunks.dtype).unsqueeze(1)
            x.scatter_(1, y, torch.where(owned.unsqueeze(1), given, x.gather(1, y)))
        transform(x, chunks.spec)
        parts.append(shard_stats(chunks, x, y, owned=owned.unsqueeze(1)))
        if rows.counted is not None:
            parts[-1].masked_fill_(~rows.counted.unsqueeze(1), 0)
    return torch.cat(parts)
