# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/per_token_losses.md give the value and the gradients of an implementation over full logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import fused_ppl

PAGE = Path(__file__).parents[1] / "docs" / "per_token_losses.md"
B, T, D, V = 4, 9, 7, 31


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(compile(block, PAGE.name, "exec"), namespace)
    return namespace


def batch() -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    target = torch.randint(V, (B, T))
    target[:, :2] = -100
    target[1, 5:] = -100
    return hidden, weight, target


def full(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_prob, entropy and whether each token counts, from full logits."""
    prediction = torch.distributions.Categorical(logits=hidden @ weight.T)
    counted = target != -100
    return prediction.log_prob(target.clamp(min=0)) * counted, prediction.entropy() * counted, counted


def same(recipe: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Value and gradients, with an upstream gradient that is not 1."""
    leaves = [t for t in inputs if t.requires_grad]
    got, want = recipe(*inputs), plain(*inputs)
    assert_close(got, want, rtol=1e-10, atol=1e-12)
    gradients = (torch.autograd.grad(-1.7 * value, leaves) for value in (got, want))
    for mine, other in zip(*gradients, strict=True):
        assert_close(mine, other, rtol=1e-8, atol=1e-11)


REFERENCE = torch.linspace(-30, -20, B, dtype=torch.float64)
DESIRABLE = torch.tensor([True, False, False, True])


def plain_dpo(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    c = full(hidden, weight, target)[0].sum(-1) - REFERENCE
    return torch.log(1 + torch.exp(-0.1 * (c[[0, 2]] - c[[1, 3]]))).mean()


def plain_simpo(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    log_prob, _, counted = full(hidden, weight, target)
    c = log_prob.sum(-1) / counted.sum(-1)
    return torch.log(1 + torch.exp(-(2.0 * (c[[0, 2]] - c[[1, 3]]) - 0.5))).mean()


def plain_orpo(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    log_prob, _, counted = full(hidden, weight, target)
    p = (log_prob.sum(-1) / counted.sum(-1)).exp()
    odds = p / (1 - p)
    return -p[[0, 2]].log().mean() + 0.1 * torch.log(1 + odds[[1, 3]] / odds[[0, 2]]).mean()


def plain_kto(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    gain = 0.1 * (full(hidden, weight, target)[0].sum(-1) - REFERENCE - 0.3)
    return (1 / (1 + torch.where(DESIRABLE, gain.exp(), (-gain).exp()))).mean()


PREFERENCES = {
    "dpo": (plain_dpo, {"reference": REFERENCE}),
    "simpo": (plain_simpo, {}),
    "orpo": (plain_orpo, {}),
    "kto": (plain_kto, {"reference": REFERENCE, "desirable": DESIRABLE, "z0": 0.3}),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_losses_of_preferences(recipes, name):
    plain, constants = PREFERENCES[name]
    same(lambda *inputs: recipes[name](*inputs, **constants), plain, *batch())


def mean_of(function: Callable[..., Tensor], *constants: Tensor) -> Callable[..., Tensor]:
    def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        log_prob, entropy, counted = full(hidden, weight, target)
        return function(*(values[counted] for values in (log_prob, entropy, *constants))).mean()

    return plain


def plain_grpo(log_prob: Tensor, entropy: Tensor, advantage: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    ratio = log_prob.exp() / old.exp()
    clipped = torch.where(ratio < 0.8, 0.8, torch.where(ratio > 1.2, 1.2, ratio))
    worse = torch.where(ratio * advantage < clipped * advantage, ratio * advantage, clipped * advantage)
    other = reference.exp() / log_prob.exp()
    return -worse - 0.01 * entropy + 0.04 * (other - other.log() - 1)


def plain_cispo(log_prob: Tensor, entropy: Tensor, advantage: Tensor, old: Tensor) -> Tensor:
    ratio = (log_prob.exp() / old.exp()).detach()
    return -torch.where(ratio > 2, 2.0, ratio) * advantage * log_prob


@pytest.mark.parametrize(("name", "plain", "constants"), [("grpo", plain_grpo, 3), ("cispo", plain_cispo, 2)])
def test_losses_of_policies(recipes, name, plain, constants):
    inputs = batch()
    with torch.no_grad():
        now = full(*inputs)[0]
    given = (torch.randn(B, T).double(), now + 0.4 * torch.randn(B, T), now + torch.randn(B, T))[:constants]

    def recipe(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fused_ppl.linear_token_loss(hidden, weight, target, recipes[name], *given)

    same(recipe, mean_of(plain, *given), *inputs)


SUPERVISED = {
    "dft": lambda log_prob, entropy: -log_prob.exp().detach() * log_prob,
    "focal": lambda log_prob, entropy: -((1 - log_prob.exp()) ** 2) * log_prob,
    "poly1": lambda log_prob, entropy: -log_prob + 1 - log_prob.exp(),
    "unlikelihood": lambda log_prob, entropy: -(1 - log_prob.exp()).log(),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_losses(recipes, name):
    def recipe(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fused_ppl.linear_token_loss(hidden, weight, target, recipes[name])

    same(recipe, mean_of(SUPERVISED[name]), *batch())


def test_two_heads_are_more_rows(recipes):
    hidden, weight, target = batch()

    def recipe(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return recipes["two_heads"](torch.stack((hidden, hidden.tanh())), weight, target, recipes["focal"])

    def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        after = F.pad(target[:, 1:], (0, 1), value=-100)
        parts = [full(h, weight, y) for h, y in ((hidden, target), (hidden.tanh(), after))]
        losses = [SUPERVISED["focal"](log_prob[counted], None) for log_prob, _, counted in parts]
        return torch.cat(losses).mean()

    same(recipe, plain, hidden, weight, target)
