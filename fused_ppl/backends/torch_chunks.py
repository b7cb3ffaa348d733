# SPDX-License-Identifier: Apache-2.0
"""The loop of the PyTorch backend over chunks of rows that stay in cache, and the transform z = cap(scale * x).

A chunk is computed in the caller's memory if that is contiguous and of the right dtype, else in a shared buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import checks, plan
from fused_ppl.records import RowStats, Shard, TokenInputs
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import LossSpec


class Rows(NamedTuple):
    """One chunk of rows."""

    span: slice  # of the flat rows
    source: Tensor  # (b, r, V) or (n, V), n = b * r: the caller's logits
    out: Tensor | None  # the same rows of the gradient
    counted: Tensor | None  # (n,) bool, or None if all rows are counted
    label: Tensor  # (n,) int64: the class, 0 if ignored; always inside the range
    target: Tensor  # (n, 1) int64: its column in the source, 0 if another shard has it
    owned: Tensor | None  # (n,) bool: True if the source has that column; None if it has all classes
    bad: Tensor | None  # (n,) bool: True if the target is out of range; None on a CPU, which has raised
    skipped: bool  # True if no row is counted
    whole: bool  # True if this chunk is all rows

    def of(self, values: Tensor) -> Tensor:
        """The values (N,) of these rows. One chunk is not sliced, because that takes as long as a small loss."""
        return values if self.whole or values.ndim == 0 else values[self.span]


class Chunks:
    """Iterates over the rows of (B, R, V) or (N, V) in chunks, and holds the buffer of a chunk."""

    def __init__(
        self,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        *,
        memory_budget: int | None,
        out: Tensor | None = None,
        shard: Shard | None = None,
        keep_lse: bool = True,
    ) -> None:
        self.logits, self.tokens, self.spec, self.out, self.shard = logits, tokens, spec, out, shard
        self.keep_lse = keep_lse or spec.stats or spec.z_loss > 0
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.wide = sum_dtype(logits.device)
        self.on_cpu = logits.device.type == "cpu"
        v = logits.shape[-1]
        self.num_classes = v if shard is None else shard.num_classes
        self.weight = None if tokens.weight is None else tokens.weight.to(self.dtype)  # of all classes
        # entropy and the derivative of the softcap need a second buffer
        row = self.dtype.itemsize * (1 + (spec.stats or spec.softcap is not None))
        rows = plan.rows_per_chunk(
            v, row, logits.device.type, threads=torch.get_num_threads(), memory_budget=memory_budget
        )
        self._buffer: Tensor | None = None
        self.shape = (1, logits.shape[0]) if logits.ndim == 2 else logits.shape[:2]
        self.rows = min(rows, max(1, self.shape[0] * self.shape[1]))

    @property
    def buffer(self) -> Tensor:
        """(rows, V), allocated at the first use: a small float32 loss does not need it."""
        if self._buffer is None:
            self._buffer = torch.empty(self.rows, self.logits.shape[-1], dtype=self.dtype, device=self.logits.device)
        return self._buffer

    @property
    def own_weight(self) -> Tensor | None:
        """(V,): the weights of the classes of the logits."""
        if self.weight is None or self.shard is None:
            return self.weight
        return self.weight[self.shard.first : self.shard.first + self.logits.shape[-1]]

    def target_weight(self, rows: Rows) -> Tensor | None:
        """(n,): the class weight of each target."""
        return None if self.weight is None else self.weight[rows.label]

    def token_weight(self, rows: Rows) -> Tensor | None:
        """(n,): the token weight of each row."""
        weight = self.tokens.token_weight
        return None if weight is None else rows.of(weight).to(self.dtype)

    @functools.cached_property
    def all_rows(self) -> Rows:
        """All rows as one chunk."""
        target, ignore_index, num_classes = self.tokens.target, self.spec.ignore_index, self.num_classes
        counted, owned = None, None
        label = target.long()
        if self.on_cpu or checks.debug():
            low, high = checks.check_target_range(target, num_classes, ignore_index)
        if ignore_index is not None and not (self.on_cpu and not low <= ignore_index <= high):
            counted = target != ignore_index
            label = label * counted
        if not self.on_cpu:
            label = label.clamp(0, num_classes - 1)
        column = label
        if self.shard is not None:
            first = self.shard.first
            owned = (label >= first) & (label < first + self.logits.shape[-1])
            column = (label - first) * owned
        bad = None if self.on_cpu else self.out_of_range()
        return Rows(slice(None), self.logits, self.out, counted, label, column.unsqueeze(1), owned, bad, False, True)

    def __iter__(self) -> Iterator[Rows]:
        outer, inner = self.shape
        every, whole = self.all_rows, 0 < outer * inner <= self.rows
        for b, r, i in plan.row_chunks(outer, inner, self.rows):
            rows = every
            if not whole:
                place = i if self.logits.ndim == 2 else (b, r)
                out = None if every.out is None else every.out[place]
                masks = (every.counted, every.owned, every.bad)
                counted, owned, bad = (None if mask is None else mask[i] for mask in masks)
                of_target = every.label[i], every.target[i]
                rows = Rows(i, every.source[place], out, counted, *of_target, owned, bad, False, False)
            if rows.counted is not None and self.on_cpu:
                any_, all_ = bool(rows.counted.any()), bool(rows.counted.all())
                rows = rows._replace(counted=None if all_ else rows.counted, skipped=not any_)
            yield rows

    def out_of_range(self) -> Tensor:
        """(N,) bool: targets that are neither a class nor ignored."""
        target = self.tokens.target
        bad = (target < 0) | (target >= self.num_classes)
        return bad if self.spec.ignore_index is None else bad & (target != self.spec.ignore_index)

    def load(self, rows: Rows, derivative: Tensor | None = None) -> Tensor:
        """z of the rows, (n, V). It is the caller's own memory, and read only, if x needs no transform."""
        if self.spec.logit_scale == 1 and self.spec.softcap is None and _is_matrix(rows.source, self.dtype):
            return _matrix(rows.source)
        x = self._buffer_of(rows)
        x.view(rows.source.shape).copy_(rows.source)
        transform(x, self.spec, derivative)
        return x

    def copy(self, rows: Rows) -> Tensor:
        """The logits of the rows in memory that may be written to: in place if the caller gave its buffer away."""
        x = self.work(rows)
        if self.out is not self.logits or not _is_matrix(rows.source, self.dtype):
            x.view(rows.source.shape).copy_(rows.source)
        return x

    def work(self, rows: Rows) -> Tensor:
        """(n, V) to compute in: the memory of the gradient if its dtype and layout allow it, else the buffer."""
        if rows.out is not None and _is_matrix(rows.out, self.dtype):
            return _matrix(rows.out)
        return self._buffer_of(rows)

    def _buffer_of(self, rows: Rows) -> Tensor:
        n = rows.target.shape[0]
        return self.buffer if n == self.rows else self.buffer[:n]

    def store(self, rows: Rows, value: Tensor) -> None:
        assert rows.out is not None
        if not _is_matrix(rows.out, self.dtype):
            rows.out.copy_(value.view(rows.out.shape))

    def zeros(self, rows: Rows | None) -> RowStats:
        """The statistics of rows that are all ignored."""
        n = 0 if rows is None else rows.target.shape[0]
        loss, weight, nll = (self.buffer.new_zeros(n) for _ in range(3))
        lse = self.buffer.new_zeros(n, dtype=self.wide) if self.keep_lse else None
        if not self.spec.stats:
            return RowStats(loss, weight, nll, lse, None, None)
        return RowStats(loss, weight, nll, lse, nll.clone(), self.tokens.target.new_full((n,), -1, dtype=torch.int64))


