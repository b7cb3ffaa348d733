# SPDX-License-Identifier: Apache-2.0
"""How the PyTorch backend goes over rows: in chunks that stay in cache, on the caller's own memory where it can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import checks, plan
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import LossSpec, RowStats


class Rows(NamedTuple):
    """One chunk of rows."""

    span: slice  # of the flat rows
    source: Tensor  # (b, r, V), n = b * r: the caller's logits
    out: Tensor | None  # the same place in the gradient
    counted: Tensor | None  # (n,) bool, or None where all rows are known to be counted
    label: Tensor  # (n, 1) int64: the class, 0 where ignored, inside the range everywhere
    target: Tensor  # (n, 1) int64: its column in the source, 0 where it is elsewhere
    owned: Tensor | None  # (n,) bool: whether that column is in the source; None where the source is all classes
    bad: Tensor | None  # (n,) bool: whether the target is out of range; None on a CPU, which has raised
    skipped: bool  # known to hold no counted row


class Walk:
    """Goes over the rows of (B, R, V) in chunks, and holds the buffer that a chunk is computed in."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        spec: LossSpec,
        memory_budget: int | None,
        out: Tensor | None = None,
        columns: tuple[int, int] | None = None,
    ) -> None:
        self.logits, self.target, self.spec, self.out, self.columns = logits, target, spec, out, columns
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.wide = sum_dtype(logits.device)
        self.on_cpu = logits.device.type == "cpu"
        outer, inner, v = logits.shape
        # entropy and the derivative of a cap take a second buffer
        row = self.dtype.itemsize * (1 + (spec.stats or spec.softcap is not None))
        rows = plan.rows_per_chunk(v, row, logits.device.type, torch.get_num_threads(), memory_budget)
        self.rows = min(rows, max(1, outer * inner))
        self.buffer = torch.empty(self.rows, v, dtype=self.dtype, device=logits.device)

    def __iter__(self) -> Iterator[Rows]:
        target, ignore_index, v = self.target, self.spec.ignore_index, self.logits.shape[-1]
        first, num_classes = self.columns or (0, v)
        on_cpu, counted, owned = self.on_cpu, None, None
        label = target.long()
        if on_cpu or checks.debug():
            low, high = checks.check_target_range(target, num_classes, ignore_index)
        if ignore_index is not None and not (on_cpu and not low <= ignore_index <= high):
            counted = target != ignore_index
            label = label * counted
        if not on_cpu:
            label = label.clamp(0, num_classes - 1)
        column = label
        if self.columns is not None:
            owned = (label >= first) & (label < first + v)
            column = (label - first) * owned
        label, column = label.unsqueeze(1), column.unsqueeze(1)
        bad = None if on_cpu else self.out_of_range()
        for b, r, i in plan.row_chunks(self.logits.shape[0], self.logits.shape[1], self.rows):
            out = None if self.out is None else self.out[b, r]
            mine = None if counted is None else counted[i]
            skipped = False
            if mine is not None and on_cpu:
                any_, all_ = bool(mine.any()), bool(mine.all())
                mine, skipped = None if all_ else mine, not any_
            here, wrong = (None if mask is None else mask[i] for mask in (owned, bad))
            yield Rows(i, self.logits[b, r], out, mine, label[i], column[i], here, wrong, skipped)

    def out_of_range(self) -> Tensor:
        """(N,) bool: targets that are neither a class nor ignored."""
        num_classes = self.columns[1] if self.columns else self.logits.shape[-1]
        bad = (self.target < 0) | (self.target >= num_classes)
        return bad if self.spec.ignore_index is None else bad & (self.target != self.spec.ignore_index)

    def load(self, rows: Rows, derivative: Tensor | None = None) -> Tensor:
        """z of the rows, (n, V): the caller's own memory, which stays as it is, where nothing has to be done to it."""
        if self.spec.logit_scale == 1 and self.spec.softcap is None and _is_matrix(rows.source, self.dtype):
            return rows.source.view(-1, rows.source.shape[-1])
        x = self.buffer[: rows.target.shape[0]]
        x.view(rows.source.shape).copy_(rows.source)
        self.transform(x, derivative)
        return x

    def copy(self, rows: Rows) -> Tensor:
        """The logits of the rows where they can be computed in: in place in a buffer of the right type."""
        x = self.work(rows)
        if not _is_matrix(rows.source, self.dtype):
            x.view(rows.source.shape).copy_(rows.source)
        return x

    def transform(self, x: Tensor, derivative: Tensor | None) -> None:
        """z = cap(scale * x) in place; `derivative` takes dz/dx where a cap makes it depend on x."""
        scale, cap = self.spec.logit_scale, self.spec.softcap
        if cap is None:
            if scale != 1:
                x.mul_(scale)
            return
        x.mul_(scale / cap).tanh_()
        if derivative is not None:
            torch.mul(x, x, out=derivative).neg_().add_(1).mul_(scale)
        x.mul_(cap)

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
        asked = n if self.spec.stats else 0
        loss, weight, nll = (self.buffer.new_zeros(n) for _ in range(3))
        lse = self.buffer.new_zeros(n, dtype=self.wide)
        predicted = self.target.new_full((asked,), -1, dtype=torch.int64)
        return RowStats(loss, weight, nll, lse, self.buffer.new_zeros(asked), predicted)


def _is_matrix(chunk: Tensor, dtype: torch.dtype) -> bool:
    """Whether (b, r, V) is (n, V) in memory, in the dtype of the computation."""
    return chunk.dtype == dtype and chunk.is_contiguous()
