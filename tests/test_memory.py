# SPDX-License-Identifier: Apache-2.0
"""Large buffers on a CPU come from numpy, and are tensors like any other."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import fused_ppl
from fused_ppl.engines import memory
from fused_ppl.testing import make_logits, make_target

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4), (2, 3, 4)], ids=str)
def test_shape_dtype_layout_and_alignment(shape, dtype):
    buffer = memory.empty(shape, dtype, CPU)
    assert buffer.shape == shape and buffer.dtype == dtype and buffer.is_contiguous() and buffer.storage_offset() == 0
    if buffer.numel():
        assert buffer.data_ptr() % memory.ALIGNMENT == 0
    buffer.fill_(2)
    assert buffer.sum() == 2 * buffer.numel()


def test_two_buffers_share_nothing_and_outlive_their_makers():
    a, b = (memory.empty((1000,), torch.float32, CPU).fill_(i) for i in (1, 2))
    assert a.sum() == 1000 and b.sum() == 2000


def test_gradients_on_such_a_buffer_are_those_on_any_other(monkeypatch):
    logits, target = make_logits((6, 37)), make_target((6,), 37)
    hidden, weight = torch.randn(6, 8), torch.randn(37, 8)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (logits, hidden, weight)]
        fused_ppl.perplexity(leaves[0], target).backward()
        fused_ppl.linear_perplexity(leaves[1], leaves[2], target).backward()
        return [leaf.grad for leaf in leaves]

    large = gradients()
    monkeypatch.setattr(memory, "LARGE", 2**60)
    assert all(torch.equal(a, b) for a, b in zip(large, gradients(), strict=True))


def test_a_gradient_can_be_copied_saved_and_changed_in_place():
    logits = make_logits((6, 37)).requires_grad_()
    fused_ppl.perplexity(logits, make_target((6,), 37)).backward()
    copied = copy.deepcopy(logits.grad)
    stream = io.BytesIO()
    torch.save(logits.grad, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream), copied)
    logits.grad.mul_(2)
    assert torch.equal(logits.grad, 2 * copied)
