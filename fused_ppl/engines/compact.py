# SPDX-License-Identifier: Apache-2.0
"""Which columns a group of rows keeps, what replaces the other columns, and the error of that.

The gradient of a group is its kept columns J, exact, and T elsewhere, in the place of which stands the product of its
row sums and its column sums, T' = d c^T / s. Sums are float64 where the device has it. The derivation: docs/compact.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fused_ppl.records import ColumnSums, KeptColumns, RowFactors
from fused_ppl.reduction import sum_dtype

COUNT_STEPS = 64  # different numbers of kept columns on a GPU: few, so that its allocator can reuse buffers
MARGIN = 0.9  # part of the tolerance that the dropped columns may take; the rest is for the rank-one term
UNITS = 2**40  # the allowed error as an integer: sums of integers are the same in any order


class Kept(NamedTuple):
    """The kept columns of a group, and the sums of the other columns, T."""

    kept: KeptColumns
    tail: Tensor  # (V,): the column sums of |T|, 0 in the kept columns
    tail_square: Tensor  # (): |T|^2


class Choice:
    """How many columns each group of a step keeps.

    On a CPU a tolerance is met group by group: the least count that will do, or all columns. A GPU is not waited for:
    there each step measures the count that it would have needed, on the device, and a later step, which finds that
    number on the host, takes it with a margin. The first steps, and those after a need of more than `most`, are exact.
    """

    def __init__(self, linear_weight: Tensor, tolerance: float | None, most: int) -> None:
        self.tolerance, self.most, self.waits = tolerance, most, may_wait(linear_weight)
        self.needs: list[Tensor] = []
        self.missed: list[Tensor] = []
        if tolerance is not None and not self.waits:
            # the storage stays the same under torch.compile and FSDP, which replace the tensor object
            of_weight = _last_steps.setdefault(linear_weight.untyped_storage(), {})
            self.last = of_weight.setdefault((linear_weight.shape, tolerance), _LastSteps())
            self.expected = self.last.count(max(1, linear_weight.shape[0] // COUNT_STEPS))

    def of_group(self, columns: ColumnSums, factors: RowFactors, label: Tensor) -> int | None:
        """The number of columns that a group keeps, at least one per row, or None for all columns."""
        least = min(label.shape[0], columns.square.shape[0])
        if self.tolerance is None:
            return max(self.most, least)
        need = needed(columns, factors, label, self.tolerance)
        if self.waits:
            count = max(int(need), 1)
        else:
            self.needs.append(need)
            if self.expected is None:
                return None
            count = max(self.expected, least)
        return None if count > self.most else count

    def after(self, count: int, error: Tensor, norm: Tensor) -> int | None:
        """The number of columns to keep after `count` columns gave `error` (squared, like `norm`).

        `count` means that it is enough, a larger number that the group is done again, and None that all are needed.
        """
        if self.tolerance is None:
            return count
        missed = error > self.tolerance**2 * norm
        if not self.waits:
            self.missed.append(missed.reshape(()))
            return count
        if not bool(missed):
            return count
        more = count + max(1, count // 2)
        return more if more <= self.most else None

    def report(self) -> None:
        """End the step: send to the host how many columns it would have needed."""
        if not self.needs or capturing():
            return
        need = torch.stack(self.needs).amax()
        missed = torch.stack(self.missed).any() if self.missed else torch.zeros_like(need)
        self.last.send(torch.stack([need, missed.to(need.dtype)]))


class _LastSteps:
    """The number of columns that the latest step on the host would have needed, and a safety factor.

    The factor grows after each step that missed its tolerance.
    """

    def __init__(self) -> None:
        self.arrived: int | None = None
        self.factor = 1.25
        self.pending: list[tuple[Tensor, Callable[[], bool]]] = []

    def send(self, need: Tensor) -> None:
        if len(self.pending) < 4:  # the host may be far ahead of the device
            self.pending.append(to_host(need))

    def count(self, step: int) -> int | None:
        """The number of columns for this step, a multiple of `step`; None if no earlier step has arrived."""
        while self.pending and not capturing() and self.pending[0][1]():
            self.arrived, missed = self.pending.pop(0)[0].tolist()
            self.factor *= 1.5 if missed else 1
        return None if self.arrived is None else math.ceil(self.arrived * self.factor / step) * step


# by storage, then by shape and tolerance. An entry dies with its storage, whose address another head may get
_last_steps: Any = WeakIdKeyDictionary()


def capturing() -> bool:
    """True if a CUDA graph records what is launched."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def may_wait(tensor: Tensor) -> bool:
    """True if reading a number of the tensor waits for no device."""
    return tensor.device.type == "cpu"


