# SPDX-License-Identifier: Apache-2.0
"""The row formula in chunked PyTorch: any device, any dtype, nothing of size N x V.

A chunk of rows is copied into an fp32 buffer that stays in cache, and aten's log_softmax / softmax work on it in
place. Interface and shapes: `fused_ppl.backends`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import checks, plan
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import LossSpec, RowStats, Totals


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Rows(NamedTuple):
    """The rows of one chunk."""

    index: slice  # of the flat rows
    source: Tensor  # (b, r, V), n = b * r: the caller's logits
    out: Tensor | None  # the same place in the gradient
    counted: Tensor  # (n,) bool
    all_counted: bool  # known on a CPU; False elsewhere, where asking would synchronise
    target: Tensor  # (n, 1) int64, 0 where ignored or out of range


def nll_forward(
    logits: Tensor,  # (B, R, V)
    target: Tensor,  # (N,)
    spec: LossSpec,
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    num_items: Tensor | None,
    memory_budget: int | None = None,
) -> tuple[RowStats, Totals | None]:
    """nll, lse and the rows' parts of S and M; entropy and argmax on request."""
    n, v, a = target.numel(), logits.shape[-1], spec.label_smoothing
    dtype = compute_dtype(logits.dtype)
    row = {"dtype": dtype, "device": logits.device}
    stats = RowStats(
        loss=torch.zeros(n, **row),
        count=torch.zeros(n, **row),
        nll=torch.zeros(n, **row),
        lse=torch.zeros(n, dtype=sum_dtype(logits.device), device=logits.device),
        entropy=torch.zeros(n if spec.stats else 0, **row),
        predicted=torch.full((n if spec.stats else 0,), -1, dtype=torch.int64, device=logits.device),
    )
    w = None if weight is None else weight.to(dtype)
    scratch = _Scratch(logits, memory_budget)
    for rows in scratch.chunks(logits, target, spec):
        i, y = rows.index, rows.target
        z, logp = scratch.load(rows, spec), scratch.work(rows)
        target_logit = z.gather(1, y).squeeze(1)
        if spec.stats:
            stats.predicted[i] = _keep(rows, z.argmax(1), -1)
        torch.log_softmax(z, 1, out=logp)
        nll = logp.gather(1, y).squeeze(1).neg_()
        loss = nll if not a else (1 - a) * nll
        count = None if token_weight is None else token_weight[i].to(dtype)
        if w is not None:
            of_target = w[y.squeeze(1)]
            loss = loss * of_target
            count = of_target if count is None else of_target * count
        if a:
            loss = loss - (a / v) * (logp.sum(1) if w is None else logp @ w)
        if token_weight is not None:
            loss = loss * token_weight[i].to(dtype)
        if spec.stats:
            p = logp.exp()
            stats.entropy[i] = _keep(rows, p.mul_(logp.clamp_(min=torch.finfo(dtype).min)).sum(1).neg_(), 0)
        stats.loss[i] = _keep(rows, loss, 0)
        stats.count[i] = rows.counted if count is None else _keep(rows, count, 0)
        stats.nll[i] = _keep(rows, nll, 0)
        stats.lse[i] = _keep(rows, target_logit.to(stats.lse.dtype) + nll, 0)
    _mark_out_of_range(stats, target, v, spec)
    return stats, None


def nll_backward(
    logits: Tensor,  # (B, R, V)
    target: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    nll: Tensor,  # (N,)
    of_s: Tensor,  # (N,): upstream gradient of S
    of_z: Tensor,  # (N,): upstream gradient of Z
    spec: LossSpec,
    weight: Tensor | None,
    token_weight: Tensor | None,
    out: Tensor,  # (B, R, V): a buffer, or the logits themselves
    memory_budget: int | None = None,
) -> None:
    """dz[i, v] = p * A[i] - C[i] * w[v] - B[i] * [v = y[i]], times scale * (1 - (z / cap)^2), into `out`."""
    v, a = logits.shape[-1], spec.label_smoothing
    dtype = compute_dtype(logits.dtype)
    w = None if weight is None else weight.to(dtype)
    w_sum = v if w is None else w.sum()
    scratch = _Scratch(logits, memory_budget)
    slope = None if spec.softcap is None else torch.empty_like(scratch.buffer)
    for rows in scratch.chunks(logits, target, spec, out):
        i, y = rows.index, rows.target
        derivative = None if slope is None else slope[: rows.counted.shape[0]]
        z, p = scratch.load(rows, spec, derivative), scratch.work(rows)
        torch.softmax(z, 1, out=p)

        of_target = of_s[i] if w is None else of_s[i] * w[y.squeeze(1)]  # g * w[y]
        of_norm = None if not spec.z_loss else 2 * spec.z_loss * lse[i].to(dtype) * of_z[i]
        if of_norm is not None and w is not None:
            of_norm = of_norm * w[y.squeeze(1)]
        spread = None if not a else of_s[i] * (a / v)
        if token_weight is not None:
            u = token_weight[i].to(dtype)
            of_target = of_target * u
            of_norm = None if of_norm is None else of_norm * u
            spread = None if spread is None else spread * u
        b = of_target if not a else (1 - a) * of_target
        # A - B, kept apart so that a target with p -> 1 loses no digits: p * A - B = A * expm1(-nll) + (A - B)
        rest = None if spread is None else spread * w_sum
        if of_norm is not None:
            rest = of_norm if rest is None else rest + of_norm
        big_a = b if rest is None else b + rest
        at_target = big_a * torch.expm1(-nll[i]) if rest is None else big_a * torch.expm1(-nll[i]) + rest
        p.mul_(big_a.unsqueeze(1))
        p.scatter_(1, y, at_target.unsqueeze(1))
        if spread is not None:
            p.sub_(spread.unsqueeze(1)) if w is None else p.addcmul_(spread.unsqueeze(1), w, value=-1)
        if derivative is not None:
            p.mul_(derivative)
        elif spec.logit_scale != 1:
            p.mul_(spec.logit_scale)
        if not rows.all_counted:
            p.masked_fill_(~rows.counted.unsqueeze(1), 0)
        scratch.store(rows, p)


