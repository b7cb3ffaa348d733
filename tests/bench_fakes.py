# SPDX-License-Identifier: Apache-2.0
"""Providers that lie, sleep or take memory, for test_bench.py. A fresh process imports them."""

from __future__ import annotations

import time

import providers
import torch
import torch.nn.functional as F
from providers import Loss, Provider
from torch import Tensor

SLEEP = 0.03  # seconds
TAKEN = 500 * 2**20  # bytes


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is wrong by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.factor, None


def plain(setting) -> Loss:
    return providers.eager(setting)


def wrong_gradient(setting) -> Loss:
    """The value is right."""
    return lambda x, target: _Scaled.apply(F.cross_entropy(x, target).exp(), 1.1)


def wrong_value(setting) -> Loss:
    return lambda x, target: F.cross_entropy(x, target).exp() * 1.1


def forgets_the_factor(setting) -> Loss:
    """The gradient is cross-entropy's, as if the upstream were 1."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        entropy = F.cross_entropy(x, target)
        return entropy - entropy.detach() + entropy.detach().exp()

    return loss


def sleeps(setting) -> Loss:
    def loss(*args: Tensor) -> Tensor:
        time.sleep(SLEEP)
        return providers.eager(setting)(*args)

    return loss


def greedy(setting) -> Loss:
    """Holds 500 MiB from forward to backward, every page of them written."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        ballast = torch.ones(TAKEN, dtype=torch.uint8)
        return F.cross_entropy(x, target).exp() + 0 * ballast[0] * _kept(x, ballast)

    return loss


def _kept(x: Tensor, ballast: Tensor) -> Tensor:
    value = x.sum() * 0
    value.grad_fn.metadata["ballast"] = ballast
    return value


def hoards(setting) -> Loss:
    """Leaves 250 MiB waiting for the next step, in which it takes as much again."""
    waiting: list[Tensor] = []

    def loss(x: Tensor, target: Tensor) -> Tensor:
        if x.shape[1] > 64 and len(waiting) < 2:
            waiting.append(torch.ones(TAKEN // 2, dtype=torch.uint8))
        return F.cross_entropy(x, target).exp()

    return loss


def breaks(setting) -> Loss:
    def loss(*args: Tensor) -> Tensor:
        raise RuntimeError("broken")

    return loss


def fake(make, **how) -> Provider:
    return Provider(make.__name__, make, **how)
