# SPDX-License-Identifier: Apache-2.0
"""Compares value and gradient of `fused_ppl.perplexity` with the reference in float64, by the tolerance of the tests.

The reference runs on blocks of rows, so that a shape that fits in memory for training can also be checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ppl
from fused_ppl import testing

# elements of a float64 block of rows; the allocator reuses blocks of this size
BLOCK = 2**21
REFERENCE = fused_ppl.Options(backend="reference")


@dataclass(frozen=True)
class Check:
    """The error of one result of one call. For a gradient, it is the element with the largest error / allowed."""

    device: str
    backend: str
    dtype: str
    tokens: int
    classes: int
    of: str  # "value" or "gradient"
    error: float  # relative to the value, or to the largest entry of a row of the gradient
    allowed: float  # the largest allowed error, relative to the same number
    problem: str | None = None  # the first line of the error that the call raised

    @property
    def good(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.allowed


def check(backend: str, device: torch.device, dtype: torch.dtype, *, shape: tuple[int, int]) -> list[Check]:
    """Check the value and the gradient of one call for N tokens and V classes. An error of the call is a result too."""
    facts = (str(device), backend, str(dtype).removeprefix("torch."), *shape)
    try:
        value, gradient = _errors(backend, device, dtype, shape=shape)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Check(*facts, "call", math.inf, 0.0, problem)]
    return [Check(*facts, "value", *value), Check(*facts, "gradient", *gradient)]


def _errors(
    backend: str, device: torch.device, dtype: torch.dtype, *, shape: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (error, allowed) of the value, and of the worst element of the gradient."""
    n, v = shape
    logits = testing.make_logits((n, v), dtype, device=str(device))
    target = testing.make_target((n,), v, device=str(device))
    target[1::4] = -100
    options = fused_ppl.Options(backend=backend)

    def ours(x: Tensor) -> Tensor:
        return fused_ppl.perplexity(x, target, options=options)

    def eager(x: Tensor) -> Tensor:
        return F.cross_entropy(x if dtype == torch.float64 else x.float(), target).exp()

    # the gradient of a perplexity of 1e6 overflows in fp16, so the upstream gradient is 1 / perplexity
    with torch.no_grad():
        upstream = eager(logits).reciprocal()
    value, gradient = testing.value_and_gradient(ours, logits, upstream)
    eager_value, eager_gradient = testing.value_and_gradient(eager, logits, upstream)

    metric = fused_ppl.Perplexity(options=REFERENCE)
    for _, x, y in _blocks(logits, target):
        metric.update(x, y)
    truth = metric.compute()
    nats = truth.log().clamp(min=1).item()
    value_error = testing.error_and_bound(value.cpu(), eager_value.cpu(), truth, nats)

    factor = upstream.cpu().double() * truth / metric.total_weight
    worst = []
    for rows, x, y in _blocks(logits, target):
        nll_sum = fused_ppl.cross_entropy(x, y, reduction="sum", options=REFERENCE)
        (true_gradient,) = torch.autograd.grad(nll_sum, x, factor)
        error, allowed = testing.error_and_bound(gradient[rows].cpu(), eager_gradient[rows].cpu(), true_gradient, nats)
        # p - 1 has a rounding error of eps * 1; if p of every target is near 1, this is many ulp of the gradient
        allowed = allowed + testing.ULPS * torch.finfo(value.dtype).eps * factor
        worst.append(_worst(error, allowed, true_gradient.abs().amax(-1, keepdim=True)))
    return _worst(*value_error, truth), _worst(*torch.tensor(worst, dtype=torch.float64, device="cpu").T)


def _blocks(logits: Tensor, target: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of rows as float64 on the CPU, because not every device has float64."""
    step = max(1, BLOCK // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        yield rows, logits[rows].cpu().double().requires_grad_(), target[rows].cpu()


def _worst(error: Tensor, allowed: Tensor, size: Tensor | float = 1.0) -> tuple[float, float]:
    """Return error and allowed of the element with the largest error / allowed, both relative to `size`."""
    ratio = torch.where(error > 0, error / allowed, 0).nan_to_num(nan=math.inf)
    i = int(ratio.argmax())
    size = torch.where(torch.as_tensor(size, dtype=ratio.dtype, device=ratio.device) > 0, size, 1)
    relative_error, relative_bound = ((x / size).expand_as(ratio).flatten()[i].item() for x in (error, allowed))
    return relative_error, relative_bound
