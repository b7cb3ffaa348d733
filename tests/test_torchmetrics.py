# SPDX-License-Identifier: Apache-2.0
"""The metric of torchmetrics: beside its own Perplexity, in a collection, from logits, hidden states and sums."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fused_ppl

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")


@pytest.fixture
def batches():
    torch.manual_seed(0)
    made = []
    for n in (3, 7, 1):
        target = torch.randint(11, (2, n))
        target[0, 0] = -100
        made.append((2 * torch.randn(2, n, 11), target))
    return made


def metric(**keywords):
    from fused_ppl.integrations.torchmetrics import Perplexity

    return Perplexity(**keywords)


def truth(batches) -> float:
    logits = torch.cat([x.flatten(0, 1) for x, _ in batches]).double()
    return F.cross_entropy(logits, torch.cat([t.flatten() for _, t in batches])).exp().item()


def test_it_is_the_number_of_torchmetrics(batches):
    from torchmetrics.text import Perplexity as Theirs

    ours, theirs = metric(), Theirs(ignore_index=-100)
    for batch in batches:
        ours.update(*batch)
        theirs.update(*batch)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)
    assert ours.compute().item() == pytest.approx(truth(batches), rel=1e-6)
    ours.reset()
    assert math.isnan(ours.compute().item())


def test_an_unlikely_token_is_not_infinite():
    logits, target = torch.tensor([[[0.0, -200.0]]]), torch.tensor([[1]])
    ours = metric()
    ours.update(logits, target)
    assert ours.compute().item() == pytest.approx(math.exp(200), rel=1e-6)


def test_in_a_collection_by_forward_and_update(batches):
    collection = torchmetrics.MetricCollection({"ours": metric(), "again": metric()})
    for batch in batches:
        of_batch = collection(*batch)
        assert of_batch["ours"].item() == pytest.approx(truth([batch]), rel=1e-6)
    found = collection.compute()
    assert found["ours"].item() == found["again"].item() == pytest.approx(truth(batches), rel=1e-6)


def test_metrics_with_other_settings_do_not_share_their_sums_in_a_collection():
    collection = torchmetrics.MetricCollection({"all": metric(ignore_index=None), "text": metric(ignore_index=0)})
    torch.manual_seed(0)
    first, second = torch.randn(1, 6, 5), 3 * torch.randn(1, 6, 5)
    target = torch.tensor([[0, 1, 0, 2, 0, 3]])
    collection.update(first, target.clamp(min=1))  # both have the same sums
    collection.update(second, target)
    logits, targets = torch.cat([first[0], second[0]]), torch.cat([target[0].clamp(min=1), target[0]])
    for name, ignored in (("all", -100), ("text", 0)):
        truth = F.cross_entropy(logits, targets, ignore_index=ignored).exp()
        assert collection.compute()[name].item() == pytest.approx(truth.item(), rel=1e-6)


def test_a_bias_without_a_weight_is_refused():
    with pytest.raises(ValueError, match="linear_bias belongs to a linear_weight"):
        fused_ppl.Perplexity().update(torch.zeros(2, 3), torch.zeros(2).long(), linear_bias=torch.zeros(3))


def test_from_hidden_states_and_from_sums(batches):
    hidden, head, bias = torch.randn(2, 5, 4), torch.randn(11, 4), torch.randn(11)
    target = torch.randint(11, (2, 5))
    logits = hidden @ head.t() + bias
    found = [metric() for _ in range(3)]
    found[0].update(logits, target)
    found[1].update(hidden, target, linear_weight=head, linear_bias=bias)
    assert math.isnan(found[2].compute().item())  # which is not kept for later
    found[2].update_nll(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"), 10)
    values = [m.compute().item() for m in found]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)
    core = fused_ppl.Perplexity()
    core.update(hidden, target, linear_weight=head, linear_bias=bias)
    assert core.compute().item() == pytest.approx(values[0], rel=1e-6)


def test_merged_states_are_those_of_one_metric(batches):
    whole, parts = metric(), [metric() for _ in batches]
    for part, batch in zip(parts, batches, strict=True):
        part.update(*batch)
        whole.update(*batch)
    first = parts[0]
    for part in parts[1:]:
        first.merge_state(part)
    assert first.compute().item() == pytest.approx(whole.compute().item(), rel=1e-14)
    for copied in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert copied.compute().item() == whole.compute().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_and_a_half_default_dtype(dtype, batches):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = metric().half()
        ours.update(batches[0][0].to(dtype), batches[0][1])
        assert ours.compute().dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert ours.compute().item() == pytest.approx(truth([(batches[0][0].to(dtype), batches[0][1])]), rel=1e-3)
