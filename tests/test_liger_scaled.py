# SPDX-License-Identifier: Apache-2.0
"""Values and gradients are those of Liger's scaled cross-entropy, which on a CPU is plain PyTorch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fused_ppl.integrations import liger as adapter
from fused_ppl.testing import make_target

NAME = "LigerFusedLinearScaledCrossEntropyFunction"
N, V, D = 7, 129, 16


def make() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((N, D), (V, D))]


@pytest.fixture(scope="module")
def scaled() -> Any:
    reason = "needs liger-kernel 0.8.5 or newer (pip install liger-kernel)"
    function = getattr(pytest.importorskip("liger_kernel.ops", reason=reason), NAME, None)
    return function or pytest.skip(reason)


def test_the_arguments_of_the_scaled_cross_entropy(scaled):
    mine, other = (
        inspect.signature(function.apply).parameters.values()
        for function in (adapter.LigerFusedLinearScaledCrossEntropyFunction, scaled)
    )
    assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in other]


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize(("temperature", "ignore_index"), [(1.0, -100), (0.7, 3), (1.5, -1)])
def test_the_adapter_of_the_scaled_cross_entropy(
    temperature, ignore_index, return_entropy, scaled, backend, monkeypatch
):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    ours, theirs = make(), make()
    target = make_target((N,), V)
    target[::3] = ignore_index
    rest = (target, temperature, ignore_index, 2, return_entropy)
    got = adapter.LigerFusedLinearScaledCrossEntropyFunction.apply(*ours, *rest)
    want = scaled.apply(*theirs, *rest)
    assert isinstance(got, tuple) == isinstance(want, tuple) == return_entropy
    got, want = (out if return_entropy else (out,) for out in (got, want))
    upstream = [torch.linspace(-2, 3, N), torch.linspace(1, -1, N)][: len(want)]
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for mine, other in zip(
        torch.autograd.grad(got, ours, upstream), torch.autograd.grad(want, theirs, upstream), strict=True
    ):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"selected_token_ids": torch.tensor([1])}, "selected_token_ids must be None"),
        ({"temperature": -1.0}, r"temperature must be > 0; got -1\.0"),
    ],
)
def test_what_the_scaled_cross_entropy_has_and_we_have_not_raises(keywords, message):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        adapter.LigerFusedLinearScaledCrossEntropyFunction.apply(*make(), make_target((N,), V), **keywords)
