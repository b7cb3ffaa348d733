# SPDX-License-Identifier: Apache-2.0
"""A loss for torchtitan's trainer that takes hidden states and the head, as its `ChunkedLossWrapper` does.

In a configuration, in the place of `ChunkedLossWrapper.Config(...)`:

    from fused_ppl.integrations.torchtitan import FusedLinearCrossEntropyLoss
    loss = FusedLinearCrossEntropyLoss.Config()

The trainer sets `lm_head`, has the model leave it out, and divides by the tokens of all ranks. The loss is computed
inside the head's own call, so that FSDP has its weight gathered; no chunk calls backward in forward, and the length of
the sequence need not be a multiple of anything. Needs torchtitan where the class is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fused_ppl import linear_cross_entropy
from fused_ppl.integrations.huggingface.swap import FusedHead, swap


class _Call:
    """What the head does while it is called for its loss."""

    def __init__(self, labels: Tensor, items: Tensor | None, config: Any) -> None:
        self.labels, self.items, self.config = labels, items, config

    def head(self, module: nn.Linear, hidden: Tensor, native: Any) -> Tensor:
        return linear_cross_entropy(
            hidden,
            module.weight,
            self.labels,
            linear_bias=module.bias,
            reduction="sum" if self.items is None else "mean",
            num_items=self.items,
            label_smoothing=self.config.label_smoothing,
            z_loss=self.config.z_loss,
        )


@functools.cache
def _loss_class() -> type:
    # the trainer asks for an instance of ChunkedLossWrapper before it hands over the head
    titan: Any = importlib.import_module("torchtitan.components.loss")

    class FusedLinearCrossEntropyLoss(titan.ChunkedLossWrapper):  # type: ignore[misc]
        """`loss(pred, labels, global_valid_tokens) -> (loss, metrics)`, from hidden states."""

        @dataclass(kw_only=True, slots=True)
        class Config(titan.BaseLoss.Config):  # type: ignore[misc]
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
                    f"lm_head is a {type(lm_head).__name__} with a forward of its own (LoRA, a softcap, a quantised "
                    "product), which the fused loss would leave out. Use ChunkedLossWrapper."
                )
            swap(lm_head, FusedHead)
            self.lm_head = lm_head

        def __call__(
            self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
        ) -> tuple[Tensor, dict[str, Tensor]]:
            """Like torchtitan's: the sum over the tokens of this rank, divided by those of all ranks if given."""
            head: Any = self.lm_head
            if head is None:
                raise RuntimeError("Call set_lm_head(model.lm_head) first; torchtitan's trainer does.")
            if titan.get_spmd_backend() == "spmd_types" and titan.spmd_mesh_size("tp") > 1:
                raise NotImplementedError(
                    "Under tensor parallelism its backend 'spmd_types' hands over plain pieces of the head and of "
                    "the sequence, which the fused loss cannot tell from whole ones. Use ChunkedLossWrapper."
                )
            head._fused_ppl_call = _Call(labels, global_valid_tokens, self.config)
            try:
                return head(pred), {}
            finally:
                head._fused_ppl_call = None

    return FusedLinearCrossEntropyLoss


def __getattr__(name: str) -> Any:
    if name == "FusedLinearCrossEntropyLoss":
        return _loss_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
