# SPDX-License-Identifier: Apache-2.0
"""The losses as modules: the functions with their keywords given once."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import options as option_table
import pytest
import torch
from torch.testing import assert_close

import fused_ppl
from fused_ppl import CrossEntropyLoss, Options, PerplexityLoss
from fused_ppl.testing import make_logits, make_target

PAIRS = [(CrossEntropyLoss, fused_ppl.cross_entropy), (PerplexityLoss, fused_ppl.perplexity)]
KEYWORDS = {
    "ignore_index": 3,
    "reduction": "sequence",
    "class_dim": -1,
}


def sample():
    return make_logits((2, 5, 7)), make_target((2, 5), 7, ignored=0.2, ignore_index=3), torch.linspace(1, 2, 7)


@pytest.mark.parametrize(("module", "function"), PAIRS)
def test_every_keyword_reaches_the_function(module, function, options):
    x, target, weight = sample()
    keywords = {**KEYWORDS, **option_table.numbers(function), "options": options}
    token_weight = torch.rand(2, 5)
    expected = function(x, target, weight, token_weight=token_weight, **keywords)
    assert torch.equal(module(weight, **keywords)(x, target, token_weight=token_weight), expected)
    for name in keywords:  # each has an effect: it is not lost on the way
        if name not in ("reduction", "class_dim", "options"):
            fewer = {k: v for k, v in keywords.items() if k != name}
            if name == "ignore_index":
                fewer[name] = -100
            assert not torch.equal(module(weight, **fewer)(x, target, token_weight=token_weight), expected), name


@pytest.mark.parametrize(("module", "function"), PAIRS)
def test_constructor_takes_what_the_function_takes(module, function):
    of_function, of_module = (inspect.signature(f).parameters for f in (function, module))
    per_call = {"input", "target", "token_weight", "num_items"}
    assert list(of_module) == [name for name in of_function if name not in per_call]
    for name, parameter in of_module.items():
        assert parameter.default == of_function[name].default, name


def test_num_items_is_given_with_each_call(options):
    x, target = make_logits((6, 7)), make_target((6,), 7)
    total = fused_ppl.cross_entropy(x, target, reduction="sum", options=options)
    assert_close(CrossEntropyLoss(options=options)(x, target, num_items=12), total / 12)


@pytest.mark.parametrize(("module", "function"), PAIRS)
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "copy", "pickle"]
)
def test_copies_compute_the_same(clone, module, function, options):
    x, target, weight = sample()
    original = module(weight, **KEYWORDS, **option_table.numbers(function), options=options)
    assert torch.equal(clone(original)(x, target), original(x, target))


@pytest.mark.parametrize(("module", "function"), PAIRS)
def test_weight_is_a_buffer(module, function):
    loss = module(torch.ones(7))
    assert list(loss.state_dict()) == ["weight"]
    assert list(loss.parameters()) == []
    assert loss.to("meta").weight.device.type == "meta"
    assert list(module().state_dict()) == []


def test_state_survives_a_file(options):
    file = io.BytesIO()
    torch.save(CrossEntropyLoss(torch.arange(7.0)).state_dict(), file)
    file.seek(0)
    loss = CrossEntropyLoss(torch.zeros(7), options=options)
    loss.load_state_dict(torch.load(file, weights_only=True))
    assert loss.weight.tolist() == list(range(7))


@pytest.mark.parametrize(("module", "function"), PAIRS)
def test_weight_in_half_precision_follows_module_half(module, function, options):
    x, target = make_logits((6, 7)), make_target((6,), 7)
    loss = module(torch.tensor([1.0, 2, 3, 4, 5, 6, 7]), options=options)
    assert torch.equal(loss.half()(x, target), function(x, target, loss.weight.float(), options=options))


@pytest.mark.parametrize(("module", "function"), PAIRS)
def test_representation_names_the_keywords(module, function):
    text = repr(module(softcap=30.0, options=Options(backend="torch")))
    assert text.startswith(module.__name__)
    assert "softcap=30.0" in text
    assert "backend='torch'" in text


@pytest.mark.parametrize(("module", "function"), PAIRS)
def test_modules_take_the_place_of_torch_in_a_training_step(module, function, options):
    model = torch.nn.Linear(5, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, target = torch.randn(32, 5), make_target((32,), 7)
    loss = module(options=options)
    first = loss(model(x), target)
    for _ in range(20):
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
    assert loss(model(x), target) < first


def test_keywords_are_attributes_and_checked_at_construction():
    loss = fused_ppl.CrossEntropyLoss(label_smoothing=0.1, ignore_index=0)
    assert (loss.reduction, loss.ignore_index, loss.label_smoothing) == ("mean", 0, 0.1)
    with pytest.raises(ValueError, match="reduction must be one of"):
        fused_ppl.PerplexityLoss(reduction="avg")
