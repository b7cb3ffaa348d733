# SPDX-License-Identifier: Apache-2.0
"""A patched model of transformers trains as before: same losses and gradients, no logits, and it says no in a sentence.

bench/hf_models.py tries every causal language model; twelve of them stand here.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
import transformers
from hf_cases import IDS, LABELS, assert_same, llama, one_warning, runs_fused, step
from hf_models import Row, try_model

import fused_ppl
from fused_ppl.integrations.huggingface import logit_transform, patch, unpatch
from fused_ppl.integrations.huggingface.swap import FusedModel

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
# what equals the native model


@pytest.mark.parametrize("model_type", TWELVE)
def test_loss_gradients_and_logits_are_native(model_type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = try_model(model_type)
    assert (row.verdict, row.note) == ("equal", TWELVE[model_type]), row


def test_a_wrong_tail_would_be_seen(monkeypatch):
    monkeypatch.setattr(logit_transform, "fit", lambda x, y, candidates: (1.0, None))
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


@pytest.mark.parametrize("items", [10, torch.tensor(10)])
def test_a_perplexity_of_a_part_of_a_batch_names_the_way_out(items):
    model = patch(llama(), "perplexity")
    with pytest.raises(RuntimeError, match="PerplexityTrainerMixin"):
        step(model, num_items_in_batch=items)


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
    out = model(IDS, None, None, None, None, LABELS)
    assert_close(out.loss, want)
    assert out.logits is None
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


def test_a_class_put_over_ours_stays():
    """fully_shard gives a module a subclass of the class that it finds."""
    model = patch(llama())
    native = step(unpatch(llama()))
    for module in (model, model.lm_head):
        module.__class__ = type("Over", (type(module),), {})
    assert runs_fused(model)
    assert not runs_fused(unpatch(model)) and type(model).__name__ == "Over"
    assert runs_fused(patch(model))
    assert_same(step(model), native)


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


def test_a_model_that_accelerate_wraps_and_unwraps_stays_patched(request):
    accelerate = pytest.importorskip("accelerate")
    state = accelerate.state.AcceleratorState
    state._reset_state(reset_partial_state=True)  # one for each process: a Trainer of another test may have made it
    request.addfinalizer(lambda: state._reset_state(reset_partial_state=True))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(patch(llama()))
    assert runs_fused(model)
    assert runs_fused(accelerator.unwrap_model(model))
    assert runs_fused(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    with pytest.raises(ValueError, match="its forward was replaced on the instance; patch it before"):
        patch(accelerator.prepare(llama()))


# images


def llava() -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=llama().config, image_token_index=96)
    pixels = torch.randn(2, 3, 8, 8)
    ids = torch.cat([IDS[:, :1], torch.full((2, 4), 96), IDS[:, 1:]], 1)  # four patches
    labels = torch.cat([LABELS[:, :1], torch.full((2, 4), -100), LABELS[:, 1:]], 1)
    model = transformers.LlavaForConditionalGeneration(config).train()
    return model, {"input_ids": ids, "pixel_values": pixels, "labels": labels}


@pytest.mark.parametrize("examined_on", ["tokens", "the batch"])
def test_a_model_that_sees(examined_on):
    model, batch = llava()

    def train() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    native = train()
    patch(model, batch=dict(batch) if examined_on == "the batch" else None)
    assert_same(train(), native)
    assert model(**batch).logits is None
    assert any("vision_tower" in name for name in native[1])
