# SPDX-License-Identifier: Apache-2.0
"""The losses as `torch.nn.Module`, for code that constructs its loss once and calls it many times.

Each module keeps its keywords as attributes and passes them to the function of `functional`. The constructors spell out
their arguments, so that `help` and editors show them. The linear losses own the weight of their head.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_ppl import checks, functional
from fused_ppl.spec import LossSpec, Options

if TYPE_CHECKING:
    from fused_ppl.groups import Group, VocabGroup


class _Loss(nn.Module):
    """A loss that keeps its keywords as attributes, like the losses of torch.

    `weight` is a buffer, so `module.to(...)` moves it.
    """

    weight: Tensor | None
    group: Group | None
    vocab_group: VocabGroup | None

    def __init__(self, weight: Tensor | None, **keywords: Any) -> None:
        super().__init__()
        # this raises for invalid values when the module is constructed, not when it is called
        LossSpec.of(**{k: v for k, v in keywords.items() if k not in ("class_dim", "group", "vocab_group", "options")})
        self.register_buffer("weight", weight)
        self._names = tuple(keywords)
        for name, value in keywords.items():
            setattr(self, name, value)

    @property
    def keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loss:
        """Copy everything but the process groups, which cannot be copied and which the copy uses too."""
        parts = self.vocab_group if isinstance(self.vocab_group, tuple) else (self.vocab_group,)
        memo |= {id(group): group for group in (self.group, *parts) if group is not None}
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())


class CrossEntropyLoss(_Loss):
    """`fused_ppl.cross_entropy` as a module, a replacement for `torch.nn.CrossEntropyLoss`.

    The arguments are those of the function. `weight` and all keywords but `token_weight` and `num_items`, which belong
    to a batch, are given to the constructor. A number that is a 0-d tensor may be changed between calls with `fill_`.
    It is no buffer, so it stays on the CPU when the module moves, and `state_dict` does not have it.

    Example:
        >>> import torch, fused_ppl
        >>> loss = fused_ppl.CrossEntropyLoss(label_smoothing=0.1, class_dim=-1)
        >>> round(loss(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)).item(), 4)
        2.0794
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        class_dim: int = 1,
        logit_scale: float | Tensor = 1.0,
        softcap: float | Tensor | None = None,
        z_loss: float | Tensor = 0.0,
        group: Group | None = None,
        vocab_group: VocabGroup | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            class_dim=class_dim,
            logit_scale=logit_scale,
            softcap=softcap,
            z_loss=z_loss,
            group=group,
            vocab_group=vocab_group,
            options=options,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        return functional.cross_entropy(
            input, target, self.weight, token_weight=token_weight, num_items=num_items, **self.keywords
        )


class PerplexityLoss(_Loss):
    """`fused_ppl.perplexity` as a module. The constructor takes all arguments that do not belong to a batch.

    Example:
        >>> import torch, fused_ppl
        >>> loss = fused_ppl.PerplexityLoss(class_dim=-1)
        >>> round(loss(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)).item(), 4)
        8.0
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        class_dim: int = 1,
        logit_scale: float | Tensor = 1.0,
        softcap: float | Tensor | None = None,
        max_nll: float | Tensor | None = None,
        group: Group | None = None,
        vocab_group: VocabGroup | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            class_dim=class_dim,
            logit_scale=logit_scale,
            softcap=softcap,
            max_nll=max_nll,
            group=group,
            vocab_group=vocab_group,
            options=options,
        )

    def forward(self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None) -> Tensor:
        return functional.perplexity(input, target, self.weight, token_weight=token_weight, **self.keywords)


class _LinearLoss(_Loss):
    """A loss with a head, `.linear`. To tie the head to an embedding, assign `.linear.weight`."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...],
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        weight: Tensor | None,
        **keywords: Any,
    ) -> None:
        super().__init__(weight, **keywords)
        checks.check_no_out_features(out_features)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)


class LinearCrossEntropyLoss(_LinearLoss):
    """`fused_ppl.linear_cross_entropy` with its own head, a replacement for `torch.nn.LinearCrossEntropyLoss`.

    Args:
        in_features: D, the size of the hidden states.
        num_classes: V, the size of the vocabulary.
        out_features: must be (). It is there because `torch.nn.LinearCrossEntropyLoss` has it.
        bias, device, dtype: of the head, as in `torch.nn.Linear`.

    All other arguments are those of the function.

    Example:
        >>> import torch, fused_ppl
        >>> loss = fused_ppl.LinearCrossEntropyLoss(16, 1000)
        >>> loss(torch.zeros(4, 16), torch.tensor([0, 1, 2, 999])).item() > 0
        True
        >>> embedding = torch.nn.Embedding(1000, 16)
        >>> loss.linear.weight = embedding.weight      # tied
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float | Tensor = 1.0,
        softcap: float | Tensor | None = None,
        z_loss: float | Tensor = 0.0,
        group: Group | None = None,
        vocab_group: VocabGroup | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_scale=logit_scale,
            softcap=softcap,
            z_loss=z_loss,
            group=group,
            vocab_group=vocab_group,
            options=options,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        return functional.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            token_weight=token_weight,
            num_items=num_items,
            **self.keywords,
        )


class LinearPerplexityLoss(_LinearLoss):
    """`fused_ppl.linear_perplexity` with its own head. Its first arguments are those of `LinearCrossEntropyLoss`.

    Example:
        >>> import torch, fused_ppl
        >>> loss = fused_ppl.LinearPerplexityLoss(16, 1000)
        >>> round(loss(torch.zeros(4, 16), torch.tensor([0, 1, 2, 999])).item(), 2)
        1000.0
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float | Tensor = 1.0,
        softcap: float | Tensor | None = None,
        max_nll: float | Tensor | None = None,
        group: Group | None = None,
        vocab_group: VocabGroup | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_scale=logit_scale,
            softcap=softcap,
            max_nll=max_nll,
            group=group,
            vocab_group=vocab_group,
            options=options,
        )

    def forward(self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None) -> Tensor:
        return functional.linear_perplexity(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            token_weight=token_weight,
            **self.keywords,
        )
