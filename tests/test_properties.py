# SPDX-License-Identifier: Apache-2.0
"""What holds for every input: hypothesis looks for one where it does not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fused_ppl import Options, Perplexity, cross_entropy, cross_entropy_with_stats, perplexity

some = settings(max_examples=40)
REDUCTIONS = ["mean", "sum", "none", "sequence"]


@st.composite
def batches(draw, min_rows=1):
    """Logits, targets (some ignored) and token weights that are exact in float32, of any small shape."""
    n, v = draw(st.integers(min_rows, 12)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = torch.randn(n, v, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 8.0]))
    target = torch.randint(v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    token_weight = torch.randint(1, 64, (n,), generator=generator) / 16
    return logits, target, token_weight


@st.composite
def splits(draw, n):
    """Boundaries that cut n rows into parts, some of them empty."""
    cuts = draw(st.lists(st.integers(0, n), max_size=5))
    return sorted([0, n, *cuts])


def gradient(loss, x):
    (g,) = torch.autograd.grad(loss, x, retain_graph=True)
    return g


@some
@given(batches(), st.floats(-100, 100), st.sampled_from(REDUCTIONS), st.sampled_from([0.0, 0.2]))
def test_a_constant_added_to_a_row_changes_nothing(options, batch, shift, reduction, smoothing):
    x, target, token_weight = batch
    keywords = {"reduction": reduction, "label_smoothing": smoothing, "token_weight": token_weight, "options": options}
    x = (x * 1024).round() / 1024  # so that the shift is exact
    shifted = x + round(shift)
    a, b = (cross_entropy(t, target, **keywords) for t in (x, shifted))
    assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@some
@given(batches(), st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([1.0, 0.3]), st.booleans())
def test_gradient_rows_sum_to_zero(options, batch, smoothing, scale, weighted):
    x, target, token_weight = batch
    x.requires_grad_()
    weight = torch.linspace(0.5, 2, x.shape[1]) if weighted else None
    keywords = {"label_smoothing": smoothing, "logit_scale": scale, "token_weight": token_weight, "options": options}
    out = cross_entropy_with_stats(x, target, weight, max_nll=5.0, **keywords)
    for value, factor in ((out.loss, 1.0), (out.perplexity, math.exp(5))):
        sums = gradient(value, x).double().sum(1).abs()
        # what is added and subtracted in a row, of the size of p = 1
        assert (sums <= 1e-6 * scale * factor * (2 * token_weight / out.total_weight).nan_to_num(posinf=0)).all()


@some
@given(batches(), st.sampled_from(REDUCTIONS))
def test_ignored_rows_have_a_gradient_of_exactly_zero(options, batch, reduction):
    x, target, _ = batch
    ignored = target == -100
    x[ignored] = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, x[ignored].shape)]
    x.requires_grad_()
    out = cross_entropy_with_stats(x, target, reduction=reduction, softcap=3.0, label_smoothing=0.1, options=options)
    g = gradient((out.loss.nan_to_num() + out.perplexity.nan_to_num()).sum(), x)
    assert torch.equal(g[ignored], torch.zeros_like(g[ignored]))
    assert g.isfinite().all()


@some
@given(st.data())
def test_rows_split_in_any_way_give_the_same_m_to_the_bit_and_the_same_s(options, data):
    x, target, token_weight = data.draw(batches())
    bounds = data.draw(splits(x.shape[0]))
    weight = torch.arange(1, x.shape[1] + 1) / 4

    def sums(a, b):
        return cross_entropy_with_stats(
            x[a:b], target[a:b], weight, token_weight=token_weight[a:b], reduction="sum", options=options
        )

    whole = sums(0, x.shape[0])
    parts = [sums(a, b) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(sum(p.total_weight for p in parts), whole.total_weight)
    assert_close(sum(p.loss.double() for p in parts), whole.loss.double(), rtol=1e-6, atol=1e-6)
    assert_close(torch.cat([p.nll for p in parts]), whole.nll, rtol=1e-6, atol=1e-6)
    if whole.total_weight > 0:
        combined = (sum(p.loss.double() for p in parts) / whole.total_weight).exp()
        assert_close(combined, whole.perplexity.double(), rtol=1e-5, atol=0)


@some
@given(st.data())
def test_the_metric_does_not_depend_on_the_batches(options, data):
    x, target, token_weight = data.draw(batches())
    bounds = data.draw(splits(x.shape[0]))
    whole, merged = Perplexity(options=options), Perplexity(options=options)
    whole.update(x, target, token_weight=token_weight)
    for a, b in itertools.pairwise(bounds):
        part = Perplexity(options=options)
        part.update(x[a:b], target[a:b], token_weight=token_weight[a:b])
        merged.merge(part)
    assert_close(merged.compute(), whole.compute(), rtol=1e-6, atol=0, equal_nan=True)


@some
@given(batches(), st.permutations(range(12)))
def test_the_order_of_the_rows_does_not_matter(options, batch, order):
    x, target, token_weight = batch
    order = torch.tensor([i for i in order if i < x.shape[0]])
    x.requires_grad_()
    a = perplexity(x, target, token_weight=token_weight, max_nll=9.0, options=options)
    b = perplexity(x[order], target[order], token_weight=token_weight[order], max_nll=9.0, options=options)
    assert_close(a, b, rtol=1e-5, atol=0, equal_nan=True)
    assert_close(gradient(a, x), gradient(b, x), rtol=1e-4, atol=1e-6)


@some
@given(batches(), st.floats(0.1, 5))
def test_perplexity_is_at_least_one_and_at_most_its_bounds(options, batch, scale):
    x, target, _ = batch
    out = cross_entropy_with_stats(x, target, logit_scale=scale, reduction="none", options=options)
    assert (out.nll >= 0).all()
    assert (out.perplexity >= 1).all()
    assert (out.entropy >= -1e-6).all()
    assert (out.entropy <= math.log(x.shape[1]) + 1e-5).all()


@some
@given(batches(min_rows=2), st.integers(1, 5000))
def test_the_budget_of_memory_changes_no_number(backend, batch, budget):
    x, target, token_weight = batch
    x.requires_grad_()

    def run(memory_budget):
        out = cross_entropy_with_stats(
            x, target, token_weight=token_weight, softcap=9.0, options=Options(backend, memory_budget)
        )
        return (*(t.detach() for t in out[:7]), gradient(out.loss.nan_to_num(), x))

    for a, b in zip(run(None), run(budget), strict=True):
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_properties_can_fail(options):
    """A loss that is wrong in one place is found."""
    x, target = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 1, 2, 8])
    g = gradient(cross_entropy(x, target, z_loss=0.1, options=options), x)
    assert (g.sum(1).abs() > 1e-3).all()  # z-loss moves every row: rows that sum to zero are a property, no tautology
    with pytest.raises(AssertionError):
        assert_close(*(cross_entropy(t, target, z_loss=0.1, options=options) for t in (x, x + 1)))
