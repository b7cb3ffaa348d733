# SPDX-License-Identifier: Apache-2.0
"""Which columns a group of rows keeps, what the rest becomes, and how far that is from what it was.

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

COUNT_STEPS = 64  # sizes of the kept columns on a GPU: few, so that its allocator finds them again
MARGIN = 0.9  # of the tolerance that the kept columns are chosen for: the rank-one term has a length of its own
UNITS = 2**40  # that what may be left out is counted in


class Kept(NamedTuple):
    """The kept columns of a group."""

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
            # its storage is the same, whatever stands for it under torch.compile, and wherever FSDP puts what it holds
            of_weight = _last_steps.setdefault(linear_weight.untyped_storage(), {})
            self.last = of_weight.setdefault((linear_weight.shape, tolerance), _LastSteps())
            self.expected = self.last.count(max(1, linear_weight.shape[0] // COUNT_STEPS))

    def of_group(self, columns: ColumnSums, factors: RowFactors, label: Tensor) -> int | None:
        """The count of a group, or None for all columns. Never less than there are targets."""
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
        """What to keep in the place of `count` columns that left `error` of the gradient's `norm` (both squared):
        `count` where that will do, more where it will not, None for all."""
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
        """Ends the step: sends for what it would have needed."""
        if not self.needs or capturing():
            return
        need = torch.stack(self.needs).amax()
        missed = torch.stack(self.missed).any() if self.missed else torch.zeros_like(need)
        self.last.send(torch.stack([need, missed.to(need.dtype)]))


class _LastSteps:
    """The count that the latest step to have arrived would have needed, and by how much it is to be exceeded: more
    after each step that has missed its tolerance."""

    def __init__(self) -> None:
        self.arrived: int | None = None
        self.factor = 1.25
        self.pending: list[tuple[Tensor, Callable[[], bool]]] = []

    def send(self, need: Tensor) -> None:
        if len(self.pending) < 4:  # a host that is far ahead of the device
            self.pending.append(to_host(need))

    def count(self, step: int) -> int | None:
        """In few different sizes; None where nothing has arrived yet. A graph under capture may ask for no event."""
        while self.pending and not capturing() and self.pending[0][1]():
            self.arrived, missed = self.pending.pop(0)[0].tolist()
            self.factor *= 1.5 if missed else 1
        return None if self.arrived is None else math.ceil(self.arrived * self.factor / step) * step


# by shape and tolerance, of each storage, whose state dies with it: another head may be given its address
_last_steps: Any = WeakIdKeyDictionary()


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def may_wait(tensor: Tensor) -> bool:
    """Whether its numbers may be looked at."""
    return tensor.device.type == "cpu"


def to_host(value: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A number on its way to the host, and whether it has arrived."""
    host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.Event(value.device)
    event.record()
    return host, event.query


def needed(columns: ColumnSums, factors: RowFactors, label: Tensor, tolerance: float) -> Tensor:
    """(): the least number of columns whose rest is short enough, |T| <= tolerance * |G| with some margin."""
    square, allowed = _score(columns, label), (MARGIN * tolerance) ** 2 * norm_square(columns, factors)
    rising = torch.where(square.isinf(), 0, square).sort().values.to(allowed.dtype)
    # in whole units of allowed / UNITS, rounded up: a GPU adds floats in another order each time, whole numbers exactly
    shares = torch.where(rising == 0, 0, rising / allowed).nan_to_num(nan=2, posinf=2).clamp_(max=2)
    dropped = torch.searchsorted(shares.mul_(UNITS).ceil_().long().cumsum(0), UNITS, right=True)
    # targets are at the lower end, as zeros, and always kept
    return torch.maximum(square.numel() - dropped, square.isinf().sum())


def add_repeated(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index[i]] += values[i] in a fixed order, also where an index occurs more than once."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:  # a GPU sorts the indices for this, where index_add_ adds in the order in which threads arrive
        out.index_put_((index,), values, accumulate=True)


def norm_square(columns: ColumnSums, factors: RowFactors) -> Tensor:
    """(): |G|^2 of the group."""
    wide = sum_dtype(columns.square.device)
    return columns.square.sum(dtype=wide) + factors.at_target.to(wide).square().sum()


def keep(columns: ColumnSums, label: Tensor, count: int) -> Kept:
    """The `count` columns with the largest sum of squares, the targets of the rows (at most `count`) among them."""
    chosen = _score(columns, label).topk(count, sorted=False).indices.sort().values
    place = torch.full((columns.square.shape[0] + 1,), count, dtype=torch.int64, device=label.device)
    place[chosen] = torch.arange(count, dtype=torch.int64, device=label.device)
    rest = columns.square.index_fill(0, chosen, 0).sum(dtype=sum_dtype(label.device))
    return Kept(KeptColumns(chosen, place[label]), columns.size.index_fill(0, chosen, 0), rest)


def _score(columns: ColumnSums, label: Tensor) -> Tensor:
    """What is kept first: the targets; V stands for one in another shard of the vocabulary."""
    return torch.nn.functional.pad(columns.square, (0, 1)).index_fill_(0, label, torch.inf)[:-1]


def error_square(kept: Kept, row_sums: Tensor) -> Tensor:
    """(): not less than |T - T'|^2, and little more in a group of many rows.

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