def to_host(value: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A copy of the number to the host that has begun, and a function that says whether it has ended."""
    host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.Event(value.device)
    event.record()
    return host, event.query


def needed(columns: ColumnSums, factors: RowFactors, label: Tensor, tolerance: float) -> Tensor:
    """(): the smallest number of columns that leaves |T| <= MARGIN * tolerance * |G|."""
    square, allowed = _score(columns, label), (MARGIN * tolerance) ** 2 * norm_square(columns, factors)
    rising = torch.where(square.isinf(), 0, square).sort().values.to(allowed.dtype)
    # in units of allowed / UNITS, rounded up: a GPU adds floats in changing order, and integers exactly
    shares = torch.where(rising == 0, 0, rising / allowed).nan_to_num(nan=2, posinf=2).clamp_(max=2)
    dropped = torch.searchsorted(shares.mul_(UNITS).ceil_().long().cumsum(0), UNITS, right=True)
    # targets count as zero, so they are at the lower end; they are always kept
    return torch.maximum(square.numel() - dropped, square.isinf().sum())


def add_repeated(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index[i]] += values[i] in a fixed order, also where an index occurs more than once."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:  # on a GPU index_put_ sorts the indices first, while index_add_ adds in the order of threads
        out.index_put_((index,), values, accumulate=True)


def norm_square(columns: ColumnSums, factors: RowFactors) -> Tensor:
    """(): |G|^2 of the group."""
    wide = sum_dtype(columns.square.device)
    return columns.square.sum(dtype=wide) + factors.at_target.to(wide).square().sum()


def keep(columns: ColumnSums, label: Tensor, count: int) -> Kept:
    """Keep the targets of the rows, and of the other columns those with the largest sums of squares, `count` in all."""
    chosen = _score(columns, label).topk(count, sorted=False).indices.sort().values
    place = torch.full((columns.square.shape[0] + 1,), count, dtype=torch.int64, device=label.device)
    place[chosen] = torch.arange(count, dtype=torch.int64, device=label.device)
    rest = columns.square.index_fill(0, chosen, 0).sum(dtype=sum_dtype(label.device))
    return Kept(KeptColumns(chosen, place[label]), columns.size.index_fill(0, chosen, 0), rest)


def _score(columns: ColumnSums, label: Tensor) -> Tensor:
    """(V,): the sums of squares, inf at the targets. A label of V is in another shard of the vocabulary."""
    return torch.nn.functional.pad(columns.square, (0, 1)).index_fill_(0, label, torch.inf)[:-1]


def error_square(kept: Kept, row_sums: Tensor) -> Tensor:
    """(): an upper bound of |T - T'|^2, close to it in a group of many rows.

        |T - T'|^2 = |T|^2 + |d|^2 |c|^2 / s^2 - 2 d^T T c / s

    over |T|, because all of a row has one sign. The last term is s times a mean of d[i] c[v] under the weights
    |T[i,v]| / s, and no mean is less than the geometric one, which the sums d and c give.
    """
    wide = kept.tail_square.dtype
    d, c = row_sums.to(wide).abs(), kept.tail.to(wide)
    s = c.sum()
    inner = (_mean_log(d, s) + _mean_log(c, s)).exp()
    cross = d.square().sum() * c.square().sum() / s.square()
    return torch.where(s > 0, kept.tail_square + cross - 2 * inner, kept.tail_square).clamp_min(0)


def _mean_log(x: Tensor, total: Tensor) -> Tensor:
    summed: Tensor = torch.special.xlogy(x, x).sum()
    return summed / total
