# SPDX-License-Identifier: Apache-2.0
"""What a teacher that names only its K most likely classes says of all classes, for every backend.

Spread evenly, the tail gives the teacher a probability for every class, and so it has logits.

Merged into one class, it gives both predictions K + 1 classes. z of the student and s = log sum_rest exp(z_v) are the
logits of one. g is the gradient by these K + 1 logits. The gradient by z follows from ds/dz_v = exp(z_v - s):

    dD/dz_k = g_k for a named class,    dD/dz_v = g_rest exp(z_v - s) for every other class

The named classes are left out of the sum. Their probability subtracted from 1 would leave no digits of a small rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import checks, token_checks
from fused_ppl.records import TokenInputs
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import LossSpec


class Named(NamedTuple):
    """The named classes of N rows, and what is left for all others."""

    ids: Tensor  # (N, K) int64: 0 where no class is named
    given: Tensor  # (N, K) bool
    log_q: Tensor  # (N, K): -inf where no class is named
    log_rest: Tensor  # (N,): log(1 - sum q)

    def of(self, rows: slice) -> Named:
        return Named(*(t[rows] for t in self))


def named_classes(
    ids: Tensor, log_probs: Tensor, tokens: TokenInputs, spec: LossSpec, *, num_classes: int, least: float
) -> Named:
    """Read the rows of a top-k teacher, (N, K), in the dtype of `log_probs`.

    Rows of ignored tokens, and entries of -inf, may have any id. `least` bounds the probability of the rest from below.
    """
    given = log_probs != -torch.inf
    if spec.ignore_index is not None:
        given &= (tokens.target != spec.ignore_index).unsqueeze(1)
    log_q = log_probs.masked_fill(~given, -torch.inf)
    ids = ids.long().masked_fill(~given, 0)
    total = log_q.to(sum_dtype(ids.device)).exp().sum(1)
    if ids.device.type == "cpu" or checks.debug():
        checks.check_target_range(tokens.target, num_classes, spec.ignore_index)
        token_checks.check_named_classes(ids, given, total, num_classes)
    else:  # a GPU is not waited for
        label = tokens.target.unsqueeze(1)
        wrong = given & ((ids < 0) | (ids >= num_classes) | (label < 0) | (label >= num_classes))
        log_q = log_q.masked_fill(wrong, torch.nan)
        ids = ids.clamp(0, num_classes - 1)
    rest = torch.where(given.sum(1) == num_classes, 0, (1 - total).clamp(min=least))
    return Named(ids, given, log_q, rest.log().to(log_q.dtype))


def write_logits(out: Tensor, named: Named) -> None:
    """The teacher's logits (n, V): log q of the named classes, and the rest in equal parts for all others."""
    others = out.shape[1] - named.given.sum(1)
    each = named.log_rest - others.clamp(min=1).log()
    out.copy_(each.unsqueeze(1).expand_as(out))
    # an entry that names no class repeats one of its row that does; in a row without any, class 0 stays as it is
    first = named.given.int().argmax(1, keepdim=True)
    ids, log_q = (torch.where(named.given, t, t.gather(1, first)) for t in (named.ids, named.log_q))
    out.scatter_(1, ids, torch.where(named.given.any(1, keepdim=True), log_q, out.gather(1, ids)))


class Merged(NamedTuple):
    """A student's prediction over the K named classes and the rest."""

    logits: Tensor  # (n, K + 1)
    others: Tensor  # (n, V): e^(z - top) of the rest, 0 for the named classes
    mass: Tensor  # (n, 1): its sum


def merge(z: Tensor, named: Named) -> Merged:
    """The prediction of z (n, V), which is overwritten. The logits are relative to the largest z of the rest.

    A rounded log-sum-exp beside a large z would lose digits.
    """
    of_named = z.gather(1, named.ids).masked_fill_(~named.given, -torch.inf)
    z.scatter_add_(1, named.ids, torch.zeros_like(of_named).masked_fill_(named.given, -torch.inf))
    top = z.amax(1, keepdim=True)
    top = torch.where(top == -torch.inf, of_named.amax(1, keepdim=True), top)
    mass = z.sub_(top).exp_().sum(1, keepdim=True)
    return Merged(torch.cat((of_named - top, mass.log()), 1), z, mass)


def gradient_of_all(merged: Merged, gradient: Tensor, named: Named) -> Tensor:
    """(n, V) in the memory of z: the gradient by z, from the one by the K + 1 logits."""
    out = merged.others.mul_(torch.where(merged.mass == 0, 0, gradient[:, -1:] / merged.mass))
    return out.scatter_add_(1, named.ids, torch.where(named.given, gradient[:, :-1], 0))
