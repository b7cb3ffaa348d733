# SPDX-License-Identifier: Apache-2.0
"""Tensors on the meta device have shapes and no numbers, and so have their losses and gradients."""

from __future__ import annotations

import options as option_table
import pytest
import torch

import fused_ppl
from fused_ppl import Options

META = torch.device("meta")
REDUCTIONS = ["mean", "sum", "none", "sequence"]


def of_logits(device, reduction, dtype, **keywords):
    x = torch.zeros(2, 3, 11, device=device, dtype=dtype, requires_grad=True)
    y = torch.zeros(2, 3, device=device, dtype=torch.long)
    out = fused_ppl.cross_entropy_with_stats(x, y, class_dim=-1, reduction=reduction, **keywords)
    return out, torch.autograd.grad(out.loss.sum() + out.perplexity.sum(), x)


def of_head(device, reduction, dtype, **keywords):
    tensors = [torch.zeros(s, device=device, dtype=dtype, requires_grad=True) for s in ((2, 3, 8), (11, 8), (11,))]
    y = torch.zeros(2, 3, device=device, dtype=torch.long)
    out = fused_ppl.linear_cross_entropy_with_stats(
        *tensors[:2], y, linear_bias=tensors[2], reduction=reduction, **keywords
    )
    return out, torch.autograd.grad(out.loss.sum() + out.perplexity.sum(), tensors)


CASES = {
    "plain": {},
    "options": option_table.numbers(fused_ppl.cross_entropy_with_stats),
    "vocab": {"options": Options(memory_budget=1)},
    "reference": {"options": Options(backend="reference")},
    "compact": {"options": Options(gradient_columns=3)},
    "screen": {"options": Options(gradient_tolerance=0.1, screen="int8")},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("of", [of_logits, of_head])
def test_shapes_and_dtypes_are_those_of_a_cpu(of, reduction, dtype, case):
    for (a, grads), (b, expected) in [[of(device, reduction, dtype, **CASES[case]) for device in (META, "cpu")]]:
        for mine, real in zip((*a, *grads), (*b, *expected), strict=True):
            assert (mine is None) == (real is None)
            if mine is not None:
                assert mine.is_meta
                assert (mine.shape, mine.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("loss", [fused_ppl.cross_entropy, fused_ppl.perplexity])
def test_plain_losses_modules_and_items(loss):
    x = torch.zeros(4, 7, device=META, requires_grad=True)
    y = torch.zeros(4, device=META, dtype=torch.long)
    loss(x, y).backward()
    assert x.grad.is_meta and x.grad.shape == x.shape
    assert fused_ppl.cross_entropy(x, y, num_items=3).shape == ()
    assert fused_ppl.cross_entropy(x * 1, y, options=Options(inplace_backward=True)).requires_grad
    head = fused_ppl.LinearCrossEntropyLoss(5, 7, device=META)
    value = head(torch.zeros(4, 5, device=META), y)
    value.backward()
    assert head.linear.weight.grad.shape == (7, 5)
