# SPDX-License-Identifier: Apache-2.0
"""Screens of the compact fused head: what is kept is corrected, and the loss says how wrong it is."""

from __future__ import annotations

import dataclasses
import functools

import compact_cases
import pytest
import torch
from compact_cases import N, gradients, named, small_groups  # noqa: F401
from torch.testing import assert_close

from fused_ppl import Options, backends, linear_cross_entropy, linear_cross_entropy_with_stats
from fused_ppl.records import KeptColumns, TokenInputs
from fused_ppl.spec import LossSpec
from fused_ppl.testing import make_logits

V, D = compact_cases.WHOLE
make = functools.partial(compact_cases.make, v=V, d=D)
expand = functools.partial(compact_cases.expand, v=V)


@pytest.mark.parametrize("screen", [None, "int8", "bf16"])
def test_screens_correct_what_they_keep(screen, backend, fits):
    fits(N, V)
    tensors, target = make()
    exact, true = gradients(linear_cross_entropy, tensors, target, options=Options(backend=backend))
    options = Options(backend=backend, gradient_columns=1 / 2, screen=screen)
    value, found = gradients(linear_cross_entropy, tensors, target, options=options)
    _, unscreened = gradients(linear_cross_entropy, tensors, target, options=dataclasses.replace(options, screen=None))
    assert abs(value - exact) <= (0 if screen is None else 2e-3)
    for mine, same in zip(found, unscreened, strict=True):
        assert (mine - same).norm() <= (0 if screen is None else 5e-3) * same.norm()
    whole = dataclasses.replace(options, gradient_columns=V)
    for mine, same in zip(gradients(linear_cross_entropy, tensors, target, options=whole)[1], true, strict=True):
        assert_close(mine, same, rtol=1e-4, atol=1e-6)


@named
@pytest.mark.parametrize("screen", ["int8", "bf16"])
def test_a_screen_takes_every_option(keywords, screen, backend, fits):
    fits(N, V)
    tensors, target = make()
    keywords = expand(keywords)
    exact, true = gradients(linear_cross_entropy, tensors, target, options=Options(backend=backend), **keywords)
    options = Options(backend=backend, gradient_columns=180, screen=screen)
    value, found = gradients(linear_cross_entropy, tensors, target, options=options, **keywords)
    assert abs(value - exact) <= 1e-3 * max(1, abs(exact))
    for mine, same in zip(found, true, strict=True):
        assert (mine - same).norm() <= 2e-2 * same.norm()


def test_the_screened_loss_says_how_wrong_it_is():
    tensors, target = make(ignored=False)
    leaves = [t.requires_grad_() for t in tensors]
    for screen in ("int8", "bf16"):
        options = Options(backend="torch", gradient_columns=60, screen=screen)
        out = linear_cross_entropy_with_stats(*leaves[:2], target, linear_bias=leaves[2], options=options)
        exact = linear_cross_entropy_with_stats(*leaves[:2], target, linear_bias=leaves[2])
        wrong = (out.nll - exact.nll).abs().mean().item()
        assert 0.2 * wrong <= out.loss_error.item() <= 10 * wrong


@pytest.mark.cpu("a GPU converts the weight in every call")
def test_the_weight_is_converted_once_for_each_of_its_versions(monkeypatch):
    from fused_ppl.engines import screen

    calls = []
    original = screen._convert
    monkeypatch.setattr(screen, "_convert", lambda kind, x: calls.append(x.shape[0]) or original(kind, x))
    (hidden, weight, _), target = make()
    weight.requires_grad_()
    options = Options(backend="torch", gradient_columns=30, screen="int8")

    def converted() -> int:
        calls.clear()
        linear_cross_entropy(hidden, weight, target, options=options)
        return calls.count(V)

    assert [converted(), converted()] == [1, 0]
    with torch.no_grad():
        weight.mul_(1.5)
    assert [converted(), converted()] == [1, 0]


