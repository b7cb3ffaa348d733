# SPDX-License-Identifier: Apache-2.0
"""A patched model of transformers trains as before: same losses and gradients, no logits, and it says no in a sentence.

bench/hf_models.py tries every causal language model; twelve of them stand here.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
import transformers
from hf_models import Row, try_model
from hf_tiny import tiny_config

import fused_ppl
from fused_ppl.integrations.huggingface import patch, tail, unpatch
from fused_ppl.integrations.huggingface.swap import FusedHead, FusedModel

TWELVE = {
    "llama": "",
    "qwen3": "",
    "gpt2": "tied",
    "phi": "bias",
    "bert": "bias, tied",  # its head is a child of a child
    "gemma2": "softcap 2.5, tied",
    "recurrent_gemma": "softcap 2.5, tied",  # under another name, and a hybrid
    "cohere": "scale 0.7, tied",
    "granite": "scale 1.429",
    "falcon_h1": "scale 0.7",
    "mixtral": "",  # with the auxiliary loss of its experts
    "jamba": "",  # a hybrid with experts
}
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


# what equals the native model


@pytest.mark.parametrize("model_type", TWELVE)
def test_loss_gradients_and_logits_are_native(model_type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = try_model(model_type)
    assert (row.verdict, row.note) == ("equal", TWELVE[model_type]), row


def test_a_wrong_tail_would_be_seen(monkeypatch):
    monkeypatch.setattr(tail, "fit", lambda x, y, nice: (1.0, None))
    row: Row = try_model("gemma2")
    assert row.verdict == "refused" and "on one batch its native loss is" in row.note


def test_keywords_of_the_loss_are_native():
    model = llama()
    shifted = fused_ppl.next_token_targets(LABELS)
    cases = [
        {"num_items_in_batch": 23},
        {"num_items_in_batch": torch.tensor(23)},
        {"shift_labels": shifted.roll(1, 0)},  # other than those of `labels`
        {"shift_labels": shifted[:, -3:].contiguous(), "logits_to_keep": 3},
        {"output_hidden_states": True},
    ]
    native = [step(model, **case) for case in cases]
    patch(model)
    for case, want in zip(cases, native, strict=True):
        assert_same(step(model, **case), want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_perplexity_is_exp_of_the_native_loss(checkpointing):
    model = llama()
    loss, gradients = step(model)
    patch(model, "perplexity")
    if checkpointing:
        model.gradient_checkpointing_enable()
    want = loss.exp(), {n: g * loss.exp() for n, g in gradients.items()}
    assert_same(step(model), want)
    assert_same(step(model, num_items_in_batch=torch.tensor(9)), want)  # LABELS has nine targets
    model.eval()
    assert_close(model(input_ids=IDS, labels=LABELS).loss, loss)
    assert_close(model(input_ids=IDS, labels=LABELS, skip_logits=True).loss, loss)


def test_a_perplexity_of_a_part_of_a_batch_names_the_way_out():
    model = patch(llama(), "perplexity")
    with pytest.raises(RuntimeError, match="PerplexityTrainerMixin"):
        step(model, num_items_in_batch=10)


def test_options_of_the_loss_reach_it():
    model, batch = llama(), {"input_ids": IDS, "labels": LABELS}
    with torch.no_grad():
        logits = model(**batch).logits
    target = fused_ppl.next_token_targets(LABELS)
    patch(model, label_smoothing=0.1, z_loss=0.01)
    want = fused_ppl.cross_entropy(logits, target, class_dim=-1, label_smoothing=0.1, z_loss=0.01)
    assert_close(model(**batch).loss, want)
    patch(model, "perplexity", max_nll=0.5)
    assert_close(model(**batch).loss, fused_ppl.perplexity(logits, target, class_dim=-1, max_nll=0.5))
    with pytest.raises(ValueError, match="max_nll to loss='perplexity'"):
        patch(model, max_nll=1.0)
    with pytest.raises(ValueError, match=r"'cross_entropy' or 'perplexity'; got 'ppl'"):
        patch(model, "ppl")


def test_no_counted_target_gives_nan_and_zero_gradients():
    model = patch(llama())
    for more, value in (({}, float("nan")), ({"num_items_in_batch": 4}, 0.0)):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=torch.full_like(IDS, -100), **more).loss
        loss.backward()
        assert_close(loss.detach(), torch.tensor(value), equal_nan=True)
        assert all((p.grad == 0).all() for p in model.parameters())


def test_half_precision_and_autocast():
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = step(model)
        fused, _ = step(patch(model))
    assert fused.dtype == torch.float32 and abs(fused - loss) < 0.02 * loss
    model = unpatch(model).bfloat16()
    loss, _ = step(model)
    fused, _ = step(patch(model))
    assert fused.dtype == torch.float32 and abs(fused - loss) < 0.02 * loss


# what stays native, without a word


def test_without_labels_in_evaluation_and_in_generate_nothing_changes():
    model = llama()
    logits = model(IDS).logits
    model.eval()
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    evaluated = model(IDS, labels=LABELS)
    patch(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), generated)
    again = model(IDS, labels=LABELS)
    assert torch.equal(again.logits, evaluated.logits) and torch.equal(again.loss, evaluated.loss)
    model.train()
    assert torch.equal(model(IDS).logits, logits)
    assert torch.equal(model(IDS, labels=LABELS, skip_logits=False).logits, logits)


def test_positions_and_tuples():
    model = patch(llama())
    want = model(input_ids=IDS, labels=LABELS).loss
    assert_close(model(IDS, None, None, None, None, LABELS).loss, want)
    loss, logits, *_ = model(IDS, labels=LABELS, return_dict=False)
    assert_close(loss, want)
    assert logits is None


def test_other_positions_than_those_of_the_labels_are_left_to_the_model():
    model = llama()
    with pytest.raises(ValueError) as native:
        model(IDS, labels=LABELS, logits_to_keep=3)
    with one_warning("positions of its head do not match"), pytest.raises(ValueError) as patched:
        patch(model)(IDS, labels=LABELS, logits_to_keep=3)
    assert str(patched.value) == str(native.value)


# what it is to the rest of the world


def test_name_signature_and_state_are_the_original_ones(tmp_path):
    import inspect

    model, original = llama(), transformers.LlamaForCausalLM
    keys, native = list(model.state_dict()), step(model)
    patch(model)
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, original)
    assert inspect.signature(model.forward) == inspect.signature(original(model.config).forward)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = original.from_pretrained(tmp_path).train()
    assert type(loaded) is original
    assert_same(step(loaded), native)
    unpatch(model)
    assert type(model) is original and type(model.lm_head) is torch.nn.Linear
    assert not [k for k in (*vars(model), *vars(model.lm_head)) if "fused_ppl" in k]
    assert_same(step(model), native)
    assert unpatch(model) is model


def test_a_copy_calls_its_own_head():
    model = patch(llama(tie_word_embeddings=True))
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(pickled, weights_only=False)):
        assert type(other) is type(model) and other.lm_head.weight is other.model.embed_tokens.weight
        assert_same(step(other), step(model))
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert step(other)[0].item() == pytest.approx(torch.tensor(97.0).log().item())


def test_two_patches_are_one():
    model = patch(patch(llama(), "perplexity"))
    assert type(model).__mro__.count(FusedModel) == 1 and type(model).__mro__[2] is transformers.LlamaForCausalLM
    assert step(model)[0] < 10


def test_a_forward_that_accelerate_hooks_into_is_reached():
    hooks = pytest.importorskip("accelerate.hooks")
    model = llama()
    native = step(model)
    for module in (model, model.lm_head):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    patch(model)
    assert runs_fused(model)
    assert_same(step(model), native)
    unpatch(model)
    assert not runs_fused(model)
    for module in (model, model.lm_head):
        hooks.remove_hook_from_module(module)
    assert_same(step(model), native)


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
    assert model._fused_ppl_call is None and model.lm_head._fused_ppl_call is None


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
