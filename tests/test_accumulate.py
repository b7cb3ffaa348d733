# SPDX-License-Identifier: Apache-2.0
"""PerplexityAccumulator in one process: any micro-batches give the gradient of the window."""

from __future__ import annotations

import itertools
import math
import re

import on_device
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fused_ppl import Options, PerplexityAccumulator, cross_entropy_with_stats, linear_cross_entropy_with_stats
from fused_ppl import perplexity as perplexity_of
from fused_ppl.testing import make_logits, make_target


def window_gradient(x, target, bounds, loss=cross_entropy_with_stats, **keywords):
    """PPL and the gradient of logits that are seen in parts."""
    x = x.detach().clone().requires_grad_()
    acc = PerplexityAccumulator([x], **keywords)
    for a, b in itertools.pairwise(bounds):
        acc.add(loss(x[a:b], target[a:b], reduction="sum", softcap=9.0)).backward()
    return acc.finish(), x.grad


def whole_gradient(x, target, **keywords):
    x = x.detach().clone().requires_grad_()
    value = perplexity_of(x, target, softcap=9.0, **keywords)
    return value.detach().double(), torch.autograd.grad(value, x)[0]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), max_size=6), st.integers(0, 2**16), st.sampled_from([0.0, 0.3, 1.0]), st.data())
def test_any_micro_batches_have_the_gradient_of_the_window(cuts, seed, ignored, data):
    x, target = make_logits((12, 19), seed=seed), make_target((12,), 19, ignored=ignored, seed=seed)
    keywords = {"max_nll": data.draw(st.sampled_from([None, 1.0]))}
    items = data.draw(st.sampled_from([1.0, 9.0, 4096]))
    ppl, gradient = window_gradient(x, target, sorted([0, 12, *cuts]), expected_items=items, **keywords)
    want, want_gradient = whole_gradient(x, target, **keywords)
    assert_close(ppl, want, rtol=1e-6, atol=0, equal_nan=True)
    assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-6)


def test_the_mean_of_the_halves_perplexities_is_another_number():
    """What the class is for; docs/distributed.md has these numbers."""
    x, y = make_logits((64, 5000)) / 3, make_target((64,), 5000)
    x[:32].scatter_add_(1, y[:32, None], torch.full((32, 1), 5.6))
    x.requires_grad_()
    halves = perplexity_of(x[:32], y[:32]), perplexity_of(x[32:], y[32:])
    assert [round(p.item()) for p in halves] == [29, 8619] and round(sum(halves).item() / 2) == 4324
    (mean_gradient,) = torch.autograd.grad(sum(halves) / 2, x)
    acc = PerplexityAccumulator([x])
    for a, b in ((0, 32), (32, 64)):
        acc.add(cross_entropy_with_stats(x[a:b], y[a:b], reduction="sum")).backward()
    assert round(acc.finish().item()) == 501
    want = torch.autograd.grad(perplexity_of(x, y), x)[0]
    assert_close(x.grad, want, rtol=1e-5, atol=1e-6)
    mean_gradient, gradient = mean_gradient.double().flatten(), x.grad.double().flatten()
    assert round((mean_gradient.norm() / gradient.norm()).item()) == 12
    assert round(torch.cosine_similarity(mean_gradient, gradient, 0).item(), 2) == 0.73


