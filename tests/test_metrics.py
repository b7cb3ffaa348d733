# SPDX-License-Identifier: Apache-2.0
"""The streamed metric: against hand values, against one pass over everything, and against torchmetrics."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch

from fused_ppl import Options, Perplexity, cross_entropy_with_stats
from fused_ppl.testing import make_logits, make_target


def shards(n=23, v=11):
    x, target = make_logits((n, v)), make_target((n,), v, ignored=0.2)
    return x, target, [(x[a:b], target[a:b]) for a, b in itertools.pairwise([0, 1, 8, 8, n])]


def test_perplexity_of_two_vocabularies_by_hand(options):
    metric = Perplexity(class_dim=-1, options=options)
    metric.update(torch.zeros(2, 5, 16), torch.zeros(2, 5, dtype=torch.long))
    metric.update(torch.zeros(1, 3, 64), torch.zeros(1, 3, dtype=torch.long))
    assert metric.compute().item() == pytest.approx(math.exp((10 * math.log(16) + 3 * math.log(64)) / 13), rel=1e-7)
    assert metric.bits_per_token.item() == pytest.approx((10 * 4 + 3 * 6) / 13, rel=1e-7)
    assert metric.compute().dtype == torch.float64


def test_batches_of_any_size_give_the_perplexity_of_all(options):
    x, target, parts = shards()
    metric = Perplexity(options=options)
    for part in parts:
        metric.update(*part)
    truth = torch.nn.functional.cross_entropy(x.double(), target).exp().item()
    assert metric.compute().item() == pytest.approx(truth, rel=1e-6)
    average = sum(perplexity_of(p, options) for p in parts if p[1].ne(-100).any()) / 3
    assert abs(average - truth) > 1e-2 * truth  # what averaging perplexities would have given


def perplexity_of(part, options):
    metric = Perplexity(options=options)
    metric.update(*part)
    return metric.compute().item()


def test_merge_in_any_order_is_the_same(options):
    _, _, parts = shards()

    def of(order):
        first, *rest = [Perplexity(options=options) for _ in parts]
        for metric, i in zip([first, *rest], order, strict=True):
            metric.update(*parts[i])
        for metric in rest:
            assert first.merge(metric) is first
        return first

    values = [of(order).compute().item() for order in itertools.permutations(range(4))]
    assert max(values) - min(values) <= 1e-15 * values[0]
    assert len({of(order).total_weight.item() for order in itertools.permutations(range(4))}) == 1


def test_agrees_with_torchmetrics(options):
    text = pytest.importorskip("torchmetrics.text", reason="torchmetrics is not installed")
    x, target = make_logits((3, 5, 11)), make_target((3, 5), 11, ignored=0.3)
    ours, theirs = Perplexity(class_dim=-1, options=options), text.Perplexity(ignore_index=-100)
    for _ in range(2):
        ours.update(x, target)
        theirs.update(x, target)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_weights_of_tokens_count(options):
    x, target = make_logits((6, 11)), make_target((6,), 11)
    target[2] = -100
    weight = torch.tensor([1.0, 2.0, math.nan, 0.0, 0.5, 3.0])
    metric = Perplexity(options=options)
    metric.update(x, target, token_weight=weight)
    nll = torch.nn.functional.cross_entropy(x.double(), target, reduction="none")
    kept = torch.tensor([0, 1, 3, 4, 5])
    truth = (nll[kept] * weight[kept]).sum() / 6.5
    assert metric.compute().log().item() == pytest.approx(truth.item(), rel=1e-6)
    assert metric.total_weight == 6.5


@pytest.mark.parametrize("ignore_index", [None, 0, 3])
def test_ignore_index_counts_for_nothing(ignore_index, options):
    x, target = make_logits((6, 11)), torch.tensor([0, 3, 3, 10, 0, 5])
    metric = Perplexity(ignore_index=ignore_index, options=options)
    metric.update(x, target)
    counted = torch.ones(6).bool() if ignore_index is None else target != ignore_index
    assert metric.total_weight == counted.sum()
    truth = torch.nn.functional.cross_entropy(x.double()[counted], target[counted]).exp()
    assert metric.compute().item() == pytest.approx(truth.item(), rel=1e-6)


def test_options_of_the_logits_are_used(options):
    x, target = make_logits((6, 11)), make_target((6,), 11)
    metric = Perplexity(logit_scale=0.5, softcap=2.0, options=options)
    metric.update(x, target)
    truth = torch.nn.functional.cross_entropy(2 * torch.tanh(x.double() / 4), target).exp()
    assert metric.compute().item() == pytest.approx(truth.item(), rel=1e-6)


def test_known_nll_are_added_in_every_form(options):
    x, target = make_logits((6, 11)), make_target((6,), 11, ignored=0.3)
    expected = Perplexity(options=options)
    expected.update(x, target)
    out = cross_entropy_with_stats(x, target, options=options)
    count = int(target.ne(-100).sum())
    for nll, weight in (
        (out.nll, count),
        (out.nll, out.total_weight),
        (out.nll, target.ne(-100)),
        (out.nll.sum(), count),
        (out.nll[target != -100], torch.ones(count)),
    ):
        metric = Perplexity()
        metric.update_nll(nll, weight)
        assert metric.compute().item() == pytest.approx(expected.compute().item(), rel=1e-6)
        assert metric.total_weight == count


def test_sums_of_half_precision_are_float64():
    metric = Perplexity()
    metric.update_nll(torch.full((2**17,), 2.0, dtype=torch.float16), 2**17)  # their sum overflows float16
    metric.update_nll(torch.full((1,), 2.0, dtype=torch.bfloat16), 1)
    assert metric.nll_sum == 2 * (2**17 + 1)
    assert metric.compute().item() == pytest.approx(math.exp(2), rel=1e-12)


def test_a_small_batch_after_a_huge_one_is_not_lost():
    metric = Perplexity()
    metric.update_nll(torch.tensor(2.0**25), 2**25)
    metric.update_nll(torch.tensor(1.0), 1)
    assert metric.total_weight == 2**25 + 1
    assert metric.nll_sum == 2**25 + 1


def test_huge_nll_overflows_to_inf_and_its_bits_do_not():
    metric = Perplexity()
    metric.update_nll(torch.tensor([1e4, 2e4]), 2)
    assert metric.compute() == math.inf
    assert metric.bits_per_token.item() == pytest.approx(1.5e4 / math.log(2))
    one_hundred_nats = Perplexity()
    one_hundred_nats.update_nll(torch.tensor([100.0]), 1)
    assert one_hundred_nats.compute().item() == pytest.approx(math.exp(100))  # beyond float32


def test_nothing_seen_is_nan_and_reset_forgets(options):
    metric = Perplexity(options=options)
    assert metric.compute().isnan()
    metric.update(torch.zeros(2, 4), torch.tensor([-100, -100]))
    assert metric.compute().isnan()
    metric.update(torch.zeros(2, 4), torch.tensor([1, 2]))
    assert metric.compute().item() == pytest.approx(4)
    metric.reset()
    assert metric.compute().isnan()
    metric.update(torch.zeros(2, 8), torch.tensor([1, 2]))
    assert metric.compute().item() == pytest.approx(8)


def test_the_graph_of_the_batch_is_not_kept(options):
    metric = Perplexity(options=options)
    metric.update(torch.zeros(2, 4, requires_grad=True) * 1, torch.tensor([1, 2]))
    metric.update_nll(torch.ones(2, requires_grad=True) * 1, torch.ones(2, requires_grad=True) * 1)
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alone(clone):
    metric = Perplexity(options=Options(backend="torch"))
    metric.update(torch.zeros(2, 4), torch.tensor([1, 2]))
    other = clone(metric)
    other.update(torch.zeros(2, 8), torch.tensor([1, 2]))
    assert metric.compute().item() == pytest.approx(4)
    assert other.compute().item() == pytest.approx(math.sqrt(32))


def test_representation_says_what_was_seen(options):
    metric = Perplexity(options=options)
    metric.update(torch.zeros(3, 4), torch.tensor([1, 2, 3]))
    assert repr(metric) == "Perplexity(4 over a total weight of 3)"
