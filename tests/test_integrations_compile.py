# SPDX-License-Identifier: Apache-2.0
"""Whole models under torch.compile(fullgraph=True): a small one written here, and a patched Llama of transformers.

`fullgraph=True` raises at a graph break; the counter counts graphs, so that a recompilation shows.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import on_device
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fused_ppl import linear_cross_entropy, linear_perplexity, next_token_targets
from fused_ppl.integrations.huggingface import patch
from fused_ppl.integrations.huggingface.head_calls import FusedCall, LossConfig

V, LENGTHS = 97, (9, 12, 20)
LOSSES = {"cross_entropy": linear_cross_entropy, "perplexity": linear_perplexity}
CASES = [("cross_entropy", how) for how in ("plain", "checkpointed", "autocast inside", "autocast outside")]


class TinyGPT(nn.Module):
    """One block of attention and a tied head; the loss inside, under `how`."""

    def __init__(self, loss: str, how: str) -> None:
        super().__init__()
        self.loss, self.how = LOSSES[loss], how
        self.embed, self.place = nn.Embedding(V, 16), nn.Embedding(32, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, V, bias=True)
        self.head.weight = self.embed.weight

    def head_loss(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(hidden, self.head.weight, target, linear_bias=self.head.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        hidden = self.block(
            hidden, is_causal=True, src_mask=nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        )
        target = next_token_targets(tokens)
        if self.how == "checkpointed":
            return checkpoint(self.head_loss, hidden, target, use_reentrant=False)
        with torch.autocast(on_device.device.type, torch.bfloat16, enabled=self.how == "autocast inside"):
            return self.head_loss(hidden, target)


def counted(model: nn.Module, backend: str = "aot_eager", **how: Any) -> tuple[Any, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter, **how), counter


def assert_same(run: Callable[[Any], torch.Tensor], model: nn.Module, compiled: Any, rtol: float) -> None:
    """The loss and every gradient, compiled and eager, over several lengths."""
    results = []
    for f in (model, compiled):
        model.zero_grad()
        loss = run(f)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for got, want in zip(*reversed(results), strict=True):
        assert (got - want).norm() <= rtol * want.norm() + 1e-7


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("loss", "how"), [*CASES, ("perplexity", "plain")])
def test_a_whole_model_is_one_graph(loss, how):
    torch.manual_seed(0)
    model = TinyGPT(loss, how)
    compiled, counter = counted(model)

    def run(f: Any, length: int) -> torch.Tensor:
        with torch.autocast(on_device.device.type, torch.bfloat16, enabled=how == "autocast outside"):
            return f(tokens(length))

    for length in LENGTHS:
        assert_same(lambda f, n=length: run(f, n), model, compiled, 2e-2 if "autocast" in how else 1e-5)
    assert counter.frame_count <= 2  # the first length, then any


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


@pytest.mark.parametrize(
    ("loss", "more"),
    [("cross_entropy", {}), ("cross_entropy", {"num_items_in_batch": torch.tensor(5)}), ("perplexity", {})],
    ids=["mean", "num_items", "perplexity"],
)
def test_a_patched_llama_is_one_graph(llama, loss, more):
    compiled, counter = counted(patch(llama, loss))
    for length in LENGTHS:
        batch = {"input_ids": tokens(length), "labels": tokens(length), **more}
        assert compiled(**batch).logits is None
        assert_same(lambda f, b=batch: f(**b).loss, llama, compiled, 1e-5)
    assert counter.frame_count <= 2


def test_a_patched_llama_compiles_around_autocast_and_checkpoints(llama):
    patch(llama)
    llama.gradient_checkpointing_enable()
    compiled, counter = counted(llama, dynamic=True)

    def run(f: Any, length: int) -> torch.Tensor:
        with torch.autocast(on_device.device.type, torch.bfloat16):
            return f(input_ids=tokens(length), labels=tokens(length)).loss

    try:
        for length in LENGTHS:
            assert_same(lambda f, n=length: run(f, n), llama, compiled, 2e-2)
    finally:
        llama.gradient_checkpointing_disable()
    assert counter.frame_count <= 2


def test_a_compiled_perplexity_of_a_part_of_a_batch_raises(llama):
    compiled, _ = counted(patch(llama, "perplexity"))
    batch = {"input_ids": tokens(9), "labels": tokens(9)}
    compiled(**batch, num_items_in_batch=torch.tensor(16))
    with pytest.raises(RuntimeError, match="PerplexityTrainerMixin"):
        compiled(**batch, num_items_in_batch=torch.tensor(17))


@pytest.mark.slow
def test_inductor_gives_the_numbers_of_eager(llama):
    compiled, counter = counted(patch(llama), "inductor", dynamic=True)
    for length in LENGTHS:
        assert_same(lambda f, n=length: f(input_ids=tokens(n), labels=tokens(n)).loss, llama, compiled, 1e-4)
    assert counter.frame_count <= 2  # as many as the native model


@pytest.mark.filterwarnings("ignore:fused_ppl computes with PyTorch's operators")  # of torch 2.6, whose Triton is old
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_waits_for_a_gpu(loss, fake_gpu):
    """What a CUDA graph records must not synchronise: head and loss function of a patched model, on a fake device."""
    with fake_gpu():
        head = types.SimpleNamespace(weight=torch.randn(V, 16, device="cuda"), bias=None)
        hidden = torch.randn(2, 9, 16, device="cuda")
        labels = torch.zeros(2, 9, dtype=torch.long, device="cuda")
        call = FusedCall(LossConfig(loss=loss), labels, labels, loss == "perplexity")
        call.head(head, hidden, None)
        items = {} if loss == "perplexity" else {"num_items_in_batch": torch.tensor(5, device="cuda")}
        value = call.reduce(None, torch.zeros(()), labels, shift_labels=labels, **items)
    assert value.device.type == "cuda"