def test_a_head_tied_to_its_embedding_is_scaled_once():
    w = torch.randn(23, 8).requires_grad_()
    bias, y = torch.zeros(23, requires_grad=True), make_target((10,), 23, ignored=0.2)
    tokens = torch.arange(10)
    acc = PerplexityAccumulator([w, bias, w])
    for part in (slice(4), slice(4, 10)):
        hidden = torch.nn.functional.embedding(tokens[part], w)
        acc.add(linear_cross_entropy_with_stats(hidden, w, y[part], linear_bias=bias, reduction="sum")).backward()
    ppl, grads = acc.finish(), (w.grad, bias.grad)
    logits = torch.nn.functional.embedding(tokens, w) @ w.T + bias
    want = torch.nn.functional.cross_entropy(logits, y).exp()
    assert_close(ppl, want.detach().double(), rtol=1e-6, atol=0)
    for g, reference in zip(grads, torch.autograd.grad(want, (w, bias)), strict=True):
        assert_close(g, reference, rtol=0, atol=1e-6 * reference.norm().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once_more_and_no_worse(dtype):
    """The factor itself is not rounded to their dtype, which alone would lose 2**-9."""
    p = torch.zeros(1000, dtype=dtype, requires_grad=True)
    acc = PerplexityAccumulator([p])
    x, target = make_logits((5, 11)), make_target((5,), 11)
    out = cross_entropy_with_stats(x, target, reduction="sum")
    acc.add(out)
    p.grad = torch.linspace(-3, 3, 1000, dtype=dtype)
    want = p.grad.double() * (out.perplexity.double() / 5)
    acc.finish()
    assert ((p.grad.double() - want).abs() <= 0.5001 * torch.finfo(dtype).eps * want.abs()).all()


def test_expected_items_keep_the_gradient_of_a_long_window_finite_in_fp16():
    """Thousands of tokens of one class: their sum passes 65504, their mean does not."""
    y = torch.zeros(4096, dtype=torch.long)
    grads = {}
    for items in (1.0, 4096 * 40):
        h = torch.full((4096, 1), 8.0, dtype=torch.float16)
        w = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
        acc = PerplexityAccumulator([w], expected_items=items)
        for _ in range(40):
            acc.add(linear_cross_entropy_with_stats(h, w, y, reduction="sum")).backward()
        assert_close(acc.finish(), torch.tensor(2.0, dtype=torch.float64), rtol=1e-6, atol=0)
        grads[items] = w.grad
    assert not grads[1.0].isfinite().all()
    # 2 * 8 * (p - [v = y]), p = 1/2
    assert_close(grads[4096 * 40], torch.tensor([[-8.0], [8.0]], dtype=torch.float16), rtol=1e-2, atol=0)  # of 40 sums


def test_it_stands_between_unscale_and_clip():
    """GradScaler's factor is undone first, the norm that is clipped is that of the perplexity."""
    x, target = make_logits((6, 11)), make_target((6,), 11)
    p = x.clone().requires_grad_()
    acc, optimizer = PerplexityAccumulator([p]), torch.optim.SGD([p], lr=1.0)
    scaler = torch.amp.GradScaler(on_device.device.type, init_scale=2.0**10)
    for a, b in ((0, 2), (2, 6)):
        scaler.scale(acc.add(cross_entropy_with_stats(p[a:b], target[a:b], reduction="sum", softcap=9.0))).backward()
    scaler.unscale_(optimizer)
    acc.finish()
    _, want = whole_gradient(x, target)
    assert_close(torch.nn.utils.clip_grad_norm_([p], 1e9), want.norm(), rtol=1e-5, atol=0)
    scaler.step(optimizer)
    assert_close(p.detach(), x - want, rtol=1e-5, atol=1e-6)


X, Y = make_logits((4, 5)).requires_grad_(), make_target((4,), 5)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (lambda: cross_entropy_with_stats(X, Y, reduction="sum", z_loss=0.1), "got z_loss=0.1. Leave z_loss out"),
        (lambda: cross_entropy_with_stats(X, Y), "not its mean; got reduction='mean'"),
        (lambda: linear_cross_entropy_with_stats(X, X, Y % 4), "not its mean; got reduction='mean'"),
        (lambda: cross_entropy_with_stats(X, Y, reduction="none"), "got a loss of shape (4,)"),
        (lambda: perplexity_of(X, Y), "which holds S and M; got Tensor"),
    ],
)
def test_what_does_not_add_up_is_refused_in_a_sentence(output, sentence):
    acc = PerplexityAccumulator([X])
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        acc.add(output())


@pytest.mark.parametrize(
    ("arguments", "keywords", "sentence"),
    [
        (([],), {}, "parameters must hold at least one tensor; got none"),
        ((["weight"],), {}, "parameters must be a torch.Tensor; got str"),
        (([X],), {"expected_items": 0}, "expected_items must be > 0 and finite; got 0"),
        (([X],), {"max_nll": -1.0}, "max_nll must be > 0"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, keywords, sentence):
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        PerplexityAccumulator(*arguments, **keywords)


def test_the_reference_backend_accumulates_as_well():
    x, target = make_logits((4, 7)).requires_grad_(), make_target((4,), 7)
    acc = PerplexityAccumulator([x])
    acc.add(cross_entropy_with_stats(x, target, reduction="sum", options=Options("reference"))).backward()
    assert_close(acc.finish(), perplexity_of(x, target).double(), rtol=1e-6, atol=0)


def test_nothing_counted_is_nan_and_zero():
    x = make_logits((3, 7)).requires_grad_()
    acc = PerplexityAccumulator([x])
    acc.add(cross_entropy_with_stats(x, torch.full((3,), -100), reduction="sum")).backward()
    assert math.isnan(acc.finish().item()) and not x.grad.any()
