# SPDX-License-Identifier: Apache-2.0
"""The row formula for the compact fused head, in chunked PyTorch: `CompactBackend` of `fused_ppl.backends`.

The gradient of a row is its softmax part, dz[v] = (a * p[v] - (a - rest) * [v = y]) * dz/dx, and
-smoothing * w[v] where labels are smoothed. The second part is a product already, and left to the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl.backends.torch_chunks import Chunks, Rows, chain, transform
from fused_ppl.backends.torch_rows import Coefficients, coefficients, exponentials, finish_gradient
from fused_ppl.backends.torch_stats import others_mass, stats_of_others, target_z, without_target
from fused_ppl.records import ColumnSums, KeptColumns, Normalizers, RowFactors, RowStats, Shard, TokenInputs
from fused_ppl.spec import LossSpec


def nll_columns(
    logits: Tensor,  # (R, V): they are not changed
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor,  # (R,) fp32
    signed: bool,
    memory_budget: int | None,
) -> tuple[RowStats, ColumnSums, RowFactors]:
    chunks = Chunks(logits.unsqueeze(0), tokens, spec, memory_budget=memory_budget)
    z_y = target_z(chunks, target_logit)
    found = []

    def parts() -> Iterator[_Part]:
        slope = None if spec.softcap is None else torch.empty_like(chunks.buffer)
        for rows in chunks:
            derivative = None if slope is None else slope[: rows.target.shape[0]]
            of_rows, p, rest = without_target(chunks, rows, target_logit=target_logit, z_y=z_y, derivative=derivative)
            assert p.scale is not None
            found.append(of_rows)
            lse = of_rows.lse(chunks, rows.of(z_y)) if spec.z_loss else None
            yield _Part(rows, p.q, p.scale, rest, lse, derivative)

    columns, factors = _sums(chunks, parts(), signed)
    return stats_of_others(chunks, found, z_y), columns, factors


def nll_columns_shard(
    logits: Tensor,  # (R, V of this shard): they are not changed
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor,  # (R,), for other backends
    normalizers: Normalizers,
    signed: bool,
    memory_budget: int | None,
    shard: Shard,
) -> tuple[ColumnSums, RowFactors]:
    lse, nll = normalizers
    chunks = Chunks(logits.unsqueeze(0), tokens, spec, memory_budget=memory_budget, shard=shard)

    def parts() -> Iterator[_Part]:
        slope = None if spec.softcap is None else torch.empty_like(chunks.buffer)
        for rows in chunks:
            i, y, owned = rows.span, rows.target, rows.owned
            assert owned is not None
            derivative = None if slope is None else slope[: y.shape[0]]
            p = chunks.copy(rows)
            transform(p, chunks.spec, derivative)
            factor = exponentials(p, lse[i], nll[i], p)
            p.scatter_(1, y, p.gather(1, y).masked_fill_(owned.unsqueeze(1), 0))
            yield _Part(rows, p, factor, others_mass(nll[i]), lse[i], derivative)

    return _sums(chunks, parts(), signed)


class _Part(NamedTuple):
    """A chunk of rows whose gradient is added to the column sums."""

    rows: Rows
    p: Tensor  # (n, V): p of the classes that are not the target, up to the factor; it is overwritten
    factor: Tensor  # (n,)
    others: Tensor  # (n,): 1 - p_y
    lse: Tensor | None  # (n,), with z_loss
    derivative: Tensor | None  # (n, V), under a softcap


def _sums(chunks: Chunks, parts: Iterator[_Part], signed: bool) -> tuple[ColumnSums, RowFactors]:
    spec = chunks.spec
    adds = _Accumulated(chunks, signed)
    known = []
    for rows, p, factor, others, lse, derivative in parts:
        grad_lse = 2 * spec.z_loss * lse.to(chunks.dtype) if spec.z_loss and lse is not None else None
        c = coefficients(chunks, rows, grad_s=torch.ones_like(others), grad_lse=grad_lse)
        if derivative is not None:
            p.mul_(derivative)
        if rows.counted is not None:
            p.masked_fill_(~rows.counted.unsqueeze(1), 0)
        of_row = c.a * factor
        if derivative is None and spec.logit_scale != 1:
            of_row.mul_(spec.logit_scale)
        if rows.counted is not None:
            of_row = torch.where(rows.counted, of_row, 0)
        slope_y = None if derivative is None else derivative.gather(1, rows.target).squeeze(1)
        # without a softcap, the sum over a whole row is known already
        others_sum = p.sum(1) * of_row if derivative is not None or rows.owned is not None else None
        known.append(_Known(c.a, c.rest, c.c, others, slope_y, others_sum))
        adds.add(p, of_row)
    columns = adds.sums()
    if not known:
        nothing = chunks.buffer.new_zeros(0)
        return columns, RowFactors(nothing, nothing, nothing, nothing, nothing)
    of_rows = (None if f[0] is None else torch.cat(f) for f in zip(*known, strict=True))
    return columns, _factors(spec, chunks.all_rows, _Known(*of_rows))  # type: ignore[arg-type]  # the first and `others` are there


class _Accumulated:
    """Sums over rows of factor * p, of its absolute value and of its square.

    The sums are in units of about the largest factor, because its square may leave float32. On a CPU each thread adds
    the rows that it has just computed. A matrix-vector product would give each thread some columns, which lie in the
    caches of all threads.
    """

    def __init__(self, chunks: Chunks, signed: bool) -> None:
        num_classes = chunks.logits.shape[-1]
        self.wide, self.on_cpu = chunks.wide, chunks.on_cpu
        self.unit = 0.0 if chunks.on_cpu else 1.0
        self.parts = math.gcd(chunks.rows, torch.get_num_threads()) if chunks.on_cpu else 1
        self.size, self.square = (chunks.buffer.new_zeros(self.parts, 1, num_classes) for _ in range(2))
        self.total = torch.zeros_like(self.size) if signed else None

    def add(self, p: Tensor, factor: Tensor) -> None:
        """Add a chunk. `p` is overwritten."""
        factor = factor / self._unit(factor)
        if self.total is not None:
            self._add(self.total, p, factor)
        self._add(self.size, p, factor.abs())
        self._add(self.square, p.square_(), factor.square())

    def _add(self, sums: Tensor, p: Tensor, factor: Tensor) -> None:
        n, v = p.shape
        parts = self.parts if n % self.parts == 0 else 1
        sums[:parts].baddbmm_(factor.view(parts, 1, -1), p.view(parts, -1, v))

    def _unit(self, factor: Tensor) -> float:
        """The unit, a power of two, so that no digit is lost. It is 1 on a GPU, which would have to be waited for."""
        largest = float(factor.abs().max()) if self.on_cpu and factor.numel() else 0.0
        if 2.0**20 * self.unit < largest < math.inf:
            old, self.unit = self.unit, 2.0 ** math.floor(math.log2(largest))
            for sums, power in ((self.size, 1), (self.square, 2), (self.total, 1)):
                if sums is not None:
                    sums.mul_((old / self.unit) ** power)
        return self.unit or 1.0

    def sums(self) -> ColumnSums:
        size, square, total = (
            None if sums is None else sums.sum(0).squeeze(0).to(self.wide) * self.unit**power
            for sums, power in ((self.size, 1), (self.square, 2), (self.total, 1))
        )
        assert size is not None and square is not None
        return ColumnSums(size, square, size[:0] if total is None else total)


class _Known(NamedTuple):
    """What is known of each row, for its factors."""

    a: Tensor
    rest: Tensor | None
    c: Tensor | None
    others: Tensor  # (R,): 1 - p_y
    slope_y: Tensor | None  # (R,): dz/dx at the target, under a softcap
    others_sum: Tensor | None  # (R,): the row sum without the target, if it is not known already


def _factors(spec: LossSpec, rows: Rows, known: _Known) -> RowFactors:
    a, rest, c, others, slope_y, others_sum = known
    at_target = Coefficients(a, rest, c).at_target(-others)
    at_target = at_target * (spec.logit_scale if slope_y is None else slope_y)
    if rows.owned is not None:
        at_target = torch.where(rows.owned, at_target, 0)
    rest = torch.zeros_like(a) if rest is None else rest
    row_sum = rest * spec.logit_scale if others_sum is None else others_sum + at_target
    smoothing = a[:0] if c is None else c * spec.logit_scale
    if rows.counted is not None:
        a, rest, row_sum, at_target = (torch.where(rows.counted, x, 0) for x in (a, rest, row_sum, at_target))
        smoothing = torch.where(rows.counted, smoothing, 0) if smoothing.numel() else smoothing
    return RowFactors(a, rest, smoothing, row_sum, at_target, () if rows.counted is None else (rows.counted,))


def nll_kept(
    logits: Tensor,  # (R, V): they are not changed
    kept: KeptColumns,
    spec: LossSpec,
    *,
    stats: RowStats,
    factors: RowFactors,
    out: Tensor,  # (R, K)
    memory_budget: int | None,
) -> Tensor:
    assert stats.lse is not None
    chunks, index = _kept_chunks(out, kept, spec, memory_budget), kept.columns
    slope = None if spec.softcap is None else torch.empty_like(chunks.buffer)
    left = []
    for rows in chunks:
        i = rows.span
        derivative = None if slope is None else slope[: rows.target.shape[0]]
        _gather(logits[i], index, out[i])
        p = chunks.copy(rows)
        transform(p, chunks.spec, derivative)
        _mask_ignored(p, factors, i)
        scale = exponentials(p, stats.lse[i], stats.nll[i], p)
        p.mul_((factors.a[i] * scale).unsqueeze(1))
        chain(p, spec, derivative)
        # at the target the factors have the slope of the fp32 logit, which the chunk holds rounded
        at_target = factors.at_target[i].unsqueeze(1)
        if rows.owned is not None:
            at_target = torch.where(rows.owned.unsqueeze(1), at_target, p.gather(1, rows.target))
        p.scatter_(1, rows.target, at_target)
        left.append(factors.row_sum[i] - p.sum(1))
        chunks.store(rows, p)
    return torch.cat(left) if left else factors.a


def nll_rescreen(
    logits: Tensor,  # (R, K): of the kept columns; they become their gradient
    kept: KeptColumns,
    spec: LossSpec,
    *,
    screened: Tensor,  # (R, V): the logits of the screen
    stats: RowStats,  # of the screened logits
    factors: RowFactors,  # of the screened logits
    weight_sum: float | Tensor,  # over all classes
    memory_budget: int | None,
) -> tuple[RowStats, Tensor, Tensor]:
    """`nll_kept` with statistics from a screen, which the kept columns correct.

        1 - p_y  ~  rest of the screen's mass + sum of the kept columns' mass, over exp(lse) of the screen
        nll       = log(1 + that / p_y)

    Returns the statistics, what is left of the row sums, and an estimate of the error of nll, (R,): the rest's share
    times what the kept columns' mass was wrong by. Entropy and argmax stay the screen's.
    """
    assert stats.lse is not None
    chunks, index = _kept_chunks(logits, kept, spec, memory_budget), kept.columns
    slope, other = (torch.empty_like(chunks.buffer) for _ in range(2))
    coarse = screened.new_empty(chunks.buffer.shape)
    parts = []
    for rows in chunks:
        i, n, old = rows.span, rows.target.shape[0], stats.nll[rows.span]
        q, derivative = other[:n], None if spec.softcap is None else slope[:n]
        q.copy_(_gather(screened[i], index, coarse[:n]))
        transform(q, chunks.spec, derivative)
        _mask_ignored(q, factors, i)
        scale = exponentials(q, stats.lse[i], stats.nll[i], q)
        q.scatter_(1, rows.target, 0)
        mass_before = q.sum(1) * scale
        part_before = mass_before * spec.logit_scale if derivative is None else q.mul_(derivative).sum(1) * scale
        p = chunks.copy(rows)
        transform(p, chunks.spec, derivative)
        _mask_ignored(p, factors, i)
        exponentials(p, stats.lse[i], stats.nll[i], p)
        p.scatter_(1, rows.target, 0)
        mass = p.sum(1) * scale
        rest = (others_mass(old) - mass_before).clamp_min_(0)
        nll = torch.nn.functional.softplus((rest + mass).log() + old, threshold=40.0)
        change = torch.where(nll == old, 0, nll - old)  # both are inf if the target is masked
        shrink = 1 - others_mass(change)
        p.mul_((factors.a[i] * shrink * scale).unsqueeze(1))
        c = Coefficients(factors.a[i], factors.rest[i], None)
        finish_gradient(chunks, rows, p, c=c, at_target=c.at_target(-others_mass(nll)), derivative=derivative)
        left = (factors.row_sum[i] - factors.at_target[i] - factors.a[i] * part_before) * shrink
        chunks.store(rows, p)
        wrong = rest * shrink * (mass.log() - mass_before.log()).nan_to_num_(0, 0, 0).abs()
        parts.append((nll, change, left, wrong))
    if not parts:
        return stats, factors.a, factors.a
    nll, change, left, wrong = (torch.cat(x) for x in zip(*parts, strict=True))
    loss = stats.loss + (factors.a - factors.rest) * change
    if factors.smoothing.numel():
        loss = loss + factors.smoothing * (change * weight_sum / spec.logit_scale)
    return stats._replace(nll=nll, lse=stats.lse + change, loss=loss), left, wrong


def _mask_ignored(z: Tensor, factors: RowFactors, rows: slice) -> None:
    """Ignored rows have lse = 0, and e^z of a large bias would be inf there, times a factor of 0. With -inf it is 0."""
    for counted in factors.of_backend:
        z.masked_fill_(~counted[rows].unsqueeze(1), -torch.inf)


def _gather(logits: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Gather the columns. Two-byte values are gathered as int16, because torch 2.13 gathers bf16 through a copy."""
    bits = torch.int16 if logits.element_size() == 2 else logits.dtype
    torch.gather(logits.view(bits), 1, index.expand(out.shape), out=out.view(bits))
    return out


def _kept_chunks(logits: Tensor, kept: KeptColumns, spec: LossSpec, memory_budget: int | None) -> Chunks:
    """The chunks of the kept columns, in place. All rows are taken, because ignored rows have factors of 0."""
    rows, shard = logits.unsqueeze(0), Shard(0, logits.shape[1] + 1)  # column K stands for a target in another shard
    tokens = TokenInputs(kept.place, None, None)
    return Chunks(rows, tokens, spec._replace(ignore_index=None), memory_budget=memory_budget, out=rows, shard=shard)
