# SPDX-License-Identifier: Apache-2.0
"""(S, M, Z) -> value and factor, by hand, with each factor checked as a derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from fused_ppl import reduction
from fused_ppl.records import RowStats, Upstream
from fused_ppl.spec import LossSpec

F64 = torch.float64


def scalar(value):
    return torch.tensor(float(value), dtype=F64)


def finish(s, m, z=None, *, num_items=None, **spec):
    spec = LossSpec(**spec)
    items = None if num_items is None else torch.tensor(float(num_items))
    z = None if z is None else scalar(z)
    return reduction.finish(reduction.Sums(scalar(s), scalar(m), z), spec, num_items=items, dtype=F64)


def test_mean_and_perplexity_by_hand():
    out = finish(6, 4)
    assert out.loss == 1.5
    assert out.perplexity.item() == pytest.approx(math.exp(1.5))
    assert out.total_weight == 4
    assert out.loss_factor == 0.25
    assert out.perplexity_factor.item() == pytest.approx(math.exp(1.5) / 4)


def test_sum_is_s_and_its_perplexity_is_that_of_the_mean():
    out = finish(6, 4, reduction="sum")
    assert out.loss == 6
    assert out.loss_factor == 1
    assert out.perplexity.item() == pytest.approx(math.exp(1.5))


def test_num_items_divides_the_loss_and_not_the_perplexity():
    out = finish(6, 4, num_items=3)
    assert out.loss == 2
    assert out.loss_factor.item() == pytest.approx(1 / 3)
    assert out.perplexity.item() == pytest.approx(math.exp(1.5))


def test_z_loss_is_added_to_the_loss_and_not_to_the_perplexity():
    for name, divisor in (("mean", 4), ("sum", 1)):
        out = finish(6, 4, 10, z_loss=0.5, reduction=name)
        assert out.loss == (6 + 5) / divisor
        assert out.perplexity.item() == pytest.approx(math.exp(1.5))
    out = finish(6, 4, 10, z_loss=0.5, num_items=2)
    assert out.loss == 5.5
    sums = reduction.Sums(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([4.0]))
    none = reduction.finish(sums, LossSpec("none", z_loss=0.5), num_items=None, dtype=F64)
    assert none.loss == 3
    assert none.perplexity.item() == pytest.approx(math.e)


def test_nothing_counted_is_nan_with_factor_zero():
    for s in (0.0, 3.0):
        for name in ("mean", "sequence"):
            out = finish(s, 0, reduction=name)
            assert out.loss.isnan()
            assert out.perplexity.isnan()
            assert out.loss_factor == 0
            assert out.perplexity_factor == 0
    out = finish(0, 0, reduction="sum")
    assert out.loss == 0
    assert out.perplexity.isnan()
    assert out.perplexity_factor == 0
    out = finish(0, 0, num_items=5)
    assert out.loss == 0


@pytest.mark.parametrize(
    "keywords", [{}, {"max_nll": 1.0}, {"max_nll": 2.0}, {"num_items": 3}, {"reduction": "none"}], ids=str
)
@pytest.mark.parametrize("s", [6.0, -2.0, 3.9])
def test_factors_are_the_derivatives_by_s(s, keywords):
    h = 1e-6
    low, mid, high = (finish(s + d, 4, **keywords) for d in (-h, 0.0, h))
    for value, factor in (("loss", "loss_factor"), ("perplexity", "perplexity_factor")):
        slope = (getattr(high, value) - getattr(low, value)) / (2 * h)
        assert_close(getattr(mid, factor), slope, rtol=1e-7, atol=1e-9)


def test_max_nll_keeps_the_slope_beyond_any_exponent():
    out = finish(1e5, 1, max_nll=30.0)
    assert out.perplexity.item() == pytest.approx(math.exp(30) * (1 + 1e5 - 30))
    assert out.perplexity_factor.item() == pytest.approx(math.exp(30))
    assert finish(1e5, 1).perplexity == math.inf


def rows(loss, weight, lse):
    tensors = [torch.tensor(t) for t in (loss, weight, loss, lse)]
    return RowStats(*tensors, torch.empty(0), torch.empty(0, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "shape", "s", "m", "z"),
    [
        ("mean", (2, 2), 10, 5, 1 + 2 * 4 + 16),
        ("sum", (4,), 10, 5, 25),
        ("none", (2, 2), [[1, 2], [3, 4]], [[1, 2], [1, 1]], [[1, 8], [0, 16]]),
        ("sequence", (2, 2), [3, 7], [3, 2], [9, 16]),
        ("sequence", (4,), 10, 5, 25),
    ],
)
def test_rows_are_summed_by_group(name, shape, s, m, z):
    stats = rows([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 1.0, 1.0], [1.0, 2.0, 0.0, -4.0])
    got = reduction.sum_rows(stats, LossSpec(name, z_loss=0.1), torch.Size(shape))
    for value, expected in zip(got, (s, m, z), strict=True):
        assert value.dtype == F64
        assert_close(value, torch.tensor(expected, dtype=F64))
    assert got[0].shape == reduction.group_shape(name, torch.Size(shape))


def test_sums_are_float64_whatever_the_rows_are():
    n = 2**24 + 8
    ones = torch.ones(n)
    stats = RowStats(ones, ones, ones, ones, torch.empty(0), torch.empty(0))
    s, m, _ = reduction.sum_rows(stats, LossSpec(), torch.Size((n,)))
    assert s == m == n


def test_upstream_of_a_row_is_that_of_its_group():
    factor, shape = torch.tensor([2.0, 3.0], dtype=F64), torch.Size((2, 3))
    upstream = Upstream(factor, factor * 2, torch.tensor([1.0, 10.0]), torch.tensor([0.5, 0.25]))
    of_s, of_z, *_ = reduction.row_upstream(upstream, LossSpec("sequence", z_loss=1.0), shape, F64)
    assert of_s.tolist() == [2 + 2] * 3 + [30 + 1.5] * 3
    assert of_z.tolist() == [2.0] * 3 + [30.0] * 3  # the perplexity has no z-loss


def test_upstream_of_one_loss_is_one_number():
    shape, factors = torch.Size((7,)), (scalar(3), scalar(5))
    of_s, *_ = reduction.row_upstream(Upstream(*factors, scalar(2), None), LossSpec(), shape, torch.float32)
    assert of_s.shape == () and of_s.item() == 6.0
    of_s, *_ = reduction.row_upstream(Upstream(*factors, None, scalar(2)), LossSpec(), shape, torch.float32)
    assert of_s.shape == () and of_s.item() == 10.0
