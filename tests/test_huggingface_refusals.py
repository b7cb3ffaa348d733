# SPDX-License-Identifier: Apache-2.0
"""What `patch` refuses and leaves as it was, what happens to a patched model later, and PEFT."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
import transformers
from hf_cases import IDS, LABELS, assert_same, llama, one_warning, runs_fused, step
from hf_tiny import tiny_config

from fused_ppl.integrations.huggingface import patch, unpatch
from fused_ppl.integrations.huggingface.swap import FusedHead, call_of

# what it refuses, and leaves as it was


class Masked(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits[..., 7] = -torch.inf
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Learned(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state) * self.temperature
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Twice(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        self.lm_head(self.model(input_ids).last_hidden_state)
        return super().forward(input_ids, labels=labels, **kwargs)


class Reweighted(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            out.loss = out.loss * (1 + out.logits.std())  # a loss of the logits beside the one of the loss function
        return out


class Steeper(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = 2 * logits - logits.detach()  # the same numbers, twice the gradient
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Bypassed(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)


class MyLinear(torch.nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Masked, "it masks logits"),
        (Learned, "has parameters to be trained"),
        (Twice, "it calls its head 2 times"),
        (Reweighted, "on one batch its native loss is"),
        (Steeper, "the gradient of its hidden states is 5.0e-01 from the native one"),
        (Bypassed, "it calls its head 0 times"),
        (transformers.LlamaForSequenceClassification, "it has no output head"),
        (transformers.LlamaModel, "it has no output head"),
    ],
)
def test_a_model_that_is_not_understood_is_refused_and_left_as_it_was(cls, reason):
    model = cls(llama().config)
    model.model.eval() if hasattr(model, "model") else None
    model.weird = None
    before = {name: (dict(vars(m)), type(m)) for name, m in model.named_modules()}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"{cls.__name__} cannot be patched: .*{reason}.* It was left as it was"):
        patch(model)
    assert torch.equal(state, torch.get_rng_state())
    for name, module in model.named_modules():
        assert (dict(vars(module)), type(module)) == before[name], name
    assert all(p.grad is None for p in model.parameters())


def test_other_refusals():
    model = llama()
    model.lm_head = MyLinear(16, 97)
    with pytest.raises(ValueError, match=r"its head is a .*MyLinear, not a plain torch\.nn\.Linear"):
        patch(model)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="meta device"):
        patch(model)
    model = llama()
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="its forward was replaced on the instance"):
        patch(model)
    with pytest.raises(TypeError, match="holds no model of transformers"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got int"):
        patch(3)
    masked = transformers.ModernBertConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    with pytest.raises(ValueError, match="on one batch its native loss is"):  # it shifts no labels
        patch(transformers.ModernBertForMaskedLM(masked))
    with pytest.raises(ValueError, match="it computes its loss without self"):
        patch(transformers.AutoModelForCausalLM.from_config(tiny_config("bart")))


# what changes under a patched model


def test_a_resized_head_runs_natively_with_one_warning():
    model = patch(llama())
    model.resize_token_embeddings(101)
    with one_warning(r"its head is another module now \(Linear\)"):
        assert not runs_fused(model)
        got = step(model)
    assert_same(got, step(unpatch(model)))
    assert runs_fused(patch(model))


def test_a_loss_function_of_ones_own_is_used():
    model = patch(llama())
    with one_warning("its loss_function was set"):
        model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 42
    assert step(model)[0] == 42


def test_a_forward_replaced_over_a_loss_of_ours_is_said():
    model = patch(llama(), "perplexity")
    with one_warning("replaced its forward"):
        model.forward = model.forward
    model = patch(llama())
    model.forward = model.forward  # cross-entropy is what the model computes by itself, too


def test_labels_that_the_model_changes_are_noticed():

    class Changing(transformers.LlamaForCausalLM):
        late = False

        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            loss = None
            if labels is not None:
                labels = labels + 1 if self.late else labels.clone()
                loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model = patch(Changing(llama().config).train())
    assert runs_fused(model)
    model.late = True
    with pytest.raises(RuntimeError, match="changed its labels"):
        model(IDS, labels=LABELS)
    assert call_of(model) is None and call_of(model.lm_head) is None and not model.lm_head._forward_hooks


# PEFT


@pytest.fixture
def peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        pytest.skip("needs peft (pip install peft)")
    import peft

    return peft


def lora(peft: Any, model: Any, *targets: str, save: list[str] | None = None) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, modules_to_save=save)
    return peft.get_peft_model(model, config).train()


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora_on_attention(peft, first):
    native = step(lora(peft, llama(), "q_proj", "v_proj"))
    model = lora(peft, patch(llama()), "q_proj", "v_proj") if first == "patch" else None
    model = model or patch(lora(peft, llama(), "q_proj", "v_proj"))
    assert runs_fused(model)
    assert_same(step(model), native)


def test_lora_on_the_head_is_refused_or_native(peft):
    native = step(lora(peft, llama(), "lm_head"))
    with pytest.raises(ValueError, match=r"its head is a peft\..*Linear, not a plain"):
        patch(lora(peft, llama(), "lm_head"))
    model = lora(peft, patch(llama()), "lm_head")
    with one_warning("its head is another module now"):
        assert not runs_fused(model)
    assert_same(step(model), native)


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_a_head_that_is_trained_beside_the_adapters(peft, first):
    native = step(lora(peft, llama(), "q_proj", save=["lm_head"]))
    if first == "patch":  # the wrapper copies our head: there is nothing to warn of
        model = lora(peft, patch(llama()), "q_proj", save=["lm_head"])
    else:
        model = patch(lora(peft, llama(), "q_proj", save=["lm_head"]))
    assert runs_fused(model)
    assert any("lm_head.modules_to_save" in name for name in native[1])
    assert_same(step(model), native)
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = model(input_ids=IDS, labels=LABELS).loss
    assert_close(base, llama()(input_ids=IDS, labels=LABELS).loss)
    assert isinstance(model.base_model.model.lm_head.modules_to_save.default, FusedHead)


def test_virtual_tokens_of_a_prompt(peft):
    torch.manual_seed(2)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(), config).train()
    native = step(model)
    patch(model)
    assert runs_fused(model)
    assert_same(step(model), native)


# what users did to a patched model, and a review found


def test_unpatch_under_a_wrapper_that_keeps_the_forward_leaves_a_model_that_runs():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (pip install accelerate)")
    model, native = llama(), llama()
    wrapped = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(patch(model))
    unpatch(wrapped)
    want = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(native)(IDS, labels=LABELS).loss
    assert_close(wrapped(IDS, labels=LABELS).loss, want)


def test_a_second_patch_that_is_refused_leaves_the_first():
    model = patch(llama(), "perplexity")
    with pytest.raises(ValueError, match="left as it was"):
        patch(model, batch={"bad": 1})
    assert runs_fused(model)


def test_evaluation_without_logits_is_the_native_loss_whatever_training_adds():
    native = llama().eval()
    model = patch(llama(), label_smoothing=0.3, z_loss=0.1).eval()
    want = native(IDS, labels=LABELS).loss
    assert_close(model(IDS, labels=LABELS, skip_logits=True).loss, want, rtol=1e-5, atol=1e-6)


def test_ignore_index_of_one_call_is_what_it_is_natively():
    labels = IDS.clone()
    labels[0, 3:6] = 0
    native, model = llama(), patch(llama())
    want = native(IDS, labels=labels, ignore_index=0).loss
    assert not torch.equal(want, native(IDS, labels=labels).loss)
    assert_close(model(IDS, labels=labels, ignore_index=0).loss, want, rtol=1e-5, atol=1e-6)
