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

from fused_ppl.backends.torch_chunks import Chunks, Rows, transform
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
from fused_ppl.records import Normalizers, RowStats, RowUpstream, Shard, TokenInputs, Totals
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
    chunks = Chunks(logits, tokens, spec, memory_budget=memory_budget, keep_lse=keep_lse)
    return collect(chunks, [chunks.zeros(rows) if rows.skipped else chunk_stats(chunks, rows) for rows in chunks]), None


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
        grad_lse = None
        if upstream.grad_z is not None:
            grad_lse = rows.of(upstream.grad_z) * (2 * spec.z_loss) * rows.of(lse).to(chunks.dtype)
        c = coefficients(chunks, rows, grad_s=rows.of(upstream.grad_s), grad_lse=grad_lse)
        at_target = c.at_target(-others_mass(rows.of(nll)))
        if upstream.grad_lse is not None or upstream.grad_entropy is not None:
            statistics = Statistics.of(rows, upstream)
            at_target += statistics.at_target(rows.of(nll))
            factor = statistics.factor(z, rows.of(lse), c, whole=shard is None)  # before p takes the memory of z
            if shard is None:
                torch.softmax(z, 1, out=p)
            else:
                probabilities(z, rows.of(lse), rows.of(nll), factor=torch.ones_like(c.a), out=p)
            p.mul_(factor)
        elif shard is None:
            torch.softmax(z, 1, out=p)
            p.mul_(_column(c.a))
        else:
            probabilities(z, rows.of(lse), rows.of(nll), factor=c.a, out=p)
        finish_gradient(chunks, rows, p, c=c, at_target=at_target, derivative=derivative)
        chunks.store(rows, p)


class Statistics(NamedTuple):
    """The part of lse and entropy H in the gradient: dz[v] = p_v * (lse - entropy * (z_v - lse + H)), by upstream."""

    lse: Tensor  # (n,) or 0: the upstream gradient of lse
    entropy: Tensor | None  # (n,)
    value: Tensor | None  # (n,): H

    @classmethod
    def of(cls, rows: Rows, upstream: RowUpstream) -> Statistics:
        lse, entropy, value = (None if g is None else rows.of(g) for g in upstream[2:])
        return cls(torch.zeros_like(entropy) if lse is None else lse, entropy, value)  # type: ignore[arg-type]  # one is there

    def at_target(self, nll: Tensor) -> Tensor:
        nll = nll.clamp(max=1e3)  # e^-1000 is 0, and 0 * inf would be NaN
        if self.entropy is None or self.value is None:
            return self.lse * torch.exp(-nll)
        return torch.exp(-nll) * (self.lse + self.entropy * (nll - self.value))

    def factor(self, z: Tensor, lse: Tensor, c: Coefficients, *, whole: bool) -> Tensor:
        """(n, V) or (n, 1): a + lse - entropy * (z_v - lse + H), which p_v is multiplied by.

        `whole` says that z holds all classes. It matters in float64, where a large lse has been rounded.
        """
        constant = _column(c.a + self.lse)
        if self.entropy is None or self.value is None:
            return constant
        high, value = lse.to(z.dtype), self.value  # below -1000 p is 0, and 0 * -inf would be NaN
        if whole and lse.dtype == z.dtype:
            log_p = torch.log_softmax(z, 1).clamp_(min=-1e3)
        else:
            log_p = (z - high.unsqueeze(1)).clamp_(min=-1e3)
            value = (high - lse).to(z.dtype) + value  # what `high` has lost
        log_p += value.unsqueeze(1)
        return log_p.mul_(-self.entropy.unsqueeze(1)).add_(constant)


def probabilities(z: Tensor, lse: Tensor, nll: Tensor, *, factor: Tensor, out: Tensor) -> None:
    """factor * exp(z - lse) of the rows."""
    out.mul_((factor * exponentials(z, lse, nll, out)).unsqueeze(1))


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
    upstream: float | None,
    memory_budget: int | None,
) -> RowStats:
    """The statistics of a chunk of the fused LM head; its logits become `upstream` times the gradient of l.

    The target is left out of the sum, so that nothing of it is lost where it holds nearly all of the mass:

        lse_o = log sum_{v != y} exp z_v,    nll = log(1 + exp(lse_o - z_y)) >= 0,    1 - p_y = -expm1(-nll)

    `upstream` None computes no gradient, and the logits stay.
    """
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
        found, p, of_others, others = without_target(
            chunks, rows, target_logit=target_logit, z_y=z_y, derivative=derivative
        )
        parts.append(found)
        if upstream is not None:
            grad_s = torch.full_like(found.nll, upstream)
            grad_lse = None
            if spec.z_loss:
                grad_lse = grad_s * (2 * spec.z_loss) * found.lse(chunks, rows.of(z_y)).to(chunks.dtype)
            c = coefficients(chunks, rows, grad_s=grad_s, grad_lse=grad_lse)
            p.mul_((c.a * of_others).unsqueeze(1))
            finish_gradient(chunks, rows, p, c=c, at_target=c.at_target(-others), derivative=derivative)
            chunks.store(rows, p)
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
    if derivative is not None:
        p.mul_(derivative)
    elif chunks.spec.logit_scale != 1:
        p.mul_(chunks.spec.logit_scale)
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
