# SPDX-License-Identifier: Apache-2.0
"""The row formula in chunked PyTorch: any device, any dtype, nothing of size N x V.

aten's log_softmax and softmax work on chunks of rows that stay in cache: on the caller's own memory where that is
fp32 and contiguous, on an fp32 buffer otherwise. Interface and shapes: `fused_ppl.backends`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import checks, plan
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import LossSpec, RowStats, Totals


class Rows(NamedTuple):
    """One chunk of rows."""

    span: slice  # of the flat rows
    source: Tensor  # (b, r, V), n = b * r: the caller's logits
    out: Tensor | None  # the same place in the gradient
    counted: Tensor | None  # (n,) bool, or None where all rows are known to be counted
    target: Tensor  # (n, 1) int64, 0 where ignored, inside the range everywhere
    skipped: bool  # known to hold no counted row


def nll_forward(
    logits: Tensor,  # (B, R, V)
    target: Tensor,  # (N,)
    spec: LossSpec,
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    num_items: Tensor | None,
    memory_budget: int | None,
) -> tuple[RowStats, Totals | None]:
    """nll, lse and the rows' parts of S and M; entropy and argmax on request."""
    walk = _Walk(logits, target, spec, memory_budget)
    if weight is not None:
        weight = weight.to(walk.dtype)
    parts = [walk.zeros(rows) if rows.skipped else _chunk_stats(walk, rows, weight, token_weight) for rows in walk]
    if not parts:
        return walk.zeros(None), None
    stats = parts[0] if len(parts) == 1 else RowStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return stats if walk.on_cpu else _mark_out_of_range(stats, walk), None


def _chunk_stats(walk: _Walk, rows: Rows, w: Tensor | None, token_weight: Tensor | None) -> RowStats:
    spec, y = walk.spec, rows.target
    a, v = spec.label_smoothing, rows.source.shape[-1]
    z, logp = walk.load(rows), walk.work(rows)
    target_logit = z.gather(1, y).squeeze(1)
    predicted = z.argmax(1) if spec.stats else y.new_empty(0)
    torch.log_softmax(z, 1, out=logp)
    nll = logp.gather(1, y).squeeze(1).neg_()
    of_target = None if w is None else w[y.squeeze(1)]
    u = None if token_weight is None else token_weight[rows.span].to(walk.dtype)

    loss = nll
    if a or w is not None:
        loss = _product(1 - a, of_target) * nll
    if a:
        loss = loss - (a / v) * (logp.sum(1) if w is None else logp @ w)
    if u is not None:
        loss = loss * u
    row_weight = torch.ones_like(nll) if u is None and of_target is None else _product(1, u, of_target)
    entropy = _entropy(logp) if spec.stats else nll.new_empty(0)
    stats = RowStats(loss, row_weight, nll, target_logit.to(walk.wide) + nll, entropy, predicted)
    if rows.counted is None:
        return stats
    ignored = (0, 0, 0, 0, 0, -1)
    return RowStats(*(torch.where(rows.counted, t, i) if t.numel() else t for t, i in zip(stats, ignored, strict=True)))


def nll_backward(
    logits: Tensor,  # (B, R, V)
    target: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    nll: Tensor,  # (N,)
    of_s: Tensor,  # (N,): upstream gradient of S
    of_z: Tensor | None,  # (N,): upstream gradient of Z
    spec: LossSpec,
    weight: Tensor | None,
    token_weight: Tensor | None,
    out: Tensor,  # (B, R, V): a buffer, or the logits themselves
    memory_budget: int | None,
) -> None:
    """dz[i, v] = p * A[i] - C[i] * w[v] - B[i] * [v = y[i]], times scale * (1 - (z / cap)^2), into `out`."""
    walk = _Walk(logits, target, spec, memory_budget, out)
    if weight is not None:
        weight = weight.to(walk.dtype)
    w_sum = logits.shape[-1] if weight is None else weight.sum()
    slope = None if spec.softcap is None else torch.empty_like(walk.buffer)
    for rows in walk:
        assert rows.out is not None
        if rows.skipped:
            rows.out.zero_()
            continue
        i, y = rows.span, rows.target
        derivative = None if slope is None else slope[: y.shape[0]]
        z, p = walk.load(rows, derivative), walk.work(rows)
        torch.softmax(z, 1, out=p)

        of_target = None if weight is None else weight[y.squeeze(1)]
        u = None if token_weight is None else token_weight[i].to(walk.dtype)
        g = _product(of_s[i], u)
        c = g * (spec.label_smoothing / logits.shape[-1]) if spec.label_smoothing else None
        b = _product(g if c is None else g * (1 - spec.label_smoothing), of_target)
        # A - B, kept apart so that a target with p -> 1 loses no digits: p * A - B = A * expm1(-nll) + (A - B)
        rest = None if c is None else c * w_sum
        if of_z is not None:
            of_norm = _product(of_z[i] * (2 * spec.z_loss) * lse[i].to(walk.dtype), u, of_target)
            rest = of_norm if rest is None else rest + of_norm
        a = b if rest is None else b + rest
        at_target = torch.expm1(-nll[i]).mul_(a)
        if rest is not None:
            at_target += rest
        p.mul_(a.unsqueeze(1))
        p.scatter_(1, y, at_target.unsqueeze(1))
        if c is not None:
            p.sub_(c.unsqueeze(1)) if weight is None else p.addcmul_(c.unsqueeze(1), weight, value=-1)
        if derivative is not None:
            p.mul_(derivative)
        elif spec.logit_scale != 1:
            p.mul_(spec.logit_scale)
        if rows.counted is not None:
            p.masked_fill_(~rows.counted.unsqueeze(1), 0)
        walk.store(rows, p)


