# SPDX-License-Identifier: Apache-2.0
"""The exact perplexity as the loss of `transformers.Trainer`, over an accumulation window and all ranks.

The trainer accumulates the gradient of the cross-entropy, because gradients of perplexities do not add up. Before
clipping, the mixin multiplies the gradient of the whole window by the perplexity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_ppl import LossOutput, Perplexity, PerplexityAccumulator
from fused_ppl.integrations.huggingface.swap import FusedModel

_Trainer: Any = object  # for type checkers: the mixin has the attributes of the Trainer that it is combined with


class PerplexityTrainerMixin(_Trainer):  # type: ignore[misc]  # transformers is optional
    """Trains on the perplexity of the whole batch of each optimizer step, over all micro-batches and ranks.

        class PerplexityTrainer(PerplexityTrainerMixin, Trainer): ...

        PPL = exp(S / N),    d PPL = PPL * d(S / N)

    Micro-batches and ranks add up the gradient of the cross-entropy S / N. The mixin multiplies it by PPL once, before
    clipping. In the logs, `loss` is the cross-entropy, `perplexity` is over all tokens since the last line, and
    `eval_perplexity` is over the evaluation set.

    The mixin must come before `Trainer`. The model need not be patched, but a patched model stores no logits.

    Raises:
        ValueError: the trainer does not pass `num_items_in_batch` of all ranks to the model. The mixin also refuses
            several GPUs in one process, DeepSpeed, and an auxiliary loss of experts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._perplexity_window = Perplexity()  # the micro-batches since the last optimizer step
        self._perplexity_logged: dict[str, Perplexity] = {}  # "train" and "eval", since the last line of the log
        self._perplexity_items = torch.zeros((), dtype=torch.float64, device="cpu")  # N of the window on all ranks
        self._perplexity_unscaled = False  # True if the window has micro-batches and its gradient is not scaled yet
        self._perplexity_expects_step = False  # True if the next thing to come is an optimizer step
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        training = model.training
        if training:
            self._perplexity_check(num_items_in_batch)
        with _cross_entropy(model):
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if num_items_in_batch is not None:
            loss = result[0] if return_outputs else result
            self._perplexity_add(loss.detach(), num_items_in_batch, training)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._perplexity_logged.pop("eval", None)  # from `predict`, which logs nothing, or from an aborted evaluation
        return super().evaluation_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self._perplexity_expects_step = self.accelerator.sync_gradients
        return loss

    def _perplexity_check(self, num_items_in_batch: Any) -> None:
        if num_items_in_batch is None:
            raise ValueError(
                "PerplexityTrainerMixin needs num_items_in_batch; got None. Trainer counts it if the forward of the "
                "model takes **kwargs and the data set has labels."
            )
        if self.accelerator.num_processes > 1 and not self.args.average_tokens_across_devices:
            raise ValueError(
                "PerplexityTrainerMixin needs the number of tokens of all ranks: pass "
                "TrainingArguments(average_tokens_across_devices=True)."
            )
        if self.args.n_gpu > 1:
            raise ValueError("PerplexityTrainerMixin takes one GPU for each process. Start the training with torchrun.")
        if self.is_deepspeed_enabled:
            raise ValueError("PerplexityTrainerMixin scales .grad, and DeepSpeed does not set it. Use FSDP or DDP.")
        if self._perplexity_expects_step:
            raise RuntimeError(
                "An optimizer step was made before PerplexityTrainerMixin could scale the gradient: this version of "
                "transformers does not call Trainer._clip_grad_norm or ._get_grad_norm before it."
            )

    def _perplexity_add(self, loss: Tensor, num_items: Any, training: bool) -> None:
        """Add S and N of a micro-batch.

        `num_items` is N of the window on all ranks, so each micro-batch adds an equal share of it.
        """
        ranks = self._perplexity_ranks() if self.args.average_tokens_across_devices else 1
        items = torch.as_tensor(num_items, dtype=torch.float64, device=loss.device)
        nll = loss.double() / ranks * items
        if training:
            self._perplexity_unscaled, self._perplexity_items = True, items
            self._perplexity_window.update_nll(nll, items / (self.current_gradient_accumulation_steps * ranks))
        else:
            self._perplexity_logged.setdefault("eval", Perplexity()).update_nll(nll, items / ranks)

    def _perplexity_scale(self, model: Any) -> None:
        """Multiply the gradient of the window by its perplexity, once for each window."""
        if not self._perplexity_unscaled:
            return
        self._perplexity_unscaled = self._perplexity_expects_step = False
        window, ranks = self._perplexity_window, self._perplexity_ranks()
        # the gradient is that of S / N and not of S, and wrappers have averaged it over the ranks
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
        """Return the number of ranks that hold different tokens. Tensor-parallel ranks hold the same tokens."""
        processes, tensor_parallel = self.accelerator.num_processes, self.get_tp_size()
        if tensor_parallel not in (1, processes):
            raise ValueError("PerplexityTrainerMixin takes data parallelism or tensor parallelism, but not both.")
        return int(processes // tensor_parallel)

    def _clip_grad_norm(self, model: Any) -> Any:
        self._perplexity_scale(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._perplexity_scale(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name in [n for n in logs if n == "loss" or (n.endswith("_loss") and n != "train_loss")]:
            metric = self._perplexity_logged.pop("train" if name == "loss" else "eval", None)
            if metric is not None:
                if self._perplexity_ranks() > 1:
                    metric.sync(torch.distributed.group.WORLD)
                logs[name.removesuffix("loss") + "perplexity"] = metric.compute().item()
        super().log(logs, *args, **kwargs)


@contextlib.contextmanager
def _cross_entropy(model: Any) -> Iterator[None]:
    """Let a model that was patched with loss="perplexity" return its cross-entropy, because the mixin scales it."""
    patched = _patched(model)
    hook = model.register_forward_hook(lambda module, args, out: _check_no_auxiliary_loss(module, out))
    for module in patched:
        module._fused_ppl_trainer_scales = True
    try:
        yield
    finally:
        hook.remove()
        for module in patched:
            module._fused_ppl_trainer_scales = False


def _check_no_auxiliary_loss(model: Any, out: Any) -> None:
    if model.training and getattr(out, "aux_loss", None) is not None:
        raise ValueError(
            f"{type(model).__name__} adds an auxiliary loss of its experts, and PerplexityTrainerMixin would multiply "
            "it by the perplexity. Train on cross-entropy, or set output_router_logits=False in the config."
        )


def _patched(model: Any) -> list[FusedModel]:
    return [m for m in model.modules() if isinstance(m, FusedModel)]
