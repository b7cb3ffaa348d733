# SPDX-License-Identifier: Apache-2.0
"""`cut_cross_entropy.linear_cross_entropy` and its module, with the same arguments, computed by fused_ppl.

The positional arguments are those of the release on PyPI (25.1.1). Arguments of later versions are keywords. This
module does not need cut-cross-entropy. Arguments that fused_ppl does not support raise NotImplementedError.
"""

from __future__ import annotations

import enum

from torch import Tensor, nn

from fused_ppl import linear_cross_entropy as _linear_cross_entropy
from fused_ppl import next_token_targets

IMPLEMENTATIONS = ("cce", "torch_compile", "cce_exact", "cce_kahan", "cce_kahan_full", "cce_kahan_full_c", "auto")


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    filter_eps: float | str | None = "high",
    impl: str | enum.Enum = "cce",
    *,
    bias: Tensor | None = None,
    accum_e_fp32: bool = True,
    accum_c_fp32: bool = True,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    return_lse: bool = False,
    vocab_parallel_options: object = None,
) -> Tensor:
    """Cross-entropy of the logits e @ c.T + bias and the targets, without storing all logits at once.

    Args:
        e: (..., D), the hidden states.
        c: (V, D), the weight of the head.
        targets: (...), int64 or int32.
        shift: k, or True for 1. Position t predicts the target at t + k, and reduction="none" returns k fewer losses.
        filter_eps, filter_e_grad, filter_c_grad: ignored. They allow an approximate gradient; here it is exact.
        impl: one of the names of cut-cross-entropy. It has no effect here.
        accum_e_fp32, accum_c_fp32: ignored. Gradients are always accumulated in fp32 here.

    Returns:
        The loss in nats, in float32.

    Raises:
        NotImplementedError: `return_lse` or `vocab_parallel_options` is set.

    Example:
        >>> import torch
        >>> e, c = torch.zeros(2, 5, 8), torch.zeros(50, 8)
        >>> loss = linear_cross_entropy(e, c, torch.zeros(2, 5, dtype=torch.long), reduction="none", shift=True)
        >>> loss.shape, round(loss[0, 0].item(), 3)
        (torch.Size([2, 4]), 3.912)
    """
    if isinstance(ignore_index, Tensor):
        raise TypeError("The fourth argument must be ignore_index; got a Tensor. Pass the bias by its name, bias=.")
    name = impl.name.lower() if isinstance(impl, enum.Enum) else impl
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}.")
    if return_lse:
        raise NotImplementedError("return_lse must be False; fused_ppl.linear_cross_entropy_with_stats has lse.")
    if vocab_parallel_options is not None:
        raise NotImplementedError(
            "vocab_parallel_options must be None. Pass a sharded weight to fused_ppl.linear_cross_entropy."
        )
    if shift:
        targets = next_token_targets(targets, steps=int(shift), ignore_index=ignore_index)
    loss = _linear_cross_entropy(
        e, c, targets, linear_bias=bias, ignore_index=ignore_index, softcap=softcap, reduction=reduction
    )
    return loss[..., : -int(shift)] if shift and reduction == "none" else loss


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a module.

    Example:
        >>> import torch
        >>> loss = LinearCrossEntropy(softcap=30.0)
        >>> round(loss(torch.zeros(4, 8), torch.zeros(50, 8), torch.tensor([0, 1, 2, -100])).item(), 3)
        3.912
    """

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        filter_eps: float | str | None = "high",
        shift: bool | int = False,
        impl: str | enum.Enum = "cce",
    ) -> None:
        super().__init__()
        self.ignore_index, self.softcap, self.reduction = ignore_index, softcap, reduction
        self.filter_eps, self.shift, self.impl = filter_eps, shift, impl

    def forward(self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(
            e,
            c,
            targets,
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            reduction=self.reduction,
            shift=self.shift,
            filter_eps=self.filter_eps,
            impl=self.impl,
            bias=bias,
        )
