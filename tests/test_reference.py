# SPDX-License-Identifier: Apache-2.0
"""The oracle, against numbers computed by hand and against torch.nn.functional: all other tests rest on it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fused_ppl
from fused_ppl import Options
from fused_ppl.testing import make_target

REFERENCE = Options(backend="reference")
LN2 = math.log(2)
# probabilities 1/2, 1/4, 1/8, 1/8: one, two, three and three bits
DYADIC = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)


def cross_entropy(*args, **keywords):
    return fused_ppl.cross_entropy(*args, options=REFERENCE, **keywords)


def perplexity(*args, **keywords):
    return fused_ppl.perplexity(*args, options=REFERENCE, **keywords)


def stats(*args, **keywords):
    return fused_ppl.cross_entropy_with_stats(*args, options=REFERENCE, **keywords)


def test_nll_of_known_probabilities_is_their_negative_logarithm():
    nll = cross_entropy(DYADIC.log().expand(4, 4), torch.arange(4), reduction="none")
    assert_close(nll / LN2, torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=torch.float64))


def test_perplexity_is_two_to_the_mean_number_of_bits():
    logits, target = DYADIC.log().expand(4, 4) + 5.0, torch.arange(4)  # a shift changes nothing
    assert perplexity(logits, target).item() == pytest.approx(2 ** (-1 / 4 * (-1 - 2 - 3 - 3)), rel=1e-14)
    p = logits.softmax(1).gather(1, target[:, None])
    assert_close(perplexity(logits, target), 2 ** (-p.log2().mean()))


def test_perplexity_of_data_drawn_as_predicted_is_two_to_the_entropy():
    target = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])  # the frequencies are the probabilities
    out = stats(DYADIC.log().expand(8, 4), target)
    entropy_in_bits = 1.75
    assert out.perplexity.item() == pytest.approx(2**entropy_in_bits, rel=1e-14)
    assert_close(out.entropy / LN2, torch.full((8,), entropy_in_bits, dtype=torch.float64))


def test_perplexity_of_uniform_predictions_is_the_number_of_classes():
    assert perplexity(torch.zeros(3, 17).double(), torch.tensor([0, 5, 16])).item() == pytest.approx(17.0, rel=1e-14)


def test_gradient_of_perplexity_by_hand():
    logits = DYADIC.log().expand(4, 4).clone().requires_grad_()
    perplexity(logits, torch.arange(4)).backward()
    assert_close(logits.grad, 2**2.25 / 4 * (DYADIC - torch.eye(4, dtype=torch.float64)))


def test_gradient_of_perplexity_is_perplexity_times_that_of_cross_entropy():
    x = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    target = make_target((6,), 11)
    loss = F.cross_entropy(x, target)
    (of_loss,) = torch.autograd.grad(loss, x)
    (of_perplexity,) = torch.autograd.grad(perplexity(x, target), x)
    assert_close(of_perplexity, loss.exp().detach() * of_loss, rtol=1e-13, atol=1e-14)


def test_label_smoothing_and_class_weights_by_hand():
    logits, target = torch.tensor([[math.log(3.0), 0.0]]).double(), torch.tensor([0])  # p = 3/4, 1/4
    of_first, of_second = math.log(4 / 3), math.log(4)
    smoothed = cross_entropy(logits, target, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.9 * of_first + 0.05 * (of_first + of_second))
    weight = torch.tensor([2.0, 3.0])
    weighted = 0.9 * 2 * of_first + 0.05 * (2 * of_first + 3 * of_second)
    assert cross_entropy(logits, target, weight, label_smoothing=0.1, reduction="sum").item() == pytest.approx(weighted)
    assert cross_entropy(logits, target, weight, label_smoothing=0.1).item() == pytest.approx(weighted / 2)


def test_token_weights_by_hand():
    logits, target = DYADIC.log().expand(3, 4), torch.tensor([0, 1, -100])
    out = stats(logits, target, token_weight=torch.tensor([3.0, 1.0, 7.0]))
    assert (out.loss / LN2).item() == pytest.approx((3 * 1 + 1 * 2) / 4)
    assert out.total_weight.item() == 4


def test_z_loss_by_hand_enters_the_loss_and_not_the_perplexity():
    logits, target = torch.tensor([[math.log(3.0), 0.0]]).double(), torch.tensor([1])  # lse = ln 4
    out = stats(logits, target, z_loss=0.5)
    assert out.loss.item() == pytest.approx(math.log(4) + 0.5 * math.log(4) ** 2)
    assert out.perplexity.item() == pytest.approx(4)


def test_z_loss_is_weighted_as_the_token_is():
    logits, target = torch.tensor([[math.log(3.0), 0.0]]).double(), torch.tensor([1])
    weight, token_weight = torch.tensor([5.0, 2.0]), torch.tensor([3.0])
    loss = cross_entropy(logits, target, weight, token_weight=token_weight, z_loss=0.5, reduction="sum")
    assert loss.item() == pytest.approx(6 * (math.log(4) + 0.5 * math.log(4) ** 2))


def test_softcap_and_scale_by_hand():
    # 2 tanh(x / 2) of ln 3 is 2 * (3 - 1) / (3 + 1) = 1
    logits, target = torch.tensor([[math.log(3.0), 0.0]]).double(), torch.tensor([0])
    assert cross_entropy(logits, target, softcap=2.0).item() == pytest.approx(math.log1p(math.exp(-1)))
    assert cross_entropy(logits, target, logit_scale=2.0).item() == pytest.approx(math.log(1 + 1 / 9))
    both = cross_entropy(logits / 4, target, logit_scale=4.0, softcap=2.0)  # scaled first, capped after
    assert both.item() == pytest.approx(math.log1p(math.exp(-1)))


def test_max_nll_goes_on_along_the_tangent():
    c = math.log(4.0)
    for shift, expected, slope in ((0.0, 2.0, 2.0), (3.0, 4 * (1 + math.log(2) + 3 - c), 4.0)):
        nll = math.log(2) + shift
        x = torch.tensor([math.log(math.expm1(nll)), 0.0], dtype=torch.float64, requires_grad=True)
        value = perplexity(x, torch.tensor(1), max_nll=c)
        assert value.item() == pytest.approx(expected)
        value.backward()
        assert x.grad[1].item() == pytest.approx(slope * math.expm1(-nll))


def test_num_items_replaces_the_denominator():
    logits, target = DYADIC.log().expand(4, 4), torch.arange(4)
    for items in (2, 2.0, torch.tensor(2), torch.tensor([2.0])):
        assert (cross_entropy(logits, target, num_items=items) / LN2).item() == pytest.approx(4.5)


def test_reduction_sequence_is_the_mean_over_the_last_dimension():
    logits, target = DYADIC.log().expand(2, 3, 4), torch.tensor([[0, 1, 2], [3, -100, 0]])
    out = stats(logits, target, reduction="sequence", class_dim=-1)
    assert_close(out.loss / LN2, torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert_close(out.perplexity, torch.tensor([4.0, 4.0], dtype=torch.float64))
    assert out.total_weight.tolist() == [3, 2]


@pytest.mark.parametrize("shape", [(7,), (5, 7), (4, 7, 3), (2, 7, 3, 2)], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_equals_torch_for_all_that_torch_offers(shape, ignore_index):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if len(shape) == 1:
        target = torch.tensor(2)
    else:
        target = make_target(shape[:1] + shape[2:], 7, ignored=0.3, ignore_index=ignore_index)
    weight = torch.rand(7, dtype=torch.float64)
    for w, a, reduction in itertools.product((None, weight), (0.0, 0.3, 1.0), ("mean", "sum", "none")):
        keywords = {"reduction": reduction, "label_smoothing": a, "ignore_index": ignore_index}
        ours, theirs = cross_entropy(x, target, w, **keywords), F.cross_entropy(x, target, w, **keywords)
        assert_close(ours, theirs)
        upstream = torch.randn_like(theirs)
        assert_close(*(torch.autograd.grad(loss, x, upstream)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("reduction", ["mean", "none", "sequence"])
def test_perplexity_is_exp_of_cross_entropy_by_definition(reduction, every_option):
    target = make_target((3, 4), 9, ignored=0.2)
    x = torch.randn(3, 4, 9, dtype=torch.float64)
    keywords = {**every_option(fused_ppl.perplexity, 9, target), "class_dim": -1, "reduction": reduction}
    del keywords["max_nll"]
    assert_close(perplexity(x, target, **keywords), cross_entropy(x, target, **keywords).exp())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence"])
def test_gradcheck_with_every_option(reduction, every_option):
    target = make_target((2, 3), 5, ignored=0.2)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    keywords = {**every_option(fused_ppl.cross_entropy, 5, target), "class_dim": -1, "reduction": reduction}

    def both(x):
        out = stats(x, target, max_nll=1.0, **keywords)
        return out.loss, out.perplexity

    assert torch.autograd.gradcheck(both, x)


def test_reference_differentiates_twice():
    target = make_target((3,), 4)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: perplexity(x, target, softcap=2.0), x)


def test_entropy_and_prediction_by_hand():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, -math.inf, 1.0], [9.0, 0.0, 0.0]]).double()
    out = stats(logits, torch.tensor([0, 0, -100]))
    p = torch.tensor([1.0, math.e**2, math.e**2], dtype=torch.float64) / (1 + 2 * math.e**2)
    assert_close(out.entropy, torch.tensor([-(p * p.log()).sum(), LN2, 0.0], dtype=torch.float64))
    assert out.predicted.tolist() == [1, 0, -1]  # the lowest index on ties
    assert_close(out.lse[:2], torch.tensor([math.log(1 + 2 * math.e**2), 1 + LN2], dtype=torch.float64))
    assert out.lse[2] == out.nll[2] == 0


def test_ignored_rows_get_zero_whatever_they_hold():
    x = torch.full((3, 4), math.nan, dtype=torch.float64)
    x[1] = torch.arange(4.0)
    x.requires_grad_()
    loss = cross_entropy(x, torch.tensor([-100, 2, -100]), z_loss=0.1, label_smoothing=0.1, softcap=3.0)
    loss.backward()
    assert loss.isfinite()
    assert x.grad[1].abs().min() > 0
    assert x.grad[[0, 2]].eq(0).all()
