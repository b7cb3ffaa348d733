# SPDX-License-Identifier: Apache-2.0
"""The reference: the formulas of `fused_ppl.functional` in the shortest eager PyTorch, over full logits.

The tests compare everything with it, and `Options(backend="reference")` selects it. Plain autograd differentiates it
any number of times. It is slow and needs several buffers of N x V, so that each line can be compared with the formulas.
For float64 input the result is taken as the truth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_ppl.records import Divergence, LogitsInputs, Teacher
from fused_ppl.spec import DivergenceOutput, LogProbs, LossOutput, LossSpec


def logits_loss(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    spec: LossSpec,
    *,
    weight: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (...)
    num_items: Tensor | None = None,  # ()
) -> LossOutput:
    """Return all fields of `cross_entropy_with_stats`. Targets must be in range, and arguments must be checked."""
    z, y, counted = _transformed(logits, target, spec)
    dtype = z.dtype
    num_classes = z.shape[-1]
    w = z.new_ones(num_classes) if weight is None else weight.to(dtype)
    u = counted.to(dtype) if token_weight is None else torch.where(counted, token_weight.to(dtype), 0)

    logp = z.log_softmax(-1)
    nll = -logp.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    a = spec.label_smoothing
    smoothing = -(logp * w).sum(-1) if a else 0
    lse = torch.where(counted, z.logsumexp(-1), 0)
    row_weight = u * w[y]
    row_loss = torch.where(counted, u * ((1 - a) * w[y] * nll + a / num_classes * smoothing), 0)

    dim = {"none": None, "sequence": -1}.get(spec.reduction, tuple(range(row_loss.ndim)))
    per_row = (row_loss, row_weight, row_weight * lse**2)
    s, m, lse_squares = (r if not dim else r.sum(dim, dtype=torch.float64) for r in per_row)
    total = s + spec.z_loss * lse_squares
    if num_items is not None:
        loss = total / num_items
    else:
        loss = _divide(total, m) if spec.reduction in ("mean", "sequence") else total
    mean = s if spec.reduction == "none" else _divide(s, m)
    perplexity = mean.exp()
    if spec.max_nll is not None:
        below = mean.clamp(max=spec.max_nll).exp()
        perplexity = torch.where(mean > spec.max_nll, below.detach() * (1 + mean - spec.max_nll), below)

    with torch.no_grad():
        p = logp.exp()
        entropy = torch.where(counted, -torch.where(p == 0, 0, p * logp).sum(-1), 0)
        predicted = torch.where(counted, z.argmax(-1), -1)
    nll, lse, m = torch.where(counted, nll, 0).detach(), lse.detach(), m.double().detach()
    return LossOutput(loss.to(dtype), perplexity.to(dtype), nll, lse, entropy, predicted, m)


def log_probs(logits: Tensor, target: Tensor, spec: LossSpec) -> LogProbs:
    """`LogProbs` of logits (..., V) and targets (...), differentiable any number of times."""
    z, y, counted = _transformed(logits, target, spec)
    logp = z.log_softmax(-1)
    # p log p is 0 for a logit of -inf, and so is its gradient
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    # e^(z - lse), the gradient of lse, would keep the rounding of a large lse
    top = z.detach().amax(-1, keepdim=True).clamp(torch.finfo(z.dtype).min, torch.finfo(z.dtype).max)
    lse = (z - top).logsumexp(-1) + top.squeeze(-1)
    values = (logp.gather(-1, y.unsqueeze(-1)).squeeze(-1), entropy, lse)
    return LogProbs(*(torch.where(counted, value, 0) for value in values))


def divergence(inputs: LogitsInputs, teacher: Teacher, spec: LossSpec, *, asked: Divergence) -> DivergenceOutput:
    """All fields of `kl_divergence_with_stats`. The teacher is constant."""
    target = inputs.target
    z, y, counted = _transformed(inputs.logits, target, spec)
    if teacher.teacher_input is None:
        z, t = _top_k_logits(z, counted, teacher, asked)
    else:
        of_teacher = spec._replace(logit_scale=asked.teacher_logit_scale, softcap=asked.teacher_softcap)
        t, _, _ = _transformed(teacher.teacher_input.detach(), target, of_teacher)
    if asked.tail == "merge":
        y = torch.zeros_like(y)  # nobody asks for values at the target
    log_p, log_q = z.log_softmax(-1), t.to(z.dtype).log_softmax(-1)
    if asked.direction == "forward":
        value = _relative_entropy(log_q, log_p)
    elif asked.direction == "reverse":
        value = _relative_entropy(log_p, log_q)
    else:
        beta = asked.beta
        # where both are -inf, logaddexp has no derivative
        of_both = (log.clamp(min=-1e30) + math.log(share) for log, share in ((log_q, beta), (log_p, 1 - beta)))
        log_m = torch.logaddexp(*of_both)
        value = beta * _relative_entropy(log_q, log_m) + (1 - beta) * _relative_entropy(log_p, log_m)
    value = torch.where(counted, value, 0)
    u = torch.ones_like(value) if inputs.token_weight is None else inputs.token_weight.to(value.dtype)
    weight = torch.where(counted, u, 0).double()
    dim = {"none": None, "sequence": -1}.get(spec.reduction, tuple(range(value.ndim)))
    s, m = (r if not dim else r.sum(dim, dtype=torch.float64) for r in (torch.where(counted, value * u, 0), weight))
    if inputs.num_items is not None:
        loss = s / inputs.num_items
    else:
        loss = _divide(s, m) if spec.reduction in ("mean", "sequence") else s
    with torch.no_grad():
        of_p, of_q = (torch.where(counted, -_expected(log, log), 0) for log in (log_p, log_q))
        agrees = counted & (z.argmax(-1) == t.argmax(-1))
        own, other = (log.gather(-1, y.unsqueeze(-1)).squeeze(-1) for log in (log_p, log_q))
        at_target = torch.where(counted & (own != other), own - other, 0)  # a class may be excluded by both
    return DivergenceOutput(loss.to(value.dtype), value.detach(), of_p, of_q, agrees, at_target, m)


def _top_k_logits(z: Tensor, counted: Tensor, teacher: Teacher, asked: Divergence) -> tuple[Tensor, Tensor]:
    """The logits of both predictions, where the teacher names K classes of each token: over V or K + 1 classes."""
    assert teacher.teacher_ids is not None and teacher.teacher_log_probs is not None
    log_q = torch.where(counted.unsqueeze(-1), teacher.teacher_log_probs.to(z.dtype), -torch.inf)
    given = log_q != -torch.inf
    ids = torch.where(given, teacher.teacher_ids, z.shape[-1]).long()  # one more class, for entries that name none
    tail = (1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=0)
    if asked.direction == "reverse":
        tail = tail.clamp(min=torch.finfo(z.dtype).eps)
    tail = torch.where(given.sum(-1, keepdim=True) == z.shape[-1], 0, tail)
    named = torch.zeros(*z.shape[:-1], z.shape[-1] + 1, dtype=torch.bool, device=z.device).scatter(-1, ids, True)
    named = named[..., :-1]
    if asked.tail == "merge":
        with_none = torch.cat((z, torch.full_like(z[..., :1], -torch.inf)), -1)
        rest = z.masked_fill(named, -torch.inf)
        empty = (rest == -torch.inf).all(-1, keepdim=True)
        rest = rest.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
        return torch.cat((with_none.gather(-1, ids), rest), -1), torch.cat((log_q, tail.log()), -1)
    each = torch.zeros_like(tail)
    if asked.tail == "spread":
        each = tail / (~named).sum(-1, keepdim=True).clamp(min=1)
    of_all = each.log().expand(z.shape)
    with_none = torch.cat((of_all, of_all[..., :1]), -1)
    return z, with_none.scatter(-1, ids, log_q)[..., :-1]


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p (log p - log q), where a term with p = 0 is 0."""
    return _expected(log_p, log_p - log_q)


