# SPDX-License-Identifier: Apache-2.0
"""The tolerance policy can fail, on each kind of error that it is there for; and the inputs are what they say."""

from __future__ import annotations

import math

import pytest
import torch

from fused_ppl import Options, cross_entropy
from fused_ppl.testing import (
    KINDS,
    assert_as_good_as_eager,
    error_and_bound,
    make_logits,
    make_target,
    value_and_gradient,
)

F64 = torch.float64
TRUTH = torch.tensor([[0.9, -0.3, 1e-3], [1e-4, 2e-4, -3e-4]], dtype=F64)


def fails(actual, truth=TRUTH, eager=None, **keywords):
    with pytest.raises(AssertionError) as caught:
        assert_as_good_as_eager(actual, truth.to(actual.dtype) if eager is None else eager, truth, "it", **keywords)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounding_passes_and_a_few_ulp_more_fail(dtype):
    eps = torch.finfo(dtype).eps
    actual = TRUTH.to(dtype)
    assert_as_good_as_eager(actual, actual, TRUTH)
    wrong = actual.clone()
    wrong[0, 0] += 8 * eps
    assert "worst at flat index 0" in fails(wrong)


def test_the_message_names_the_worst_element_and_its_values():
    wrong = TRUTH.float()
    wrong[1, 2] = 7.0
    message = fails(wrong)
    for part in ("it: 1 of 6", "flat index 5", "got 7.0", "eager -0.0003", "truth -0.0003", "allowed"):
        assert part in message
    scalar = fails(torch.tensor(2.0), torch.tensor(1.0, dtype=F64))
    assert "1 of 1" in scalar


def test_a_small_row_is_not_excused_by_a_large_one_in_half_precision():
    wrong = TRUTH.bfloat16()
    wrong[1, 0] = 0  # 1e-4 lost: nothing beside the ulp of 0.9, and all of its own row
    eager = TRUTH.clone()
    assert "flat index 3" in fails(wrong, eager=eager)


def test_eager_allows_twice_its_own_error():
    eager = TRUTH.float()
    eager[0, 1] += 1e-4
    actual = TRUTH.float()
    actual[0, 2] += 1.9e-4
    assert_as_good_as_eager(actual, eager, TRUTH)
    actual[0, 2] += 0.3e-4
    assert "flat index 2" in fails(actual, eager=eager)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_must_stand_where_it_stands_in_truth(bad):
    wrong = TRUTH.float()
    wrong[0, 1] = bad
    fails(wrong)
    truth = TRUTH.clone()
    truth[0, 1] = bad
    assert_as_good_as_eager(wrong, wrong, truth)
    fails(TRUTH.float(), truth)
    fails(-wrong if not math.isnan(bad) else TRUTH.float(), truth)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_eager_that_is_not_finite_excuses_nothing(bad):
    broken = TRUTH.float()
    broken[0, 1] = bad
    fails(broken.clone(), eager=broken)
    fails(TRUTH.float() * 1.01, eager=broken)


def test_shapes_and_the_dtype_of_truth_are_checked():
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_as_good_as_eager(torch.zeros(1), torch.zeros(2), torch.zeros(2, dtype=F64))
    with pytest.raises(AssertionError, match="float64"):
        assert_as_good_as_eager(torch.zeros(2), torch.zeros(2), torch.zeros(2))


def test_the_ill_condition_of_exp_is_allowed_for_only_when_stated():
    truth = torch.tensor(20.0, dtype=F64).exp()
    off_by_an_ulp_of_twenty = (truth * (1 + 20 * 1e-7)).float()
    fails(off_by_an_ulp_of_twenty, truth)
    assert_as_good_as_eager(off_by_an_ulp_of_twenty, truth.float(), truth, condition=20.0)


def test_nothing_is_as_good_as_nothing():
    empty = torch.zeros(0, 3)
    assert_as_good_as_eager(empty, empty, empty.double())
    error, bound = error_and_bound(empty, empty, empty.double())
    assert error.shape == bound.shape == (0, 3)


def test_real_mistakes_fail():
    x, target = make_logits((6, 17)), make_target((6,), 17)

    def grad(x, **keywords):
        return value_and_gradient(lambda x: cross_entropy(x, target, options=Options("reference"), **keywords), x)[1]

    truth, eager = grad(x.double()), grad(x)
    planted = {
        "factor": eager * 1.000_01,
        "smoothing": grad(x, label_smoothing=1e-5),
        "scale": grad(x, logit_scale=1.000_01),
        "one entry": eager.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(1e-6), accumulate=True),
        "half precision inside": grad(x.bfloat16()).float(),
        "sign": -eager,
        "zero": torch.zeros_like(eager),
        "a row too far": eager.roll(1, 0),
    }
    for name, wrong in planted.items():
        with pytest.raises(AssertionError, match=name):
            assert_as_good_as_eager(wrong, eager, truth, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_inputs_are_the_same_every_time_and_what_they_say(kind, dtype):
    x = make_logits((2, 3, 40), dtype, kind=kind)
    assert x.shape == (2, 3, 40)
    assert x.dtype == dtype
    assert torch.equal(x, make_logits((2, 3, 40), dtype, kind=kind))
    assert not torch.equal(x, make_logits((2, 3, 40), dtype, kind=kind, seed=1))
    if kind == "flat":
        assert x.abs().max() < 0.01
    elif kind == "peaked":
        assert x.float().softmax(-1).amax(-1).min() > 0.5
    elif kind == "wild":
        assert x.isneginf().any()
        assert x.max() > 9e3
        assert x[x.isfinite()].min() < -9e3
        assert not x.isneginf().all(-1).any()
    else:
        assert x.isfinite().all()


def test_targets_hold_the_first_and_the_last_class():
    target = make_target((4, 5), 9)
    assert target.flatten()[0] == 0
    assert target.flatten()[-1] == 8
    ignored = make_target((40,), 9, ignored=0.5, ignore_index=3)
    assert 5 < (ignored == 3).sum() < 35
    assert make_target((), 9).shape == ()


def test_value_and_gradient_use_the_upstream_gradient():
    value, gradient = value_and_gradient(lambda x: x.square(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0]))
    assert value.tolist() == [1.0, 4.0]
    assert gradient.tolist() == [2.0, -12.0]
    _, gradient = value_and_gradient(lambda x: x.square().sum(), torch.tensor([1.0, 2.0]), 0.5)
    assert gradient.tolist() == [1.0, 2.0]
