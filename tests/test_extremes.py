# SPDX-License-Identifier: Apache-2.0
"""Rows at the ends of the number line, as masks write them: finfo.min, -1e30, a target at 1e10."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from fused_ppl import Options, cross_entropy, cross_entropy_with_stats, linear_cross_entropy

V = 23
FAR = [-1e8, -1e9, -3e9, -1e10, -1e12, -1e30, "min", 1e8, 1e9, 3e9, 1e10, 1e12, 1e30, "max"]


def rows_at(value: float, v: int = V) -> torch.Tensor:
    """All of the row; one class; most classes, with two others between; all but one class."""
    x = torch.randn(4, v, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 3], x[2], x[3] = value, value, value, value
    x[2, 1], x[2, 4] = 0.5 * value, 0.25 * value
    x[3, 2] = 0
    return x


def of_dtype(value: float | str, dtype: torch.dtype) -> float:
    kind = torch.finfo(dtype)
    return float(min(max({"min": kind.min, "max": kind.max}.get(value, value), kind.min), kind.max))


def known_by_nll(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Rows whose gradient can be told from lse and nll: but those where several of the largest logits, from 1e12 on,
    are not the target."""
    top = x.double().amax(-1, keepdim=True)
    ties = (x.double() == top).sum(-1) > 1
    at_top = (x.double().gather(-1, target.unsqueeze(-1)) == top).squeeze(-1)
    return (top.squeeze(-1).abs() < 1e12) | ~ties | at_top


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", FAR)
def test_loss_and_gradient_from_logits(value, dtype, stats, backend):
    for y in (2, 3):
        x, target = rows_at(of_dtype(value, dtype)).to(dtype).requires_grad_(), torch.full((4,), y)
        how = {"reduction": "none", "options": Options(backend=backend)}
        truth = x.detach().double().requires_grad_()
        want = cross_entropy_with_stats(truth, target, reduction="none", options=Options(backend="reference"))
        if stats:
            got = cross_entropy_with_stats(x, target, **how)
            for name in ("nll", "lse", "entropy"):
                assert_close(getattr(got, name), getattr(want, name).float(), rtol=1e-6, atol=1e-5)
            assert torch.equal(got.predicted, want.predicted)
        loss = got.loss if stats else cross_entropy(x, target, **how)
        assert_close(loss, want.loss.float(), rtol=1e-6, atol=1e-5)
        (gradient,), (expected,) = torch.autograd.grad(loss.sum(), x), torch.autograd.grad(want.loss.sum(), truth)
        assert gradient.isfinite().all()
        known = known_by_nll(x.detach(), target)
        tolerance = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        assert_close(gradient[known].double(), expected[known], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("scale", [0.01, 0.7, 100.0])
@pytest.mark.parametrize("value", [-1e30, -1e10, -1e8, 3e6, 1e7, 1e10])
def test_a_scale_moves_the_ends(scale, value, backend):
    x, target = rows_at(value).requires_grad_(), torch.tensor([0, 3, 0, 0])
    loss = cross_entropy(x, target, logit_scale=scale, options=Options(backend=backend))
    truth = x.detach().double().requires_grad_()
    want = cross_entropy(truth, target, logit_scale=scale, options=Options(backend="reference"))
    assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    (gradient,), (expected,) = torch.autograd.grad(loss, x), torch.autograd.grad(want, truth)
    known = known_by_nll(x.detach(), target)
    assert_close(gradient[known].double(), expected[known], rtol=1e-4, atol=1e-6)


PLANS = {
    "rows": Options(),
    "vocab": Options(memory_budget=1),
    "compact": Options(gradient_columns=9),
    "tolerance": Options(gradient_tolerance=1e-3),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("value", ["min", -1e12, -1e9, 1e10, 1e30])
def test_the_fused_head(value, plan, backend):
    """The bias of the classes holds the row, as where a model masks part of its vocabulary."""
    value, options = of_dtype(value, torch.float32), dataclasses.replace(PLANS[plan], backend=backend)
    hidden, weight = torch.zeros(3, 5), torch.randn(V, 5, generator=torch.Generator().manual_seed(0))
    for row in rows_at(value):
        target = torch.tensor([0, 3, 0])
        if not known_by_nll(row.expand(3, V), target).all():
            continue
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, row)]
        loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], options=options)
        truth = [t.detach().double().requires_grad_() for t in leaves]
        want = linear_cross_entropy(*truth[:2], target, linear_bias=truth[2], options=Options(backend="reference"))
        assert_close(loss, want.float(), rtol=1e-6, atol=1e-5)
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, truth), strict=True):
            assert_close(
                a.double(), b, rtol=1e-3 if plan == "tolerance" else 1e-5, atol=2e-3 if plan == "tolerance" else 1e-6
            )
