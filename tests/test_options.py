# SPDX-License-Identifier: Apache-2.0
"""The table of options has a row for every keyword of the public losses, and what it makes is what it says."""

from __future__ import annotations

import inspect

import options
import pytest
import torch

from fused_ppl import cross_entropy, perplexity
from fused_ppl.testing import make_target

# keywords that are no option of the formula; the suites have them as dimensions of their own
NO_ROW = {
    *("input", "target", "linear_weight", "linear_bias", "class_dim"),  # what the loss is of
    *("ignore_index", "reduction"),  # each test chooses them with its targets and its upstream
    *("group", "vocab_group", "options"),  # how it runs
}


@pytest.mark.parametrize("function", options.FUNCTIONS)
def test_every_keyword_has_its_row(function):
    parameters = inspect.signature(function).parameters
    assert set(parameters) <= NO_ROW | set(options.ROW), "give the new option its row in tests/options.py"
    for name, parameter in parameters.items():
        if name in options.ROW:
            assert parameter.default == options.ROW[name].default, name


def test_every_row_is_an_option_of_some_loss():
    for option in options.OPTIONS:
        assert any(options.takes(function, option) for function in options.FUNCTIONS), option.keyword
        assert option.values[0].alone and option.values[0].pairs, option.keyword
    assert len(options.VALUE) == sum(len(option.values) for option in options.OPTIONS)  # no name twice


@pytest.mark.parametrize("name", options.VALUE)
def test_a_value_fits_its_batch_and_is_the_same_each_time(name):
    option, target = options.VALUE[name][0], make_target((2, 3), 19)
    made = options.value_of(name, 19, target)
    if isinstance(made, torch.Tensor):
        shapes = {"weight": (19,), "token_weight": (2, 3), "num_items": ()}
        assert made.shape == shapes[option.keyword] and made.device == target.device
        assert torch.equal(made, options.value_of(name, 19, target))
    assert options.keywords([name], 19, target).keys() == {option.keyword}


def test_weights_that_cancel_do_so_exactly():
    target = make_target((2, 3), 19)
    weights = options.value_of("token_weight that cancels", 19, target).flatten()
    assert weights.sum() == 0 and weights[[0, 3, 4, 5]].sum() == 0
    assert not options.value_of("weight zero at targets", 19, target)[target].any()


def test_a_loss_gets_what_it_takes():
    assert options.numbers(cross_entropy).keys() == {"label_smoothing", "logit_scale", "softcap", "z_loss"}
    assert options.numbers(perplexity).keys() == {"label_smoothing", "logit_scale", "softcap", "max_nll"}
    assert "num_items" in options.one_each(cross_entropy) and "num_items" not in options.together(cross_entropy)
