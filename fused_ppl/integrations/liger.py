# SPDX-License-Identifier: Apache-2.0
"""The losses of Liger-Kernel with the same arguments, computed by fused_ppl, for code that has Liger's names.

    liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss = fused_ppl.integrations.liger.Liger...
    liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction = fused_ppl.integrations.liger.Liger...

This module does not need Liger. Arguments that fused_ppl does not support raise NotImplementedError.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_ppl import (
    LossOutput,
    cross_entropy_with_stats,
    linear_cross_entropy_with_stats,
    linear_kl_divergence,
    linear_log_probs,
)
from fused_ppl import cross_entropy as _cross_entropy
from fused_ppl import linear_cross_entropy as _linear_cross_entropy


class CrossEntropyOutput(NamedTuple):
    """What the modules of Liger return if one of the `return_...` arguments is True."""

    loss: Tensor
    z_loss: Tensor | None = None  # the part of `loss` that comes from lse_square_scale; detached
    token_accuracy: Tensor | None = None  # per token for reduction="none", else the mean over the counted tokens
    predicted_tokens: Tensor | None = None  # -1 where ignored


class _LigerLoss(nn.Module):
    def __init__(
        self,
        class_weight: Tensor | None,
        *,
        ignore_index: int,
        lse_square_scale: float,
        label_smoothing: float,
        reduction: str,
        softcap: float | None,
        return_z_loss: bool,
        return_token_accuracy: bool,
        return_predicted_tokens: bool,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}.")
        if lse_square_scale and class_weight is not None:
            raise NotImplementedError(
                "lse_square_scale must be 0 with class weights: Liger does not apply them to its z-loss, but fused_ppl "
                "does. Call fused_ppl.cross_entropy(weight=..., z_loss=...) for the loss of fused_ppl."
            )
        self.ignore_index, self.lse_square_scale, self.label_smoothing = ignore_index, lse_square_scale, label_smoothing
        self.reduction, self.softcap = reduction, softcap
        self.return_z_loss, self.return_token_accuracy = return_z_loss, return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def _keywords(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "softcap": self.softcap,
            "z_loss": self.lse_square_scale,
        }

    @property
    def _needs_stats(self) -> bool:
        return self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens

    def _loss(self, loss: Tensor, target: Tensor) -> Tensor:
        """Replace the mean over no token, which is NaN, by 0 as in Liger."""
        return torch.where(target.ne(self.ignore_index).any(), loss, 0) if self.reduction == "mean" else loss

    def _output(self, out: LossOutput, target: Tensor) -> CrossEntropyOutput:
        counted = target.ne(self.ignore_index)
        correct = out.predicted.eq(target) & counted
        z_loss, accuracy = self.lse_square_scale * out.lse.square(), correct.to(out.loss.dtype)
        if self.reduction != "none":
            z_loss = z_loss.sum() / (counted.sum().clamp(min=1) if self.reduction == "mean" else 1)
            accuracy = accuracy.sum() / counted.sum()
        return CrossEntropyOutput(
            loss=self._loss(out.loss, target),
            z_loss=z_loss if self.return_z_loss else None,
            token_accuracy=accuracy if self.return_token_accuracy else None,
            predicted_tokens=out.predicted if self.return_predicted_tokens else None,
        )


class LigerCrossEntropyLoss(_LigerLoss):
    """`liger_kernel.transformers.LigerCrossEntropyLoss`. Unlike there, `input` is not overwritten.

    Example:
        >>> import torch
        >>> loss = LigerCrossEntropyLoss(label_smoothing=0.1)
        >>> round(loss(torch.zeros(4, 32), torch.tensor([0, 1, 31, -100])).item(), 4)
        3.4657
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__(
            weight,
            ignore_index=ignore_index,
            lse_square_scale=lse_square_scale,
            label_smoothing=label_smoothing,
            reduction=reduction,
            softcap=softcap,
            return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy,
            return_predicted_tokens=return_predicted_tokens,
        )
        self.weight = weight

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        if not self._needs_stats:
            return self._loss(_cross_entropy(_input, target, self.weight, **self._keywords()), target)
        return self._output(cross_entropy_with_stats(_input, target, self.weight, **self._keywords()), target)


