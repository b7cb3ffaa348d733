# SPDX-License-Identifier: Apache-2.0
"""The gate before the clock: value and every gradient against float64. What is wrong gets no time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import DTYPES, Inputs, Setting, logits_of
from providers import Loss
from torch import Tensor

# a truth of more than this is of fewer tokens: float64 is slow on a CPU, and its gradients take memory
MOST_FLOPS = {"cpu": 3e11, "cuda": 1e14}
MOST_LOGITS = 2**28
CHUNK = 2**24  # logits of the truth at a time
# gross errors are refused, the others are shown: beyond 4 times eager's error in the same dtype, and beyond these
# roundings of the value (a loss rounded to bf16 is off by half of one) and of the gradient
EAGER_FACTOR, OF_VALUE, OF_GRADIENT = 4.0, 4.0, 8.0


@dataclass(frozen=True)
class Truth:
    nll: float
    gradients: tuple[Tensor, ...]  # float64
    inputs: Inputs  # of the tokens that were taken


@dataclass(frozen=True)
class Error:
    value: float  # nats: for a perplexity |log(value / truth)|, which is its relative error
    gradient: float  # |g - truth| / |truth|, the Frobenius norms of the worst of the gradients


def checked_tokens(setting: Setting) -> int:
    n, v, d = setting.case.num_tokens, setting.case.num_classes, setting.case.hidden_size
    affordable = MOST_LOGITS // v
    if setting.op == "linear":
        affordable = min(affordable, int(MOST_FLOPS[setting.device] / (6 * v * d)))
    return min(n, max(1, affordable))


def truth_of(setting: Setting, inputs: Inputs) -> Truth:
    """PyTorch's cross-entropy in float64, a few rows at a time."""
    n = checked_tokens(setting)
    taken = inputs if n == setting.case.num_tokens else inputs.first_tokens(n)
    first, *rest = (t.detach().double().requires_grad_() for t in taken.tensors)
    total = 0.0
    step = max(1, CHUNK // setting.case.num_classes)
    for rows in range(0, n, step):
        part = slice(rows, rows + step)
        logits = logits_of(setting.op, setting.case.softcap, (first[part], *rest))
        loss = F.cross_entropy(logits, taken.target[part], reduction="sum")
        loss.backward()
        total += float(loss.detach())
    nll = total / n
    factor = (math.exp(nll) if setting.objective == "perplexity" else 1.0) / n
    gradients = [t.grad for t in (first, *rest) if t.grad is not None]
    return Truth(nll, tuple(g.mul_(factor) for g in gradients), taken)


def error_of(loss: Loss, setting: Setting, truth: Truth, in_place: bool = False) -> Error:
    """One forward and backward on copies of the inputs."""
    inputs = truth.inputs.copy()
    tensors = tuple(t.clone() for t in inputs.tensors) if in_place else inputs.tensors
    value = loss(*tensors, inputs.target)
    gradients = torch.autograd.grad(value, tensors)
    found = float(value.detach().double())
    if setting.objective == "perplexity":
        found = math.log(found) if found > 0 else math.nan
    worst = [_distance(g, true) for g, true in zip(gradients, truth.gradients, strict=True)]
    return Error(abs(found - truth.nll), max(worst) if all(map(math.isfinite, worst)) else math.inf)


def _distance(gradient: Tensor, truth: Tensor) -> float:
    """By slices: a difference in float64 of the whole takes as much as the truth."""
    error = size = 0.0
    rows = max(1, CHUNK // max(1, truth[0].numel()))
    for g, t in zip(gradient.split(rows), truth.split(rows), strict=True):
        error += float((g.double() - t).square_().sum())
        size += float(t.square().sum())
    return math.sqrt(error / size)


def verdict(error: Error, eager: Error, setting: Setting, nll: float) -> str | None:
    """Why it gets no time, or None where it may be timed."""
    eps = torch.finfo(DTYPES[setting.dtype]).eps
    # the gradient of a perplexity has the perplexity as a factor, and that one's error with it, which is judged above
    of_factor = math.expm1(min(error.value, 1.0)) if setting.objective == "perplexity" else 0.0
    for name, got, lost, least in (
        ("value", error.value, eager.value, OF_VALUE * eps * max(1.0, abs(nll))),
        ("gradient", error.gradient, eager.gradient, OF_GRADIENT * eps),
    ):
        allowed = max(EAGER_FACTOR * lost if math.isfinite(lost) else 0.0, least)
        allowed += of_factor if name == "gradient" else 0.0
        if not got <= allowed:
            return f"wrong {name}: error {got:.1e}, at most {allowed:.1e}"
    return None