def transform(x: Tensor, spec: LossSpec, derivative: Tensor | None = None) -> Tensor:
    """z = cap(scale * x) in place, cap(a) = softcap * tanh(a / softcap). `derivative` takes dz/dx under a softcap.

    dz/dx = scale * (1 - tanh(scale * x / softcap)^2)
    """
    scale, cap = spec.logit_scale, spec.softcap
    if cap is None:
        return x if scale == 1 else x.mul_(scale)
    x.mul_(scale / cap).tanh_()
    if derivative is not None:
        torch.mul(x, x, out=derivative).neg_().add_(1).mul_(scale)
    return x.mul_(cap)


def chain(gradient: Tensor, spec: LossSpec, derivative: Tensor | None) -> None:
    """The gradient of x in place, from the one of z and the `derivative` of `transform`."""
    if derivative is not None:
        gradient.mul_(derivative)
    elif spec.logit_scale != 1:
        gradient.mul_(spec.logit_scale)


def _matrix(chunk: Tensor) -> Tensor:
    return chunk if chunk.ndim == 2 else chunk.view(-1, chunk.shape[-1])


def _is_matrix(chunk: Tensor, dtype: torch.dtype) -> bool:
    """True if (b, r, V) is (n, V) in memory, in the dtype of the computation."""
    return chunk.dtype == dtype and chunk.is_contiguous()
