# SPDX-License-Identifier: Apache-2.0
"""A loss for the trainer of torchtitan that takes hidden states and the head, like its `ChunkedLossWrapper`.

In a configuration, use it instead of `ChunkedLossWrapper.Config(...)`:

    from fused_ppl.integrations.torchtitan import FusedLinearCrossEntropyLoss
    loss = FusedLinearCrossEntropyLoss.Config()

The trainer sets `lm_head`, tells the model to leave the head out, and passes the number of tokens on all ranks. The
loss is computed inside the forward of the head, because FSDP gathers the weight of the head there. Forward calls no
backward of chunks, and the length of the sequence need not be divisible by a number of chunks. torchtitan is imported
when the class is first used.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fused_ppl import linear_cross_entropy
from fused_ppl.integrations.huggingface.swap import FusedHead, swap


class _LossCall:
    """Makes the head return the loss instead of the logits."""

    def __init__(self, labels: Tensor, num_items: Tensor | None, config: Any) -> None:
        self.labels, self.num_items, self.config = labels, num_items, config

    def head(self, module: nn.Linear, hidden: Tensor, native: Any) -> Tensor:
        return linear_cross_entropy(
            hidden,
            module.weight,
            self.labels,
            linear_bias=module.bias,
            reduction="sum" if self.num_items is None else "mean",
            num_items=self.num_items,
            label_smoothing=self.config.label_smoothing,
            z_loss=self.config.z_loss,
        )


@functools.cache
def _loss_class() -> type:
    titan: Any = importlib.import_module("torchtitan.components.loss")

    # the trainer sets `lm_head` only on instances of ChunkedLossWrapper
    class FusedLinearCrossEntropyLoss(titan.ChunkedLossWrapper):  # type: ignore[misc]  # torchtitan is optional
        """`loss(pred, labels, global_valid_tokens) -> (loss, metrics)`, from hidden states."""

        @dataclass(kw_only=True, slots=True)
        class Config(titan.BaseLoss.Config):  # type: ignore[misc]  # torchtitan is optional
            label_smoothing: float = 0.0
            z_loss: float = 0.0

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            self.config = config
            self.lm_head: nn.Linear | None = None

        def set_lm_head(self, lm_head: nn.Module) -> None:
            if not isinstance(lm_head, nn.Linear):
                raise TypeError(f"lm_head must be a torch.nn.Linear; got {type(lm_head).__name__}.")
            if not isinstance(lm_head, FusedHead) and type(lm_head).forward is not nn.Linear.forward:
                raise TypeError(
                    f"lm_head must use the forward of torch.nn.Linear; got a {type(lm_head).__name__} with a forward "
                    "of its own (LoRA, a softcap, a quantised product), and the fused loss would skip it. "
                    "Use ChunkedLossWrapper."
                )
            swap(lm_head, FusedHead)
            self.lm_head = lm_head

        def __call__(
            self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
        ) -> tuple[Tensor, dict[str, Tensor]]:
            """Return the sum over the tokens of this rank, divided by the number of tokens on all ranks if given."""
            head: Any = self.lm_head
            if head is None:
                raise RuntimeError("Call set_lm_head(model.lm_head) first; torchtitan's trainer does.")
            if titan.get_spmd_backend() == "spmd_types" and titan.spmd_mesh_size("tp") > 1:
                raise NotImplementedError(
                    "The SPMD backend must not be 'spmd_types' with tensor parallelism, because it passes shards of "
                    "the head and of the sequence as plain tensors. Use ChunkedLossWrapper."
                )
            head._fused_ppl_call = _LossCall(labels, global_valid_tokens, self.config)
            try:
                return head(pred), {}
            finally:
                head._fused_ppl_call = None

    return FusedLinearCrossEntropyLoss


def __getattr__(name: str) -> Any:
    if name == "FusedLinearCrossEntropyLoss":
        return _loss_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
