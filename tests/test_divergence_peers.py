# SPDX-License-Identifier: Apache-2.0
"""Divergences through the adapters are those of TRL, in plain PyTorch, and of Liger, in Triton's interpreter."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import on_device
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_ppl.integrations import liger, trl

N, V, D, OTHER = 7, 131, 16, 24
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def make() -> list[Tensor]:
    """Hidden states, weight and bias of the student, and the same of the teacher."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,), (N, OTHER), (V, OTHER), (V,))
    tensors = [torch.randn(shape, generator=generator) / 2 for shape in shapes]
    return [t.requires_grad_() for t in tensors[:3]] + tensors[3:]


@pytest.fixture(scope="module")
def of_trl() -> Any:
    reason = "needs the ChunkedDivergenceFunction of TRL 1.16 (pip install trl)"
    module = pytest.importorskip("trl.kernels.chunked_divergence", reason=reason)
    function = getattr(module, "ChunkedDivergenceFunction", None)
    return function or pytest.skip(reason)


def test_the_arguments_are_those_of_trl(of_trl):
    mine = inspect.signature(trl.ChunkedDivergenceFunction.apply).parameters.values()
    other = list(inspect.signature(of_trl.forward).parameters.values())[1:]  # without ctx
    assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in other]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "rest", [(), (0.7,), (1.3, 0.5, 3.0, 2.0, 4.0)], ids=["plain", "temperature", "scales and caps"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_same_values_and_gradients_as_trl(of_trl, bias, rest, beta, backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    upstream = torch.linspace(-2, 3, N)
    found = []
    for function in (trl.ChunkedDivergenceFunction, of_trl):
        student, weight, own, teacher, teacher_weight, others = make()
        biases = (own, others) if bias else (None, None)
        value, entropy = function.apply(student, weight, biases[0], teacher, teacher_weight, biases[1], beta, *rest)
        assert not entropy.requires_grad
        leaves = (student, weight, own) if bias else (student, weight)
        found.append((value.detach(), entropy, *torch.autograd.grad(value, leaves, upstream)))
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("temperature", "labels"), [(1.0, False), (1.5, True)])
def test_same_value_and_gradients_as_liger(temperature, labels, beta, backend, monkeypatch):
    if not on_device.interpreted():
        pytest.skip("Liger's kernels for this loss run on a GPU, or under TRITON_INTERPRET=1")
    theirs = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel").LigerFusedLinearJSD
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    target = torch.tensor([0, 1, -100, 5, 130, -100, 7]) if labels else None
    found = []
    for module in (liger.LigerFusedLinearJSD, theirs):
        student, weight, _, teacher, teacher_weight, _ = make()
        loss = module(jsd_beta=beta, temperature=temperature)(student, weight, teacher, teacher_weight, target)
        found.append((loss.detach(), *torch.autograd.grad(loss, (student, weight), torch.tensor(-1.7))))
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=2e-6)


def test_what_the_adapters_refuse():
    with pytest.raises(NotImplementedError, match="accum_dtype"):
        liger.LigerFusedLinearJSD(accum_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        liger.LigerFusedLinearJSD(temperature=0.0)
    student, weight, _, teacher, teacher_weight, _ = make()
    weight.ds_id = 1
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        trl.ChunkedDivergenceFunction.apply(student, weight, None, teacher, teacher_weight, None, 0.5)


def test_every_beta_has_one_direction():
    assert [liger.direction_of(b).get("direction") for b in BETAS] == [
        "forward", *itertools.repeat("jensen_shannon", 3), "reverse"
    ]  # fmt: skip
