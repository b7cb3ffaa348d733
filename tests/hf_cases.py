# SPDX-License-Identifier: Apache-2.0
"""A small Llama, a batch, and what the tests of patched models ask of both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

IDS = torch.tensor([[5, 9, 23, 44, 61, 7, 80], [11, 3, 90, 14, 33, 52, 8]])
LABELS = torch.tensor([[-100, -100, 23, 44, 61, 7, 80], [11, 3, 90, 14, 33, -100, -100]])


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, **more,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def step(model: Any, **more: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=LABELS, **more).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: tuple[torch.Tensor, dict[str, torch.Tensor]], want: tuple[torch.Tensor, dict[str, Any]]) -> None:
    assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def runs_fused(model: Any) -> bool:
    return model(input_ids=IDS, labels=LABELS).logits is None


@contextlib.contextmanager
def one_warning(words: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=words) as caught:
        yield
    assert len([w for w in caught if "fused_ppl" in str(w.message)]) == 1
