# SPDX-License-Identifier: Apache-2.0
"""The loss object for torchtitan, beside torchtitan's own chunked loss, as its trainer uses both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

# what `torchtitan.components.loss` imports; installing all that torchtitan asks for is not needed
loss = pytest.importorskip(
    "torchtitan.components.loss",
    reason="needs torchtitan (pip install --no-deps torchtitan spmd_types tyro docstring_parser)",
    exc_type=ImportError,
)
from fused_ppl.integrations.torchtitan import FusedLinearCrossEntropyLoss  # noqa: E402

B, T, D, V = 2, 8, 16, 50


def run(config: Any, items: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    decoder, head = nn.Linear(D, D), nn.Linear(D, V, bias=False)
    tokens, labels = torch.randn(B, T, D), torch.randint(V, (B, T))
    labels[0, :3] = -100
    loss_fn = config.build(compile_config=None)
    assert isinstance(loss_fn, loss.ChunkedLossWrapper)  # what the trainer asks before it hands over the head
    loss_fn.set_lm_head(head)
    value, metrics = loss_fn(decoder(tokens), labels, items, positions=torch.arange(T).expand(B, T))
    assert metrics == {}
    value.backward()
    return value.detach(), head.weight.grad, decoder.weight.grad, decoder.bias.grad


@pytest.mark.parametrize("items", [None, torch.tensor(29.0)], ids=["sum", "of all ranks"])
def test_value_and_gradients_are_those_of_the_chunked_loss(items):
    want = run(loss.ChunkedLossWrapper.Config(num_chunks=4), items)
    got = run(FusedLinearCrossEntropyLoss.Config(), items)
    assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_validation_and_misuse():
    loss_fn = FusedLinearCrossEntropyLoss.Config(label_smoothing=0.1).build()
    hidden, labels = torch.randn(B, T, D), torch.randint(V, (B, T))
    with pytest.raises(RuntimeError, match="set_lm_head"):
        loss_fn(hidden, labels)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear; got Identity"):
        loss_fn.set_lm_head(nn.Identity())
    head = nn.Linear(D, V)
    loss_fn.set_lm_head(head)
    with torch.no_grad():
        value, _ = loss_fn(hidden, labels)
        logits = head(hidden).flatten(0, 1)  # a plain call is a plain head
    want = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=0.1)
    assert_close(value, want)


class Capped(nn.Linear):
    def forward(self, input):
        return 5 * torch.tanh(super().forward(input) / 5)


def test_a_head_with_a_forward_of_its_own_is_refused():
    with pytest.raises(TypeError, match="Capped with a forward of its own"):
        FusedLinearCrossEntropyLoss.Config().build().set_lm_head(Capped(D, V))


def test_plain_shards_of_tensor_parallelism_are_refused(monkeypatch):
    loss_fn = FusedLinearCrossEntropyLoss.Config().build()
    loss_fn.set_lm_head(nn.Linear(D, V))
    monkeypatch.setattr(loss, "get_spmd_backend", lambda: "spmd_types")
    monkeypatch.setattr(loss, "spmd_mesh_size", lambda axis: 2 if axis == "tp" else 1)
    with pytest.raises(NotImplementedError, match="tensor parallelism"):
        loss_fn(torch.randn(B, T, D), torch.randint(V, (B, T)))
