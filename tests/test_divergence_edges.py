# SPDX-License-Identifier: Apache-2.0
"""Divergences at the ends: small ones, rows of NaN, weights of 0, excluded classes, teachers from inference mode."""

from __future__ import annotations

import math

import pytest
import torch
from test_divergence import DIRECTIONS, IDS, REFERENCE, heads, how, truth
from torch.testing import assert_close

from fused_ppl import kl_divergence, kl_divergence_with_stats, linear_kl_divergence, linear_kl_divergence_with_stats


@pytest.mark.parametrize("columns", [400, 9000])
@pytest.mark.parametrize("noise", [1e-2, 1e-3])
@pytest.mark.parametrize("case", DIRECTIONS, ids=IDS)
def test_a_small_divergence_keeps_its_digits_and_is_not_negative(case, noise, columns, options, fits):
    """The rounding of both lse would add 1e-7 nats to it, which is 20 times the smallest of these."""
    fits(2, columns)
    z = torch.randn(2, columns)
    t = z + noise * torch.randn(2, columns)
    want = truth(z.double(), t.double(), *case)
    got = kl_divergence(z, t, reduction="none", options=options, **how(*case))
    assert (got > 0).all()
    assert_close(got.double(), want, rtol=1e-2, atol=0)


@pytest.mark.parametrize("case", DIRECTIONS[:3], ids=IDS[:3])
@pytest.mark.parametrize("row", ["NaN", "inf", "nothing"])
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
def test_a_row_without_a_prediction_has_no_finite_loss(whose, row, case, options):
    pair = [torch.randn(2, 9), torch.randn(2, 9)]
    pair[whose][0] = {"NaN": pair[whose][0].index_fill(0, torch.tensor(4), math.nan), "inf": math.inf}.get(
        row, -math.inf
    )
    z = pair[0].requires_grad_()
    value = kl_divergence(z, pair[1], reduction="none", options=options, **how(*case))
    (gradient,) = torch.autograd.grad(value, z, torch.ones(2))
    assert value[0].isnan() and value[1].isfinite() and gradient[0].isnan().any() and gradient[1].isfinite().all()


@pytest.mark.parametrize("case", DIRECTIONS[:3], ids=IDS[:3])
@pytest.mark.parametrize("columns", [4099, 9001])
def test_statistics_beside_a_gradient_in_place(columns, case, options, fits):
    """A kernel reads the target's logit by itself, and may not do so when another thread has written its gradient."""
    fits(4, columns)
    shapes = ((4, 6), (columns, 6), (4, 5), (columns, 5))
    hidden, weight, teacher, teacher_weight = (torch.randn(shape) for shape in shapes)
    target, leaves = (
        torch.tensor([0, columns - 1, columns // 2, 17]),
        [hidden.requires_grad_(), weight.requires_grad_()],
    )
    found = []
    for used in (options, REFERENCE):
        how_ = {"target": target, "options": used, **how(*case)}
        out = linear_kl_divergence_with_stats(*leaves, teacher, teacher_weight, **how_)
        found.append((*out, *torch.autograd.grad(out.loss, leaves)))
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_weight_of_zero_hides_no_nan(options):
    """As in cross_entropy: what is not counted is said by targets."""
    z, t, weight = torch.randn(2, 5), torch.randn(2, 5), torch.tensor([0.0, 1.0])
    z[0, 2] = math.nan
    assert kl_divergence(z, t, token_weight=weight, options=options).isnan()
    target = torch.tensor([-100, 0])
    assert kl_divergence(z, t, target, token_weight=weight, options=options).isfinite()


def test_the_target_may_be_a_class_that_both_exclude(options):
    z, t = torch.tensor([[-math.inf, 1.0, 2.0]]), torch.tensor([[-math.inf, 1.0, 1.0]])
    assert kl_divergence_with_stats(z, t, options=options).log_prob_difference == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_may_come_from_inference_mode(reduction, options):
    student, teacher = heads()
    want = linear_kl_divergence(*student[:2], *teacher[:2], reduction=reduction, options=options).sum()
    with torch.inference_mode():
        known = [teacher[0] * 1, teacher[1] * 1]
    loss = linear_kl_divergence(*student[:2], *known, reduction=reduction, options=options).sum()
    for a, b in zip(*(torch.autograd.grad(value, student[:2]) for value in (loss, want)), strict=True):
        assert torch.equal(a, b)
    z = torch.randn(2, 5, requires_grad=True)
    with torch.inference_mode():
        t = torch.randn(2, 5)
    kl_divergence(z, t, options=options).backward()
    assert z.grad is not None


def test_a_mean_does_not_keep_the_teacher(options):
    """Its gradients are made in forward, so a buffer of the teacher may be filled anew before backward."""
    student, teacher = heads()
    want = torch.autograd.grad(linear_kl_divergence(*student[:2], *teacher[:2], options=options), student[:2])
    loss = linear_kl_divergence(*student[:2], *teacher[:2], options=options)
    teacher[0].zero_()
    for a, b in zip(torch.autograd.grad(loss, student[:2]), want, strict=True):
        assert torch.equal(a, b)
    loss = linear_kl_divergence(*student[:2], *teacher[:2], reduction="none", options=options)
    teacher[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("beta", [0.001, 0.999])
def test_the_ends_of_beta(beta, options):
    z, t = torch.tensor([[50.0, 0.0, 1.0], [0.3, 0.2, 0.1]]), torch.tensor([[0.0, 50.0, 2.0], [0.1, 0.2, 0.3]])
    want = truth(z.double(), t.double(), "jensen_shannon", beta)
    got = kl_divergence(z, t, direction="jensen_shannon", beta=beta, reduction="none", options=options)
    assert_close(got.double(), want, rtol=2e-5, atol=0)


def test_autocast_decides_for_each_head(options):
    """A student in half precision beside a float32 teacher: the products of both are rounded to bf16 under autocast."""
    student, teacher = heads()
    half = [t.detach().bfloat16().requires_grad_() for t in student[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_kl_divergence(*half, *teacher[:2], options=options)
    want = linear_kl_divergence(*half, *(t.bfloat16() for t in teacher[:2]), options=options)
    assert torch.equal(got, want)