def _transform_(x: Tensor, spec: LossSpec, derivative: Tensor | None = None) -> None:
    """z = cap(scale * x) in place; its derivative into `derivative` where a cap makes it depend on x."""
    if spec.softcap is None:
        if spec.logit_scale != 1:
            x.mul_(spec.logit_scale)
        return
    x.mul_(spec.logit_scale / spec.softcap).tanh_()
    if derivative is not None:
        torch.mul(x, x, out=derivative).neg_().add_(1).mul_(spec.logit_scale)
    x.mul_(spec.softcap)


def _keep(rows: Rows, value: Tensor, ignored: float) -> Tensor:
    return value if rows.all_counted else torch.where(rows.counted, value, ignored)


def _mark_out_of_range(stats: RowStats, target: Tensor, num_classes: int, spec: LossSpec) -> None:
    """On a GPU an out-of-range target gives NaN; on a CPU it has raised already."""
    if target.device.type == "cpu":
        return
    bad = (target < 0) | (target >= num_classes)
    if spec.ignore_index is not None:
        bad &= target != spec.ignore_index
    for t in (stats.loss, stats.nll, stats.lse):
        t.masked_fill_(bad, float("nan"))


class _Scratch:
    """The walk over the rows, and the buffer that a chunk is loaded into."""

    def __init__(self, logits: Tensor, memory_budget: int | None) -> None:
        dtype, device = compute_dtype(logits.dtype), logits.device
        outer, inner, v = logits.shape
        rows = plan.rows_per_chunk(v, dtype.itemsize, device.type, torch.get_num_threads(), memory_budget)
        self.rows = min(rows, max(1, outer * inner))
        self.buffer = torch.empty(self.rows, v, dtype=dtype, device=device)

    def chunks(self, logits: Tensor, target: Tensor, spec: LossSpec, out: Tensor | None = None) -> Iterator[Rows]:
        """The chunks that hold a counted row; the gradient of the others is zeroed."""
        v = logits.shape[-1]
        on_cpu = logits.device.type == "cpu"
        if on_cpu or checks.debug():
            checks.check_target_range(target, v, spec.ignore_index)
        if spec.ignore_index is None:
            counted, index = torch.ones_like(target, dtype=torch.bool), target.long()
        else:
            counted = target != spec.ignore_index
            index = torch.where(counted, target, 0).long()
        index = index.clamp_(0, v - 1).unsqueeze(1)
        every = on_cpu and (spec.ignore_index is None or bool(counted.all()))
        for b, r, i in plan.row_chunks(logits.shape[0], logits.shape[1], self.rows):
            source, mine = logits[b, r], counted[i]
            grad = None if out is None else out[b, r]
            if on_cpu and not every and not bool(mine.any()):
                if grad is not None:
                    grad.zero_()
                continue
            yield Rows(i, source, grad, mine, every or (on_cpu and bool(mine.all())), index[i])

    def load(self, rows: Rows, spec: LossSpec, derivative: Tensor | None = None) -> Tensor:
        """z of the rows, (n, V): the caller's own memory where nothing has to be done to it."""
        plain = spec.softcap is None and spec.logit_scale == 1
        if plain and rows.source.dtype == self.buffer.dtype:
            view = _matrix(rows.source, rows)
            if view is not None:
                return view
        x = self.buffer[: rows.counted.shape[0]]
        x.view(rows.source.shape).copy_(rows.source)
        if not plain:
            _transform_(x, spec, derivative)
        return x

    def work(self, rows: Rows) -> Tensor:
        """(n, V) to compute in: the gradient's own memory where it has the right type and layout."""
        if rows.out is not None and rows.out.dtype == self.buffer.dtype:
            view = _matrix(rows.out, rows)
            if view is not None:
                return view
        return self.buffer[: rows.counted.shape[0]]

    @staticmethod
    def store(rows: Rows, value: Tensor) -> None:
        assert rows.out is not None
        if value.data_ptr() != rows.out.data_ptr():
            rows.out.copy_(value.view(rows.out.shape))


def _matrix(chunk: Tensor, rows: Rows) -> Tensor | None:
    """(b, r, V) as (n, V), where that is contiguous."""
    return chunk.view(rows.counted.shape[0], chunk.shape[-1]) if chunk.is_contiguous() else None
