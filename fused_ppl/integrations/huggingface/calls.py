# SPDX-License-Identifier: Apache-2.0
"""What a head and a loss function do during one forward of a patched model: the fused loss, or one step of the check.

A call has `head(module, hidden, native)`, run in the place of the head's forward, and `reduce(native, ...)`, run in the
place of the model's loss function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_ppl import Options, linear_cross_entropy, linear_perplexity, next_token_targets
from fused_ppl.integrations.huggingface import tail

Native = Callable[..., Any]


@dataclass(frozen=True)
class Recipe:
    """What the caller asked for, and what the check found."""

    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    max_nll: float | None = None
    options: Options | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    handed_on: frozenset[str] = frozenset()  # the keywords of forward that reach the loss function
    labels_at: int = 0  # the position of `labels` among the arguments of forward

    def is_native(self) -> bool:
        """Whether the loss is the one that the model has by itself."""
        return self.loss == "cross_entropy" and not self.label_smoothing and not self.z_loss

    def value(self, head: nn.Linear, hidden: Tensor, targets: Tensor, perplexity: bool) -> Tensor:
        """The mean over the counted targets, or exp of it."""
        common: dict[str, Any] = {
            "linear_bias": head.bias,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "options": self.options,
        }
        if perplexity:
            return linear_perplexity(hidden, head.weight, targets, max_nll=self.max_nll, **common)
        return linear_cross_entropy(hidden, head.weight, targets, z_loss=self.z_loss, **common)


class Fused:
    """The loss in the head; one number per token goes on as the logits."""

    def __init__(self, recipe: Recipe, labels: Tensor, shift_labels: Tensor | None, perplexity: bool) -> None:
        self.recipe, self.labels, self.shift_labels, self.perplexity = recipe, labels, shift_labels, perplexity
        self.native = False
        self.carrier: Tensor | None = None
        self.logits: Any = None
        if shift_labels is None:
            self.targets = next_token_targets(labels, ignore_index=recipe.ignore_index)
        else:
            self.targets = shift_labels

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor:
        shape = hidden.shape[:-1]
        # other positions than those of the labels, or none at all: the model's own loss knows what that means
        self.native = (self.targets.shape != shape and self.targets.numel() != shape.numel()) or shape.numel() == 0
        if self.native:
            return native(hidden)  # type: ignore[no-any-return]
        targets = self.targets.to(hidden.device).reshape(shape)
        value = self.recipe.value(module, hidden, targets, self.perplexity)
        self.carrier = value.expand(*shape, 1)
        return self.carrier

    def returned(self, output: Tensor) -> None:
        """Takes what the head's module call has returned in the place of the carrier.

        Wrappers hang their work for backward on that output: DeepSpeed's ZeRO-3 gathers the weight there.
        """
        if self.carrier is not None and not self.native:
            self.carrier = output

    def reduce(
        self,
        native: Native,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.native:
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            kwargs |= {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return native(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)  # type: ignore[no-any-return]
        if self.carrier is None:
            raise RuntimeError("The patched model did not call its head before its loss function.")
        self.logits = logits
        self._check_same(labels, self.labels, "labels")
        if (shift_labels is None) != (self.shift_labels is None):
            raise RuntimeError("The patched model made or dropped shift_labels on the way to its loss function.")
        if shift_labels is not None:
            self._check_same(shift_labels, self.shift_labels, "shift_labels")
        if ignore_index != self.recipe.ignore_index:
            raise RuntimeError(
                f"The targets were made for ignore_index={self.recipe.ignore_index}, and the model's loss function got "
                f"{ignore_index}. Call unpatch(model)."
            )
        value = self.carrier
        while value.ndim:
            value = value.select(0, 0)
        if num_items_in_batch is None:
            return value
        count = self.targets.ne(self.recipe.ignore_index).sum().to(value.device)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(value.device)
        if self.perplexity:
            _check_whole_batch(num_items_in_batch, count)
            return value
        return torch.where(count > 0, value, 0) * (count / num_items_in_batch)

    def without_logits(self, out: Any) -> Any:
        """What the model returned, with None in the place of what stood for its logits."""
        if self.native:
            return out
        if isinstance(out, tuple):
            return tuple(None if o is self.logits else o for o in out)
        return type(out)(**{k: v for k, v in out.items() if k != "logits" and v is not self.logits})

    @staticmethod
    def _check_same(got: Tensor, given: Tensor | None, name: str) -> None:
        if got is given or torch.compiler.is_compiling():
            return
        if given is None or got.shape != given.shape or not torch.equal(got.to(given.device), given):
            raise RuntimeError(
                f"The patched model changed its {name} on the way to its loss function, which the fused loss does not "
                "see. Call unpatch(model)."
            )


def _check_whole_batch(num_items: float | Tensor, count: Tensor) -> None:
    """A perplexity is of all tokens that it is divided by, or it is none."""
    message = (
        "This model was patched with loss='perplexity' and got a num_items_in_batch larger than the number of its own "
        "targets: the batch is one of several, of an accumulation window or of other ranks, and perplexities of parts "
        "do not add up. Train with class MyTrainer(PerplexityTrainerMixin, Trainer) from "
        "fused_ppl.integrations.huggingface, which scales the gradient of the whole window."
    )
    if torch.compiler.is_compiling():
        whole = torch.as_tensor(num_items, dtype=torch.float64, device=count.device) <= count
        torch._assert_async(whole.reshape(()), message)
    elif bool((count < num_items).any() if isinstance(num_items, Tensor) else count < num_items):
        raise RuntimeError(message)


class Probe:
    """Known numbers in the place of the logits."""

    def __init__(self) -> None:
        self.grids: list[Tensor] = []

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor:
        self.grids.append(tail.grid((*hidden.shape[:-1], module.weight.shape[0]), hidden.device))
        return self.grids[-1]

    def reduce(self, native: Native, *args: Any, **kwargs: Any) -> Any:
        return native(*args, **kwargs)


class Watched:
    """The native loss, with the hidden states as a leaf; keeps what the loss function was given."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.received: dict[str, Any] | None = None

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor:
        self.hidden = hidden.detach().requires_grad_()
        return native(self.hidden)  # type: ignore[no-any-return]

    def reduce(self, native: Native, *args: Any, **kwargs: Any) -> Any:
        self.received = kwargs
        return native(*args, **kwargs)


class WatchedFused(Fused):
    """The fused loss, with the hidden states as a leaf."""

    hidden: Tensor | None = None

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor:
        self.hidden = hidden.detach().requires_grad_()
        return super().head(module, self.hidden, native)
