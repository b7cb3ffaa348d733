# SPDX-License-Identifier: Apache-2.0
"""Numbers that change from call to call, and sizes of which nothing is known, in one compiled graph."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
from torch.testing import assert_close

from fused_ppl import (
    checks,
    cross_entropy,
    linear_cross_entropy,
    linear_perplexity,
    next_token_targets,
    perplexity,
)
from fused_ppl.testing import make_logits, make_target


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


KNOWN = pytest.mark.skipif(
    not checks.TRACES_KNOWN, reason="before torch 2.8 Dynamo does not trace the question of what is known"
)


@KNOWN
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
    "name", ["logit_scale", "softcap", "z_loss", "label_smoothing", "max_nll", "num_items", "all of them"]
)
def test_a_number_that_is_another_in_every_step_makes_two_graphs(name, head, compiler, options):
    """One for the first number, and one for any. Each had its own, and the ninth was an error."""
    every = {"logit_scale", "softcap", "z_loss", "label_smoothing", "num_items"}
    names = every if name == "all of them" else {name}
    hidden, weight, target = make_logits((6, 5), seed=1) / 4, make_logits((11, 5), seed=2) / 4, make_target((6,), 11)
    losses = (linear_perplexity, perplexity) if name == "max_nll" else (linear_cross_entropy, cross_entropy)

    def step(weight, number):
        keywords = {**dict.fromkeys(names, number), "options": options}
        if head:
            return losses[0](hidden, weight, target, **keywords)
        return losses[1](hidden @ weight.T, target, **keywords)

    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    for i in range(11):
        results = []
        for function in (compiled, step):
            w = weight.clone().requires_grad_()
            loss = function(w, 0.1 + i / 20)
            results.append((loss.detach(), torch.autograd.grad(loss, w)[0]))
        for a, b in zip(*results, strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@KNOWN
def test_a_number_that_comes_to_nothing_is_nearly_nothing(options):
    """Whether there is a z_loss is part of the graph, and not how much."""
    x, target = make_logits((6, 11)), make_target((6,), 11)
    compiled = torch.compile(
        lambda x, z: cross_entropy(x, target, z_loss=z, options=options), backend="aot_eager", fullgraph=True
    )
    for z in (0.2, 0.1, 0.05, 0.0):
        assert_close(compiled(x, z), cross_entropy(x, target, z_loss=z, options=options), rtol=1e-6, atol=0)


@KNOWN
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("token_weight", [False, True])
def test_sizes_of_which_nothing_is_known_compile(head, token_weight, options):
    """`mark_unbacked`: the checks of shapes asked what nobody knows."""
    hidden, weight, target = make_logits((6, 5), seed=1) / 4, make_logits((11, 5), seed=2) / 4, make_target((6,), 11)
    u = torch.rand(6) if token_weight else None

    def step(hidden, target, weight):
        if head:
            return linear_cross_entropy(hidden, weight, target, token_weight=u, options=options)
        return cross_entropy(hidden @ weight.T, target, token_weight=u, options=options)

    results = []
    for function in (torch.compile(step, backend="aot_eager", fullgraph=True), step):
        w, h, y = weight.clone().requires_grad_(), hidden.clone(), target.clone()
        for tensor in (h, y):
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        loss = function(h, y, w)
        results.append((loss.detach(), torch.autograd.grad(loss, w)[0]))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_shapes_that_differ_raise_when_compiled(options):
    compiled = torch.compile(lambda x, y: perplexity(x, y, options=options), backend="aot_eager", dynamic=True)
    assert torch.equal(*(f(torch.zeros(4, 7), torch.zeros(4).long()) for f in (compiled, perplexity)))
    with pytest.raises(Exception, match=r"target|size|Expected cond"):
        compiled(torch.zeros(4, 7), torch.zeros(3).long())


def test_targets_of_packed_documents_compile_and_are_faked():
    """Their boundaries were looked at."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tokens, ends = torch.arange(12), torch.tensor([0, 5, 12])
    compiled = torch.compile(next_token_targets, backend="aot_eager", fullgraph=True)
    expected = next_token_targets(tokens, cu_seqlens=ends)
    assert torch.equal(compiled(tokens, cu_seqlens=ends), expected)
    with FakeTensorMode() as mode:
        fake = next_token_targets(mode.from_tensor(tokens), cu_seqlens=mode.from_tensor(ends))
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)
