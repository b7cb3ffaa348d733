# SPDX-License-Identifier: Apache-2.0
"""Exact perplexity over an accumulation window and all ranks, for `transformers.Trainer` and what derives from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_ppl import LossOutput, Perplexity, PerplexityAccumulator
from fused_ppl.integrations.huggingface.swap import FusedModel


class PerplexityTrainerMixin:
    """Trains on the perplexity of each optimizer step's whole batch: all micro-batches, all ranks.

        class PerplexityTrainer(PerplexityTrainerMixin, Trainer): ...

    The gradient of exp(S / N) is exp(S / N) times that of S / N, which micro-batches and ranks add up: the trainer
    accumulates the gradient of the cross-entropy and multiplies it once, before clipping. `loss` in the logs is the
    cross-entropy S / N; `perplexity` beside it is exp of it over the tokens since the last line, `eval_perplexity` over
    the evaluation set. The model may be patched or not; a patched one makes no logits. Put the mixin first.

    Raises:
        ValueError: the trainer does not tell the model `num_items_in_batch`, or not that of all ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._perplexity_window = Perplexity()  # since the last optimizer step
        self._perplexity_logged: dict[str, Perplexity] = {}
        self._perplexity_items = torch.zeros((), dtype=torch.float64, device="cpu")  # in the window, on all ranks
        self._perplexity_open = False  # the window has micro-batches, and its gradient is not scaled yet
        self._perplexity_due = False  # and an optimizer step comes next
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        training = model.training
        if training:
            self._perplexity_check(num_items_in_batch)
        with _cross_entropy(model):
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if num_items_in_batch is not None:
            loss = result[0] if return_outputs else result
            self._perplexity_add(loss.detach(), num_items_in_batch, training)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._perplexity_logged.pop("eval", None)  # of predict, which logs nothing, or of an evaluation cut short
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._perplexity_due = self.accelerator.sync_gradients  # type: ignore[attr-defined]
        return loss

    def _perplexity_check(self, num_items_in_batch: Any) -> None:
        args, accelerator = self.args, self.accelerator  # type: ignore[attr-defined]
        if num_items_in_batch is None:
            raise ValueError(
                "PerplexityTrainerMixin needs num_items_in_batch, which Trainer counts where the model's forward takes "
                "**kwargs and the data set has labels; this one does not."
            )
        if accelerator.num_processes > 1 and not args.average_tokens_across_devices:
            raise ValueError(
                "PerplexityTrainerMixin needs the number of tokens of all ranks: pass "
                "TrainingArguments(average_tokens_across_devices=True)."
            )
        if args.n_gpu > 1:
            raise ValueError("PerplexityTrainerMixin takes one GPU for each process: start it with torchrun.")
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            raise ValueError("PerplexityTrainerMixin scales .grad, which DeepSpeed does not fill. Use FSDP or DDP.")
        if self._perplexity_due:
            raise RuntimeError(
                "An optimizer step went by without PerplexityTrainerMixin having scaled the gradient: this version of "
                "transformers does not call Trainer._clip_grad_norm or ._get_grad_norm before it."
            )

    def _perplexity_add(self, loss: Tensor, num_items: Any, training: bool) -> None:
        """A micro-batch's part of S and of N; N belongs to the window, and is divided among its parts."""
        ranks = self._perplexity_ranks() if self.args.average_tokens_across_devices else 1  # type: ignore[attr-defined]
        items = torch.as_tensor(num_items, dtype=torch.float64, device=loss.device)
        nll = loss.double() / ranks * items
        if training:
            self._perplexity_open, self._perplexity_items = True, items
            steps = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
            self._perplexity_window.update_nll(nll, items / (steps * ranks))
        else:
            self._perplexity_logged.setdefault("eval", Perplexity()).update_nll(nll, items / ranks)

    def _perplexity_scale(self, model: Any) -> None:
        """Once for each window: what the window's gradient lacks."""
        if not self._perplexity_open:
            return
        self._perplexity_open = self._perplexity_due = False
        window, ranks = self._perplexity_window, self._perplexity_ranks()
        # the loss of each micro-batch was divided by the tokens of the window, and wrappers average over the ranks
        accumulator = PerplexityAccumulator(
            [p for p in model.parameters() if p.requires_grad],
            group=torch.distributed.group.WORLD if ranks > 1 else None,
            expected_items=self._perplexity_items.item() / ranks,
            max_nll=next((m._fused_ppl.max_nll for m in _patched(model) if m._fused_ppl), None),
        )
        s, m = window.nll_sum, window.total_weight
        accumulator.add(LossOutput(s, s, s, s, s, s, m))
        accumulator.finish()
        self._perplexity_logged.setdefault("train", Perplexity()).merge(window)
        window.reset()

    def _perplexity_ranks(self) -> int:
        """Those that hold different tokens; tensor-parallel ones hold the same."""
        processes, tensor_parallel = self.accelerator.num_processes, self.get_tp_size()  # type: ignore[attr-defined]
        if tensor_parallel not in (1, processes):
            raise ValueError("PerplexityTrainerMixin takes data parallelism or tensor parallelism, not both at once.")
        return int(processes // tensor_parallel)

    def _clip_grad_norm(self, model: Any) -> Any:
        self._perplexity_scale(model)
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._perplexity_scale(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name in [n for n in logs if n == "loss" or (n.endswith("_loss") and n != "train_loss")]:
            metric = self._perplexity_logged.pop("train" if name == "loss" else "eval", None)
            if metric is not None:
                if self._perplexity_ranks() > 1:
                    metric.sync(torch.distributed.group.WORLD)
                logs[name.removesuffix("loss") + "perplexity"] = metric.compute().item()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


@contextlib.contextmanager
def _cross_entropy(model: Any) -> Iterator[None]:
    """A model patched with loss="perplexity" gives its cross-entropy: the gradient is scaled afterwards."""
    patched = _patched(model)
    watch = model.register_forward_hook(lambda module, args, out: check_no_other_loss(module, out))
    for module in patched:
        module._fused_ppl_window = True
    try:
        yield
    finally:
        watch.remove()
        for module in patched:
            module._fused_ppl_window = False


def check_no_other_loss(model: Any, out: Any) -> None:
    if model.training and getattr(out, "aux_loss", None) is not None:
        raise ValueError(
            f"{type(model).__name__} adds an auxiliary loss of its experts, which PerplexityTrainerMixin would "
            "multiply by the perplexity. Train on cross-entropy, or set output_router_logits=False in the config."
        )


def _patched(model: Any) -> list[FusedModel]:
    return [m for m in model.modules() if isinstance(m, FusedModel)]