def _expected(log_p: Tensor, values: Tensor) -> Tensor:
    return (log_p.exp() * torch.where(log_p == -torch.inf, 0, values)).sum(-1)


def token_loss(loss: Tensor, target: Tensor, spec: LossSpec, num_items: Tensor | None) -> Tensor:
    """The reduction of losses (N,) of tokens (N,) that need no statistics: "sum", or "mean" over counted tokens."""
    counted = torch.ones_like(target, dtype=torch.bool) if spec.ignore_index is None else target != spec.ignore_index
    total = torch.where(counted, loss, 0).sum(dtype=torch.float64)
    if num_items is not None:
        return (total / num_items).to(loss.dtype)
    return (_divide(total, counted.sum()) if spec.reduction == "mean" else total).to(loss.dtype)


def _transformed(logits: Tensor, target: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(z, classes, whether each token counts)"""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counted = torch.ones_like(target, dtype=torch.bool) if spec.ignore_index is None else target != spec.ignore_index
    # the logits of an ignored row may be NaN; they are replaced first, so that no gradient becomes NaN
    z = torch.where(counted.unsqueeze(-1), logits.to(dtype), 0) * spec.logit_scale
    if spec.softcap is not None:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    return z, torch.where(counted, target, 0).long(), counted


def _divide(s: Tensor, m: Tensor) -> Tensor:
    """Return s / m, or NaN with a gradient of zero where m = 0."""
    return torch.where(m == 0, float("nan"), s / torch.where(m == 0, 1, m))