def _mark_out_of_range(stats: RowStats, walk: _Walk) -> RowStats:
    """NaN where a target is out of range; a CPU has raised already."""
    bad = (walk.target < 0) | (walk.target >= walk.logits.shape[-1])
    if walk.spec.ignore_index is not None:
        bad &= walk.target != walk.spec.ignore_index
    loss, nll, lse = (t.masked_fill(bad, torch.nan) for t in (stats.loss, stats.nll, stats.lse))
    return stats._replace(loss=loss, nll=nll, lse=lse)


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


class _Walk:
    """Goes over the rows of (B, R, V) in chunks, and holds the buffer that a chunk is computed in."""

    def __init__(
        self, logits: Tensor, target: Tensor, spec: LossSpec, memory_budget: int | None, out: Tensor | None = None
    ) -> None:
        self.logits, self.target, self.spec, self.out = logits, target, spec, out
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.wide = sum_dtype(logits.device)
        self.on_cpu = logits.device.type == "cpu"
        outer, inner, v = logits.shape
        rows = plan.rows_per_chunk(v, self.dtype.itemsize, logits.device.type, torch.get_num_threads(), memory_budget)
        self.rows = min(rows, max(1, outer * inner))
        self.buffer = torch.empty(self.rows, v, dtype=self.dtype, device=logits.device)

    def __iter__(self) -> Iterator[Rows]:
        target, ignore_index, v = self.target, self.spec.ignore_index, self.logits.shape[-1]
        on_cpu, counted = self.on_cpu, None
        index = target.long()
        if on_cpu or checks.debug():
            low, high = checks.check_target_range(target, v, ignore_index)
        if ignore_index is not None and not (on_cpu and not low <= ignore_index <= high):
            counted = target != ignore_index
            index = index * counted
        if not on_cpu:
            index = index.clamp(0, v - 1)
        index = index.unsqueeze(1)
        for b, r, i in plan.row_chunks(self.logits.shape[0], self.logits.shape[1], self.rows):
            out = None if self.out is None else self.out[b, r]
            mine = None if counted is None else counted[i]
            skipped = False
            if mine is not None and on_cpu:
                any_, all_ = bool(mine.any()), bool(mine.all())
                mine, skipped = None if all_ else mine, not any_
            yield Rows(i, self.logits[b, r], out, mine, index[i], skipped)

    def load(self, rows: Rows, derivative: Tensor | None = None) -> Tensor:
        """z of the rows, (n, V): the caller's own memory where nothing has to be done to it.

        `derivative` takes dz/dx where a cap makes it depend on x.
        """
        scale, cap = self.spec.logit_scale, self.spec.softcap
        if scale == 1 and cap is None and _is_matrix(rows.source, self.dtype):
            return rows.source.view(-1, rows.source.shape[-1])
        x = self.buffer[: rows.target.shape[0]]
        x.view(rows.source.shape).copy_(rows.source)
        if cap is None:
            return x if scale == 1 else x.mul_(scale)
        x.mul_(scale / cap).tanh_()
        if derivative is not None:
            torch.mul(x, x, out=derivative).neg_().add_(1).mul_(scale)
        return x.mul_(cap)

    def work(self, rows: Rows) -> Tensor:
        """(n, V) to compute in: the gradient's own memory where it has the right type and layout."""
        if rows.out is not None and _is_matrix(rows.out, self.dtype):
            return rows.out.view(-1, rows.out.shape[-1])
        return self.buffer[: rows.target.shape[0]]

    def store(self, rows: Rows, value: Tensor) -> None:
        assert rows.out is not None
        if not _is_matrix(rows.out, self.dtype):
            rows.out.copy_(value.view(rows.out.shape))

    def zeros(self, rows: Rows | None) -> RowStats:
        """What is said of rows that are all ignored."""
        n = 0 if rows is None else rows.target.shape[0]
        zero, asked = self.buffer.new_zeros(n), n if self.spec.stats else 0
        return RowStats(zero, zero, zero, zero.to(self.wide), zero[:asked], self.target.new_full((asked,), -1).long())


def _is_matrix(chunk: Tensor, dtype: torch.dtype) -> bool:
    """Whether (b, r, V) is (n, V) in memory, in the dtype of the computation."""
    return chunk.dtype == dtype and chunk.is_contiguous()