class LigerFusedLinearCrossEntropyLoss(_LigerLoss):
    """`liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss`. Its call takes the weight of the head first.

    `accum_dtype` must be None or torch.float32, because gradients are always accumulated in fp32 here.
    `use_token_scaling` must be False.

    Example:
        >>> import torch
        >>> loss = LigerFusedLinearCrossEntropyLoss(softcap=30.0)
        >>> head, hidden = torch.zeros(32, 8), torch.zeros(4, 8)
        >>> round(loss(head, hidden, torch.tensor([0, 1, 31, -100])).item(), 4)
        3.4657
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__(
            ce_weight,
            ignore_index=ignore_index,
            lse_square_scale=lse_square_scale,
            label_smoothing=label_smoothing,
            reduction=reduction,
            softcap=softcap,
            return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy,
            return_predicted_tokens=return_predicted_tokens,
        )
        if accum_dtype not in (None, torch.float32):
            raise NotImplementedError(f"accum_dtype must be None or torch.float32; got {accum_dtype}. Leave it out.")
        if use_token_scaling:
            raise NotImplementedError(
                "use_token_scaling must be False, because fused_ppl does not weight tokens by their probability. "
                "Compute the losses with reduction='none', weight them, and sum them."
            )
        self.ce_weight, self.accum_dtype, self.use_token_scaling = ce_weight, accum_dtype, use_token_scaling

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        keywords = {"linear_bias": bias, "weight": self.ce_weight, **self._keywords()}
        if not self._needs_stats:
            return self._loss(_linear_cross_entropy(_input, lin_weight, target, **keywords), target)
        return self._output(linear_cross_entropy_with_stats(_input, lin_weight, target, **keywords), target)


class LigerFusedLinearScaledCrossEntropyFunction:
    """`liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction`, for losses of policies. Call `apply`.

    Unlike there, the results are float32 for every half precision, and hidden states of any number of dimensions fit.
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the negative log-probability of each target, and the entropy as well if `return_entropy` is True.

        Both are differentiable, and 0 for ignored tokens. `m_tiles_per_cluster` is ignored, because it is a setting of
        Liger's kernel. `selected_token_ids` must be None.

        Example:
            >>> import torch
            >>> hidden, weight, target = torch.zeros(2, 8), torch.zeros(50, 8), torch.tensor([0, -100])
            >>> LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, return_entropy=True)
            (tensor([3.9120, 0.0000]), tensor([3.9120, 0.0000]))
        """
        if selected_token_ids is not None:
            raise NotImplementedError(
                "selected_token_ids must be None, because fused_ppl computes the log-probability of one token of each "
                "row. Call fused_ppl.linear_log_probs once for each of these tokens, as the target."
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0; got {temperature}.")
        values = linear_log_probs(_input, weight, target, ignore_index=ignore_index, logit_scale=1 / temperature)
        nll = 0 - values.log_prob  # a minus sign would make the 0 of an ignored token -0
        return (nll, values.entropy) if return_entropy else nll


class LigerFusedLinearJSD(nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearJSD`: the mean divergence of a student's head from a teacher's.

    `jsd_beta` 0 is the forward KL, 1 the reverse KL, and a number between them the teacher's share of the mixture.
    `accum_dtype` must be None or torch.float32, because gradients are always accumulated in fp32 here.

    Example:
        >>> import torch
        >>> loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=2.0)
        >>> hidden, head = torch.zeros(4, 8), torch.zeros(32, 8)
        >>> loss(hidden, head, torch.ones(4, 3), torch.ones(32, 3), torch.tensor([0, 1, -100, 5])).item()
        0.0
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if accum_dtype not in (None, torch.float32):
            raise NotImplementedError(f"accum_dtype must be None or torch.float32; got {accum_dtype}. Leave it out.")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0; got {temperature}.")
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        return linear_kl_divergence(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            target=shift_labels,
            ignore_index=self.ignore_index,
            logit_scale=1 / self.temperature,
            teacher_logit_scale=1 / self.temperature,
            **direction_of(self.jsd_beta),
        )


def direction_of(beta: float) -> dict[str, Any]:
    """The keywords for what Liger and TRL call beta: 0 is the forward KL, 1 the reverse KL."""
    if beta in (0, 1):
        return {"direction": "reverse" if beta else "forward"}
    return {"direction": "jensen_shannon", "beta": beta}
