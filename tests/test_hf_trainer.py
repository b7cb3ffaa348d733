# SPDX-License-Identifier: Apache-2.0
"""Trainer and SFTTrainer train a patched model to the weights of the native one, or of a loop written by hand."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs transformers (pip install transformers accelerate)")
pytest.importorskip("accelerate", reason="needs accelerate (pip install accelerate)")
import transformers

import fused_ppl
from fused_ppl.integrations.huggingface import PerplexityTrainerMixin, patch

STEPS, RATE, V = 5, 0.05, 97


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def data() -> list[dict[str, torch.Tensor]]:
    """Twenty sequences of one length, with prompts of all lengths that count for nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(20):
        ids = torch.randint(3, V, (10,), generator=generator)
        labels = ids.clone()
        labels[: i % 7] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class InOrderPerplexity(PerplexityTrainerMixin, InOrder):
    pass


def arguments(folder: Any, accumulation: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS, "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd", "seed": 0,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **more,
    }  # fmt: skip


def train(cls: type, model: Any, data: Any, folder: Any, accumulation: int, **more: Any) -> Any:
    trainer = cls(
        model=copy.deepcopy(model),
        args=transformers.TrainingArguments(**arguments(folder, accumulation, **more)),
        train_dataset=data,
        eval_dataset=data[:6],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def by_hand(model: Any, data: Any, accumulation: int, max_norm: float, rate: float = RATE) -> tuple[Any, list[float]]:
    """exp of the mean over each window as one batch, clipped, by SGD."""
    model, perplexities = copy.deepcopy(model).train(), []
    parameters = list(model.parameters())
    for i in range(STEPS):
        rows = data[i * accumulation : (i + 1) * accumulation]
        batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        perplexity = F.cross_entropy(logits, batch["labels"][:, 1:].flatten()).exp()
        gradients = torch.autograd.grad(perplexity, parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        scale = min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm else 1.0
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * scale * gradient
        perplexities.append(perplexity.item())
    return model, perplexities


def assert_same_weights(got: Any, want: Any, tolerance: float = 1e-6) -> None:
    for (name, a), (_, b) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert (a - b).abs().max() <= tolerance, name


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_cross_entropy_gives_the_weights_of_the_native_loss(model, data, tmp_path, accumulation, optim):
    # AdamW's first steps have the length of the rate whatever the gradient: a rounding counts as much as a gradient
    more = {"optim": optim, "learning_rate": RATE if optim == "sgd" else 1e-5}
    native = train(InOrder, model, data, tmp_path, accumulation, **more)
    fused = train(InOrder, patch(copy.deepcopy(model)), data, tmp_path, accumulation, **more)
    assert_same_weights(fused.model, native.model)
    assert fused.model.training and fused.model(**{k: v[None] for k, v in data[0].items()}).logits is None
    assert_close(logged(fused, "loss"), logged(native, "loss"), rtol=1e-5, atol=0)
    assert_close(fused.evaluate()["eval_loss"], native.evaluate()["eval_loss"], rtol=1e-5, atol=0)
    assert max((a - b).abs().max() for a, b in zip(native.model.parameters(), model.parameters(), strict=True)) > 1e-5


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize(("accumulation", "max_norm"), [(1, 0.0), (4, 0.0), (4, 1.0)])
def test_perplexity_gives_the_weights_of_a_loop_by_hand(model, data, tmp_path, accumulation, max_norm, patched):
    start = patch(copy.deepcopy(model), "perplexity") if patched else model
    rate = RATE if max_norm else RATE / V  # unclipped, the gradient is as many times longer
    more = {"max_grad_norm": max_norm, "learning_rate": rate}
    trainer = train(InOrderPerplexity, start, data, tmp_path, accumulation, **more)
    want, perplexities = by_hand(model, data, accumulation, max_norm, rate)
    assert_same_weights(trainer.model, want)
    assert_close(logged(trainer, "perplexity"), perplexities, rtol=1e-5, atol=0)
    assert_close([math.log(p) for p in perplexities], logged(trainer, "loss"), rtol=1e-5, atol=0)


def test_max_nll_bounds_the_factor(model, data, tmp_path):
    more = {"max_grad_norm": 0.0, "learning_rate": RATE / V, "max_steps": 1}
    plain = train(InOrderPerplexity, patch(copy.deepcopy(model), "perplexity"), data, tmp_path, 4, **more)
    bounded = patch(copy.deepcopy(model), "perplexity", max_nll=2.0)
    bounded = train(InOrderPerplexity, bounded, data, tmp_path, 4, **more)
    (norm,), (bounded_norm,) = logged(plain, "grad_norm"), logged(bounded, "grad_norm")
    (perplexity,) = logged(plain, "perplexity")
    assert bounded_norm == pytest.approx(norm * math.exp(2) / perplexity, rel=1e-4)


def test_evaluation_stays_cross_entropy_and_has_its_perplexity_beside(model, data, tmp_path):
    trainer = train(InOrderPerplexity, patch(copy.deepcopy(model), "perplexity"), data, tmp_path, 2)
    metrics = trainer.evaluate()
    metric = fused_ppl.Perplexity(class_dim=-1)
    for row in data[:6]:
        with torch.no_grad():
            logits = trainer.model(row["input_ids"][None]).logits
        metric.update(logits, fused_ppl.next_token_targets(row["labels"][None]))
    (line,) = [line for line in trainer.state.log_history if "eval_perplexity" in line]
    assert line["eval_perplexity"] == pytest.approx(metric.compute().item(), rel=1e-5)
    assert 4 < metrics["eval_loss"] < 6


def test_one_batch_a_step_needs_no_mixin(model, data, tmp_path):
    trainer = train(InOrder, patch(copy.deepcopy(model), "perplexity"), data, tmp_path, 1, max_grad_norm=1.0)
    want, perplexities = by_hand(model, data, 1, 1.0)
    assert_same_weights(trainer.model, want)
    assert_close(logged(trainer, "loss"), perplexities, rtol=1e-5, atol=0)


def test_several_batches_a_step_without_the_mixin_raise(model, data, tmp_path):
    with pytest.raises(RuntimeError, match=r"Train with class MyTrainer\(PerplexityTrainerMixin, Trainer\)"):
        train(InOrder, patch(copy.deepcopy(model), "perplexity"), data, tmp_path, 4)


def test_label_smoothing_of_the_trainer_takes_native_logits(model, data, tmp_path):
    native = train(InOrder, model, data, tmp_path, 2, label_smoothing_factor=0.1)
    fused = train(InOrder, patch(copy.deepcopy(model)), data, tmp_path, 2, label_smoothing_factor=0.1)
    assert_same_weights(fused.model, native.model, 0)


def test_what_the_mixin_cannot_scale_raises(model, data, tmp_path):
    class Uncounted(transformers.LlamaForCausalLM):
        accepts_loss_kwargs = False

    with pytest.raises(ValueError, match="needs num_items_in_batch"):
        train(InOrderPerplexity, Uncounted(model.config), data, tmp_path, 2)

    class Hurried(InOrderPerplexity):
        def _clip_grad_norm(self, model):
            return torch.tensor(1.0)

        def _get_grad_norm(self, model, grad_norm=None):
            return grad_norm

    with pytest.raises(RuntimeError, match="An optimizer step was made before"):
        train(Hurried, model, data, tmp_path, 2)
    config = transformers.MixtralConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    for experts in (transformers.MixtralForCausalLM(config), patch(transformers.MixtralForCausalLM(config))):
        with pytest.raises(ValueError, match="auxiliary loss of its experts"):
            train(InOrderPerplexity, experts, data, tmp_path, 2)


# TRL


@pytest.fixture
def sft(data: Any) -> Any:
    """SFTTrainer over the same rows, in order."""
    for name in ("trl", "datasets"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name} (pip install trl datasets)")
    import datasets
    import trl
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0")),
        pad_token="w1",
        eos_token="w2",
    )
    rows = datasets.Dataset.from_list(
        [{"input_ids": r["input_ids"].tolist(), "labels": r["labels"].tolist()} for r in data]
    )

    def run(model: Any, folder: Any, *mixins: type, accumulation: int = 4) -> Any:
        class InOrderSFT(*mixins, trl.SFTTrainer):
            def _get_train_sampler(self, *args: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

        more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_grad_norm": 1.0, "bf16": False}
        args = trl.SFTConfig(**arguments(folder, accumulation, gradient_checkpointing=False, **more))
        trainer = InOrderSFT(model=copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return trainer

    return run


def test_sft_trainer_takes_a_patched_model(model, sft, tmp_path):
    native = sft(model, tmp_path)
    fused = sft(patch(copy.deepcopy(model)), tmp_path)
    assert_same_weights(fused.model, native.model)


@pytest.mark.parametrize("patched", [True, False])
def test_sft_trainer_with_the_mixin_trains_on_perplexity(model, data, sft, tmp_path, patched):
    start = model
    if patched:
        with pytest.warns(UserWarning, match="trl replaced its forward and may compute its own"):
            start = patch(copy.deepcopy(model), "perplexity")
            trainer = sft(start, tmp_path, PerplexityTrainerMixin)
    else:
        trainer = sft(start, tmp_path, PerplexityTrainerMixin)
    want, perplexities = by_hand(model, data, 4, 1.0)
    assert_same_weights(trainer.model, want)
    assert_close(logged(trainer, "perplexity"), perplexities, rtol=1e-5, atol=0)
