# SPDX-License-Identifier: Apache-2.0
"""Value and gradient of `fused_ppl.perplexity` against the reference in float64, by the tolerance of the tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ppl
from fused_ppl import testing

# elements of the float64 copies that the reference works on at a time: any shape that trains can be checked, and the
# allocator reuses such blocks
BLOCK = 2**21
REFERENCE = fused_ppl.Options(backend="reference")


@dataclass(frozen=True)
class Check:
    """One number of one call; of a gradient, the element with the largest error for what it is allowed."""

    device: str
    backend: str
    dtype: str
    tokens: int
    classes: int
    of: str  # "value" or "gradient"
    error: float  # relative to the value, or to the largest entry of the gradient's row
    allowed: float
    problem: str | None = None  # what was raised in the place of a number

    @property
    def good(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.allowed


def check(backend: str, device: torch.device, dtype: torch.dtype, n: int, v: int) -> list[Check]:
    """The value and the gradient of one call. Whatever the call raises is a finding, not an end."""
    place = (str(device), backend, str(dtype).removeprefix("torch."), n, v)
    try:
        value, gradient = _errors(backend, device, dtype, n, v)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Check(*place, "call", math.inf, 0.0, problem)]
    return [Check(*place, "value", *value), Check(*place, "gradient", *gradient)]


def _errors(
    backend: str, device: torch.device, dtype: torch.dtype, n: int, v: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(error, allowed) of the value, and of the worst element of the gradient."""
    logits = testing.make_logits((n, v), dtype, device=str(device))
    target = testing.make_target((n,), v, device=str(device))
    target[1::4] = -100
    options = fused_ppl.Options(backend=backend)

    def ours(x: Tensor) -> Tensor:
        return fused_ppl.perplexity(x, target, options=options)

    def eager(x: Tensor) -> Tensor:
        return F.cross_entropy(x if dtype == torch.float64 else x.float(), target).exp()

    # an upstream gradient that keeps the result within fp16, where the gradient of a perplexity of 1e6 is not
    with torch.no_grad():
        upstream = eager(logits).reciprocal()
    value, gradient = testing.value_and_gradient(ours, logits, upstream)
    eager_value, eager_gradient = testing.value_and_gradient(eager, logits, upstream)

    metric = fused_ppl.Perplexity(options=REFERENCE)
    for _, x, y in _blocks(logits, target):
        metric.update(x, y)
    truth = metric.compute()
    nats = truth.log().clamp(min=1).item()
    of_value = testing.error_and_bound(value.cpu(), eager_value.cpu(), truth, nats)

    factor = upstream.cpu().double() * truth / metric.total_weight
    found = []
    for rows, x, y in _blocks(logits, target):
        nll_sum = fused_ppl.cross_entropy(x, y, reduction="sum", options=REFERENCE)
        (true_gradient,) = torch.autograd.grad(nll_sum, x, factor)
        ours_and_eager = gradient[rows].cpu(), eager_gradient[rows].cpu()
        error, allowed = testing.error_and_bound(*ours_and_eager, true_gradient, nats)
        # p - 1 is rounded to eps of 1, in the truth as well: many ulp of a gradient whose every target has p -> 1
        allowed = allowed + testing.ULPS * torch.finfo(value.dtype).eps * factor
        found.append(_worst(error, allowed, true_gradient.abs().amax(-1, keepdim=True)))
    return _worst(*of_value, truth), _worst(*torch.tensor(found, dtype=torch.float64, device="cpu").T)


def _blocks(logits: Tensor, target: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows in float64 on the CPU, which every machine has."""
    step = max(1, BLOCK // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        yield rows, logits[rows].cpu().double().requires_grad_(), target[rows].cpu()


def _worst(error: Tensor, allowed: Tensor, size: Tensor | float = 1.0) -> tuple[float, float]:
    """The element with the largest error for what it is allowed, both relative to `size`."""
    share = torch.where(error > 0, error / allowed, 0).nan_to_num(nan=math.inf)
    i = int(share.argmax())
    size = torch.where(torch.as_tensor(size, dtype=share.dtype, device=share.device) > 0, size, 1)
    return tuple((x / size).expand_as(share).flatten()[i].item() for x in (error, allowed))  # type: ignore[return-value]
