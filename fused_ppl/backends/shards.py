# SPDX-License-Identifier: Apache-2.0
"""Merges the row statistics of vocabulary shards, by a maximum and a sum over the ranks that hold them.

    M = max m,    s = sum_r s_r e^(m_r - M),    nll = log(1 + s e^(M - z_y)),    lse = log(s e^M + e^z_y)

All in float64 over (N, few), for every backend: fields as `nll_forward_shard` gives them. The target is kept apart
from the sums, so that nll loses nothing where the target holds nearly all of the mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl.records import RowStats, TokenInputs
from fused_ppl.spec import LossSpec

LOWEST = -1e30  # the maximum of a shard that holds nothing but -inf; a difference of two is finite
_INDEX_BITS = 29  # the bits of a float64 that a float32 does not use


CHECKS = 4  # rows after the N rows


def maxima(shards: Tensor, target: Tensor, spec: LossSpec, *, first: int, layout: int) -> Tensor:
    """(N + 4, 1 or 2): the largest z of each row and, packed with it, its class. Ranks take the maximum.

    The last four rows hold `layout`, a sum of the targets, and the negatives of both. If all ranks mean the same shards
    and the same tokens, the maxima of a value and of its negative cancel.
    """
    m = shards[:, 0]
    columns = [m] if not spec.stats else [m, _pack(m, shards[:, 5] + first)]
    rows = torch.stack(columns, 1)
    place = torch.arange(1, target.shape[0] + 1, dtype=torch.int64, device=target.device)
    tokens = ((target.long() + 1) * (place * 40503)).sum() & (2**52 - 1)
    check = torch.stack((torch.full_like(tokens, layout), tokens)).to(rows.dtype)
    return torch.cat((rows, torch.cat((check, -check)).unsqueeze(1).expand(CHECKS, rows.shape[1])))


def same(top: Tensor) -> Tensor:
    """(2,) bool: True if all ranks mean the same shards; True if they mean the same tokens."""
    check = top[-CHECKS:, 0]
    return check[:2] == -check[2:]


def sums(shards: Tensor, top: Tensor, spec: LossSpec) -> Tensor:
    """(N, 2 to 4), which ranks add: s, z_y, sum w z with smoothing, and the sum of the entropy with statistics."""
    m, s, z, d, q, _ = shards.unbind(1)
    shift = m - top[:-CHECKS, 0]
    scale = shift.exp()
    columns = [s * scale, z]
    if spec.label_smoothing:
        columns.append(d)
    if spec.stats:
        columns.append(scale * (q + s * shift))
    return torch.stack(columns, 1)


def merge(
    top: Tensor,  # (N + 4, 1 or 2): `maxima` of all ranks
    added: Tensor,  # (N, 2 to 4): `sums` of all ranks
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    num_classes: int,
    dtype: torch.dtype,
) -> RowStats:
    """The statistics of rows over all classes."""
    target, weight, token_weight = tokens
    columns = iter(added.unbind(1))  # in the order of `sums`
    others, z = next(columns), next(columns)
    m = top[:-CHECKS, 0]
    log_others = others.log() + m
    nll = torch.nn.functional.softplus(log_others - z, threshold=40.0)
    lse = torch.logaddexp(log_others, z)
    counted = torch.ones_like(target, dtype=torch.bool) if spec.ignore_index is None else target != spec.ignore_index
    # NaN for +inf as in PyTorch, for a target out of range, and if ranks disagree; a CPU has raised for the last two
    wrong = (z == torch.inf) | (target < 0) | (target >= num_classes) | ~same(top).all()
    nll, lse = (t.masked_fill(wrong, torch.nan) for t in (nll, lse))
    label = (target.long() * counted).clamp(0, num_classes - 1)
    of_target = lse.new_ones(()) if weight is None else weight[label].to(lse.dtype)
    u = lse.new_ones(()) if token_weight is None else token_weight.to(lse.dtype)
    loss = of_target * nll
    a = spec.label_smoothing
    if a:
        total = num_classes if weight is None else weight.sum(dtype=lse.dtype)
        loss = (1 - a) * loss + a / num_classes * (total * lse - next(columns) - of_target * z)
    entropy = predicted = None
    if spec.stats:
        below = (z - m).clamp(min=-1e3)  # e^-1000 is 0, and 0 * -inf would be NaN
        share = below.exp()
        entropy = (lse - m) - (next(columns) + share * below) / (others + share)
        predicted = _unpack(top[:-CHECKS, 1])
    weights = (u * of_target).expand(target.shape)
    asked = (None if entropy is None else entropy.to(dtype), predicted)
    rows = RowStats((u * loss).to(dtype), weights.to(dtype), nll.to(dtype), lse, *asked)
    return rows.map(lambda t, ignored: torch.where(counted, t, ignored))


def _pack(value: Tensor, column: Tensor) -> Tensor:
    """One float64 that is larger for a larger value, and among equal ones for a lower column.

    The value is rounded to float32, which leaves 29 bits for the column. A positive number grows with these bits, so
    they hold the column counted down. A negative number shrinks, so they hold the column itself.
    """
    rounded = value.clamp(-3e38, 3e38).float().double()
    rounded = torch.where(rounded == 0, 2.0**-160, rounded)  # the bits of 0 and -0 differ
    low = 2**_INDEX_BITS - 1
    index = column.long()
    return (rounded.view(torch.int64) | torch.where(rounded < 0, index, low - index)).view(torch.float64)


def _unpack(packed: Tensor) -> Tensor:
    low = 2**_INDEX_BITS - 1
    index = packed.contiguous().view(torch.int64) & low
    return torch.where(packed < 0, index, low - index)