@pytest.mark.parametrize("screen", ["int8", "bf16"])
@pytest.mark.parametrize(
    "how",
    [
        *("fused", "data", "a row", "spared", "one", "swapped", "negated"),
        pytest.param("numpy", marks=pytest.mark.cpu("numpy shares the memory of a CPU")),
    ],
)
def test_a_write_that_is_no_version_is_noticed(how, screen):
    """Fused optimizers leave the version of a parameter as it is, and FSDP2 that of a gathered weight."""
    (hidden, weight, _), target = make(ignored=False)
    weight = torch.nn.Parameter(weight)
    options = Options(backend="torch", gradient_columns=30, screen=screen)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    loss = linear_cross_entropy(hidden, weight, target, options=options)
    loss.backward()
    if how == "fused":
        version = weight._version
        optimizer.step()
        assert weight._version == version  # else this shows nothing
    elif how == "data":
        weight.data.mul_(0.3)
    elif how == "numpy":
        weight.detach().numpy()[:] *= 0.3
    elif how == "a row":
        weight.data[7] = 5.0
    elif how == "spared":  # one element of each row, which is all that was looked at
        row = torch.arange(V)
        places = (row, row * 7919 % weight.shape[1])
        kept = weight.data[places]
        weight.data.mul_(0.3)
        weight.data[places] = kept
    elif how == "one":
        weight.data[target[0], 2] += 8.0
    elif how == "swapped":
        weight.data[target[0], :4] = weight.data[target[0]][[2, 3, 0, 1]]
    else:
        weight.data[:, 1::2] *= -1
    again = linear_cross_entropy(hidden, weight, target, options=options)
    assert torch.equal(again, linear_cross_entropy(hidden, weight.clone(), target, options=options))
    assert not torch.equal(again, loss)


@pytest.mark.parametrize("screen", ["int8", "bf16"])
def test_a_masked_target_has_an_infinite_loss_and_finite_gradients(screen, backend, fits):
    fits(N, V)
    (hidden, weight, bias), target = make(ignored=False)
    bias[target[0]] = -torch.inf
    keep = (target != target[0]) | (torch.arange(N) == 0)
    tensors, target = [hidden[keep], weight, bias], target[keep]
    options = Options(backend=backend, gradient_columns=60, screen=screen)
    value, found = gradients(linear_cross_entropy, tensors, target, reduction="sum", options=options)
    _, true = gradients(linear_cross_entropy, tensors, target, reduction="sum", options=Options(backend=backend))
    assert value == torch.inf
    for mine, same in zip(found[:2], true, strict=False):
        assert (mine - same).norm() <= 5e-2 * same.norm()


@pytest.mark.cpu("products in int8 of a GPU want multiples of 8")
def test_a_head_of_one_hidden_dimension():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 1, generator=g), torch.randn(50, 1, generator=g).requires_grad_()
    target = torch.randint(50, (9,), generator=g)
    found = linear_cross_entropy(hidden, weight, target, options=Options(gradient_columns=10, screen="int8"))
    assert abs(found - linear_cross_entropy(hidden, weight, target)) < 1e-2


def test_weights_that_sum_to_less_than_nothing_have_an_estimate():
    (hidden, weight, _), target = make(ignored=False)
    options = Options(gradient_columns=30, screen="int8")
    out = linear_cross_entropy_with_stats(
        hidden, weight.requires_grad_(), target, token_weight=-torch.ones(N), options=options
    )
    same = linear_cross_entropy_with_stats(hidden, weight, target, options=options)
    assert out.loss_error == same.loss_error


@pytest.mark.parametrize("softcap", [None, 500.0])
def test_ignored_rows_stay_zero_beside_a_bias_that_exp_cannot_hold(softcap, backend):
    """On a GPU ignored rows take part, with hidden states of 0, so their logits are the bias."""
    x, y = make_logits((4, 40)), torch.tensor([3, -100, 5, -100])
    x[1::2] = 200.0
    spec, module = LossSpec(softcap=softcap), backends.load_compact(backend)
    how = {"target_logit": x[:, 3].contiguous(), "signed": False, "memory_budget": None}
    stats, _, factors = module.nll_columns(x, TokenInputs(y, None, None), spec, **how)
    kept, exact, out = KeptColumns(torch.arange(30), torch.tensor([3, 0, 5, 0])), x[:, :30].clone(), torch.empty(4, 30)
    rest = module.nll_kept(x, kept, spec, stats=stats, factors=factors, out=out, memory_budget=None)
    assert not out[1::2].any() and not rest[1::2].any() and out[::2].all()
    how = {"screened": x, "stats": stats, "factors": factors, "weight_sum": 40.0, "memory_budget": None}
    corrected, rest, wrong = module.nll_rescreen(exact, kept, spec, **how)
    for values in (exact, rest, wrong, corrected.nll, corrected.loss):
        assert not values[1::2].any() and values.isfinite().all()
