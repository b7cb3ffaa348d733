# SPDX-License-Identifier: Apache-2.0
"""A patched model beside other threads, wrappers that hang their work on what the head returns, and quantised heads."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
import transformers
from hf_cases import IDS, LABELS, llama, runs_fused
from hf_tiny import tiny_config

from fused_ppl import linear_cross_entropy
from fused_ppl.integrations.huggingface import patch
from fused_ppl.integrations.huggingface.swap import call_of

ROUNDS = 30


def in_threads(*functions) -> None:
    """Runs each ROUNDS times in a thread of its own, all at once, and raises what any of them raised."""
    barrier, errors = threading.Barrier(len(functions)), []

    def run(function) -> None:
        try:
            for _ in range(ROUNDS):
                barrier.wait(60)
                function()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])


@pytest.fixture
def slow_head(monkeypatch):
    """A head that gives other threads the time to meet it."""
    native = nn.Linear.forward

    def forward(self, input):
        threading.Event().wait(0.002)
        return native(self, input)

    monkeypatch.setattr(nn.Linear, "forward", forward)


@pytest.mark.parametrize("other", ["logits", "train", "generate"])
def test_threads_that_share_a_model_do_not_see_each_others_calls(other, slow_head):
    model = patch(llama().train())
    loss = model(IDS, labels=LABELS).loss.item()
    with torch.no_grad():
        logits = model(IDS).logits
    tokens = model.generate(IDS[:, :4], max_new_tokens=2, do_sample=False)

    def train():
        assert model(IDS, labels=LABELS).loss.item() == loss

    def look():
        with torch.no_grad():
            assert_close(model(IDS).logits, logits, rtol=0, atol=0)

    def generate():
        assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=2, do_sample=False), tokens)

    in_threads(train, {"logits": look, "train": train, "generate": generate}[other])
    assert call_of(model) is None and call_of(model.lm_head) is None


class Sharded(torch.autograd.Function):
    """As DeepSpeed's ZeRO-3 hangs the gathering of a weight for backward on what a module has returned."""

    @staticmethod
    def forward(ctx, output, module):
        ctx.module = module
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        ctx.module.gather()
        return gradient, None


def shard_outside_of_forward(head: nn.Linear) -> None:
    """The weight is there in forward, and in backward once the gradient has come through what forward returned."""
    whole = head.weight.data.clone()

    def gather(*_):
        head.weight.data = whole

    def release(module, args, output):
        head.weight.data = whole.new_empty(0)
        return Sharded.apply(output, module)

    head.gather = gather
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)


@pytest.mark.parametrize("tail", ["plain", "scaled and capped"])
def test_the_loss_hangs_on_what_the_heads_module_has_returned(tail):
    if tail == "plain":
        model = llama()
    else:
        config = tiny_config("gemma2")
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    patch(model.train())
    gathered = []
    shard_outside_of_forward(model.lm_head)
    kept = model.lm_head.gather
    model.lm_head.gather = lambda *_: (gathered.append(True), kept())
    out = model(IDS, labels=LABELS)
    assert out.logits is None and model.lm_head.weight.numel() == 0
    out.loss.backward()
    assert gathered and model.lm_head.weight.grad.abs().sum() > 0
    assert not any("returned" in str(hook) for hook in model.lm_head._forward_hooks.values())  # ours is gone


def test_weights_that_zero_3_has_sharded_are_refused_by_name():
    model = llama()
    for parameter in model.parameters():
        parameter.ds_id = 1
    with pytest.raises(ValueError, match=r"ZeRO-3; patch it before deepspeed\.initialize"):
        patch(model)


class Quantised(Tensor):
    """A weight that keeps the class of its module, as torchao's do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = torch.utils._pytree.tree_map(lambda a: a.inner if isinstance(a, Quantised) else a, args)
        out = function(*args, **(kwargs or {}))
        return Quantised(out) if function is torch.ops.aten.detach.default else out


def test_a_weight_that_was_quantised_after_patching_runs_natively_with_one_warning():
    model = patch(llama().train())
    assert runs_fused(model)
    want = model(IDS, labels=LABELS).loss
    model.lm_head.weight = nn.Parameter(Quantised(model.lm_head.weight.detach()), requires_grad=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = [model(IDS, labels=LABELS) for _ in range(2)][-1]
    assert out.logits is not None
    assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    (said,) = [str(w.message) for w in told if "fused_ppl" in str(w.message)]
    assert "runs its native loss" in said and "Quantised" in said


def test_a_quantised_head_is_refused_with_the_way_out():
    model = llama()
    model.lm_head.weight = nn.Parameter(Quantised(model.lm_head.weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match="only its own class can read its numbers; keep its own loss, or"):
        patch(model)
    packed = torch.zeros(7, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match="how quantised weights are stored"):
        linear_cross_entropy(torch.zeros(3, 4), packed, torch.zeros(3, dtype=torch.long))


def test_an_encoder_decoder_is_told_what_is_supported():
    config = transformers.T5Config(vocab_size=97, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="encoder-decoder, and only models that predict their own next"):
        patch(transformers.T5ForConditionalGeneration(config))
