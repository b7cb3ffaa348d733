# SPDX-License-Identifier: Apache-2.0
"""Layers that `kernels` puts in the place of a model's own. They have no state and no constructor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .integrations.liger import LigerFusedLinearCrossEntropyLoss

_PASSED_ON = ("ce_weight", "lse_square_scale", "label_smoothing", "accum_dtype", "use_token_scaling")
_OTHER_RESULTS = ("return_z_loss", "return_token_accuracy", "return_predicted_tokens")


class LigerForCausalLMLoss(nn.Module):
    """The loss of a causal language model from its last hidden states, as in kernels-community/liger-kernels.

    The logits are never stored. `logits` and `vocab_size` stand in the signature because transformers has them there.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        logits: None,
        labels: Tensor | None,  # (..., T), not shifted; unused if shift_labels is given
        vocab_size: int | None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,  # (..., T), the target of each position
        hidden_states: Tensor | None = None,  # (..., T, D)
        lm_head_weight: Tensor | None = None,  # (V, D)
        **kwargs: Any,
    ) -> Tensor:
        """Return the mean loss over the counted tokens, or the sum divided by `num_items_in_batch` if that is given.

        Among `kwargs`, `hidden_size` is required, and `final_logit_softcapping`, `bias`, `ce_weight`,
        `label_smoothing` and `lse_square_scale` have an effect. What else a trainer passes on is ignored.
        """
        hidden_size = kwargs.get("hidden_size")
        if hidden_states is None or lm_head_weight is None or hidden_size is None:
            needed = {"hidden_states": hidden_states, "lm_head_weight": lm_head_weight, "hidden_size": hidden_size}
            missing = ", ".join(name for name, value in needed.items() if value is None)
            raise ValueError(
                f"hidden_states, lm_head_weight and hidden_size are required; got no {missing}. Pass them."
            )
        for name in _OTHER_RESULTS:
            if kwargs.get(name):
                raise NotImplementedError(f"{name} must be False, because this layer returns the loss alone.")
        if shift_labels is None:
            if labels is None:
                raise ValueError("labels or shift_labels is required; got neither. Pass one of them.")
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss_of = LigerFusedLinearCrossEntropyLoss(
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            softcap=kwargs.get("final_logit_softcapping"),
            **{name: kwargs[name] for name in _PASSED_ON if name in kwargs},
        )
        hidden = hidden_states.reshape(-1, hidden_size)
        target = shift_labels.reshape(-1).to(hidden.device)
        loss = loss_of(lm_head_weight, hidden, target, kwargs.get("bias"))
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return torch.div(loss, num_items_in_batch)


LigerForCausalLMLossLayer = LigerForCausalLMLoss  # its name where transformers looks for it
