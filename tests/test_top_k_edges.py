# SPDX-License-Identifier: Apache-2.0
"""Teachers that name few classes: padding, certainty, layouts, budgets, and what raises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_divergence import two_logits
from test_top_k import CASES, IDS, K, V, exact, how, student_and_teacher, through_head, top_k
from torch.testing import assert_close

from fused_ppl import Options, TopK, kl_divergence, linear_kl_divergence, linear_kl_divergence_with_stats


@pytest.mark.parametrize(("tail", "direction", "beta"), CASES, ids=IDS)
def test_padding_names_no_class(tail, direction, beta, options):
    """Entries of -inf may have any id: also one that is named beside it, and one that is no class."""
    z, t = two_logits((3, 40), "independent")
    short = top_k(t, 5, tail)
    pad = torch.tensor([[7, 999, -100], [0, 0, 0], [*short.ids[2, :2].tolist(), 39]])
    padded = TopK(torch.cat((pad, short.ids), 1), torch.cat((torch.full((3, 3), -math.inf), short.log_probs), 1), tail)
    results = []
    for teacher in (short, padded):
        x = z.clone().requires_grad_()
        value = kl_divergence(x, teacher, reduction="none", options=options, **how(direction, beta))
        results.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
    assert_close(results[1], results[0], rtol=2e-6, atol=2e-7)


def test_a_token_without_any_named_class(options):
    """Merged, both predictions are one class. Spread, the teacher is uniform. Dropped, there is no teacher."""
    z = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
    none = torch.tensor([[3, 3]]).expand(2, 2), torch.full((2, 2), -math.inf)
    merged, spread, dropped = (
        kl_divergence(z, TopK(*none, tail), reduction="none", options=options) for tail in ("merge", "spread", "drop")
    )
    assert not merged.any() and not torch.autograd.grad(merged.sum(), z)[0].any()
    want = -math.log(9) - z.detach().log_softmax(-1).mean(-1)
    assert_close(spread, want, rtol=1e-5, atol=1e-6)
    assert dropped.isnan().all()


@pytest.mark.parametrize("tail", ["merge", "spread"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jensen_shannon"])
def test_a_teacher_that_is_certain_is_finite(tail, direction, options):
    """Its probabilities add up to 1 in float32, so that nothing is left for the tail."""
    z, _ = two_logits((3, 50))
    z.requires_grad_()
    ids, log_probs = torch.tensor([[1], [4], [49]]), torch.tensor([[0.0], [0.0], [-1e-9]])
    value = kl_divergence(z, TopK(ids, log_probs, tail), direction=direction, reduction="none", options=options)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all() and gradient.isfinite().all()
    if direction == "forward":
        nll = torch.nn.functional.cross_entropy(z.detach(), ids[:, 0], reduction="none")
        assert_close(value.detach(), nll, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("tail", "direction", "beta"), CASES, ids=IDS)
def test_a_small_rest_of_the_student_keeps_its_digits(tail, direction, beta, options):
    """p of the rest is 1e-9: subtracted from 1, nothing would be left of it."""
    z, t = two_logits((3, 60))
    z[:, 0] += 25
    teacher = top_k(t + 3 * torch.eye(60)[0], 3, tail)
    teacher = TopK(torch.where(torch.arange(3) == 0, 0, teacher.ids), teacher.log_probs, tail)
    teacher.ids[:, 1:] = torch.tensor([7, 8])
    z.requires_grad_()
    value = kl_divergence(z, teacher, reduction="none", options=options, **how(direction, beta))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    want, right = exact(z.double(), teacher, direction, beta, torch.ones(3))
    assert_close(value.double(), want, rtol=1e-5, atol=1e-7)
    assert_close(gradient.double(), right, rtol=2e-4, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "offset", "channels"])
@pytest.mark.parametrize("tail", ["drop", "merge", "spread"])
def test_any_layout(tail, layout, options):
    z, t = two_logits((6, 21))
    teacher, target = top_k(t, 4, tail), torch.tensor([0, 1, -100, 3, 4, 5])
    want = kl_divergence(z.requires_grad_(), teacher, target, options=options)
    (right,) = torch.autograd.grad(want, z)
    x = (
        z.detach().t().contiguous().t()
        if layout == "transposed"
        else torch.cat((torch.zeros(3), z.detach().flatten()))[3:].view(6, 21)
    )
    if layout == "channels":  # (N, C, d), and ids (N, d, K)
        x = z.detach().view(2, 3, 21).movedim(-1, 1).contiguous()
        teacher = TopK(teacher.ids.view(2, 3, 4), teacher.log_probs.view(2, 3, 4), tail)
        target, right = target.view(2, 3), right.view(2, 3, 21).movedim(-1, 1)
    x.requires_grad_()
    loss = kl_divergence(x, teacher, target, options=options)
    assert_close(loss, want, rtol=1e-6, atol=1e-7)
    assert_close(torch.autograd.grad(loss, x)[0], right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tail", ["drop", "merge", "spread"])
def test_a_budget_and_chunks_of_few_rows_change_nothing(tail, options):
    student, teacher = student_and_teacher()
    tight = Options(backend=options.backend, memory_budget=1200)
    for keywords in ({}, {"softcap": 3.0}):
        got, want = (through_head(student, teacher, o, tail, **keywords) for o in (tight, options))
        assert_close(got, want, rtol=1e-5, atol=1e-6)
    z, t = two_logits((40, 90))
    results = []
    for o in (tight, options):
        x = z.clone().requires_grad_()
        value = kl_divergence(x, top_k(t, 6, tail), options=o)
        results.append((value.detach(), torch.autograd.grad(value, x)[0]))
    assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tail", ["drop", "merge", "spread"])
def test_inputs_stay_as_they_are(tail, options):
    student, t = student_and_teacher()
    teacher = top_k(t, K, tail)
    before = [x.detach().clone() for x in (*student, *teacher[:2])]
    linear_kl_divergence(*student[:2], teacher, options=options).backward()
    z = torch.randn(4, V)
    kept, few = z.clone(), TopK(teacher.ids[0, 0].expand(4, K), teacher.log_probs[0, 0].expand(4, K), tail)
    kl_divergence(z.requires_grad_(), few, softcap=3.0, options=options).backward()
    for a, b in zip((*before, kept), (*student, *teacher[:2], z), strict=True):
        assert torch.equal(a, b)


def test_the_unnormalised_loss_of_other_packages_is_drop_with_a_token_weight(options):
    """sum_k q_k (log q_k - log p_k), as in verl, has the gradient Q p - q: Q times the one of "drop"."""
    z, t = two_logits((5, 70), "independent")
    teacher = top_k(t, 6, "drop")
    mass = teacher.log_probs.exp().sum(-1)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    kl_divergence(x, teacher, token_weight=mass, reduction="sum", options=options).backward()
    of_named = y.log_softmax(-1).gather(-1, teacher.ids)
    (teacher.log_probs.exp() * (teacher.log_probs - of_named)).sum().backward()
    assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", ["drop", "merge", "spread"])
def test_no_buffer_has_the_size_of_the_logits(tail, options, peak_bytes, fits):
    n, v, d = 2048, 8000, 16
    fits(n, v)
    hidden, weight = torch.randn(n, d).requires_grad_(), torch.randn(v, d).requires_grad_()
    teacher = top_k(torch.randn(n, v), 8, tail)
    tight = Options(backend=options.backend, memory_budget=4 * 2**20)

    def step() -> Any:
        return torch.autograd.grad(linear_kl_divergence(hidden, weight, teacher, options=tight), (hidden, weight))

    # gradients, a chunk of logits, and what compares it: each within the budget
    assert peak_bytes(step) < 4 * 4 * 2**20 + 2 * 4 * d * (n + v) < n * v * 4 // 2


BAD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"tail": "cut"}, {}, ValueError, "tail must be one of"),
    ({"tail": "drop"}, {"direction": "reverse"}, ValueError, "infinite with tail='drop'"),
    ({}, {"teacher_logit_scale": 0.5}, ValueError, "log-probabilities"),
    ({}, {"teacher_softcap": 5.0}, ValueError, "log-probabilities"),
    ({}, {"teacher_linear_weight": torch.ones(V, 3)}, ValueError, "whole teacher"),
    ({"ids": torch.zeros(3, 3, 2)}, {}, TypeError, "ids must be int64"),
    ({"ids": torch.zeros(3, 2, 2, dtype=torch.long)}, {}, ValueError, r"ids must have shape \(3, 3, K\)"),
    ({"ids": torch.zeros(3, 3, 0, dtype=torch.long)}, {}, ValueError, "K >= 1"),
    ({"log_probs": torch.zeros(3, 3, 3)}, {}, ValueError, "log_probs must have shape"),
    ({"log_probs": torch.zeros(3, 3, 2, dtype=torch.long)}, {}, TypeError, "log_probs must be float16"),
    ({"log_probs": torch.zeros(3, 3, 2, requires_grad=True)}, {}, ValueError, "gets no gradient"),
    ({"ids": torch.tensor([1, V]).expand(3, 3, 2)}, {}, IndexError, r"ids must be in \[0, 37\); got 37 for token 0"),
    ({"ids": torch.tensor([1, 1]).expand(3, 3, 2)}, {}, ValueError, r"must differ within a token; got \[1, 1\]"),
    ({"log_probs": torch.full((3, 3, 2), 3.0)}, {}, ValueError, "must add up to at most 1"),
]


@pytest.mark.parametrize(("given", "keywords", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_what_does_not_fit_raises_a_sentence(given, keywords, error, message):
    student, _ = student_and_teacher()
    fields = {"ids": torch.tensor([1, 2]).expand(3, 3, 2), "log_probs": torch.full((3, 3, 2), -2.0), "tail": "merge"}
    with pytest.raises(error, match=message):
        linear_kl_divergence(*student[:2], TopK(**{**fields, **given}), **keywords)


def test_statistics_of_merged_tails_and_a_missing_head_raise_a_sentence():
    (hidden, weight, _), t = student_and_teacher()
    with pytest.raises(ValueError, match="tail='merge' has none"):
        linear_kl_divergence_with_stats(hidden, weight, top_k(t, K, "merge"))
    with pytest.raises(ValueError, match="teacher_linear_weight is missing"):
        linear_kl_divergence(hidden, weight, hidden.detach())
    with pytest.raises(IndexError, match="target must be in"):
        kl_divergence(t, top_k(t, K, "merge"), torch.full((3, 3), 99), class_dim=-1)
