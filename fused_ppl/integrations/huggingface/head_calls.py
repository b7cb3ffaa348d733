# SPDX-License-Identifier: Apache-2.0
"""What the head and the loss function of a patched model do during one forward: the fused loss, or a step of the check.

Each call has two methods. `head(module, hidden, native)` runs instead of the forward of the head, and
`reduce(native, logits, labels, ...)` runs instead of the loss function of the model. `native` is what they replace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fused_ppl import Options, linear_cross_entropy, linear_perplexity, next_token_targets
from fused_ppl.integrations.huggingface.logit_transform import probe_values

Native = Callable[..., Tensor]


class HeadCall(Protocol):
    """One forward of a patched model."""

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor: ...

    def reduce(self, native: Native, /, *args: Any, **kwargs: Any) -> Tensor: ...


@dataclass(frozen=True)
class LossConfig:
    """The loss that the caller asked for, and what the check found out about the model."""

    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    max_nll: float | None = None
    options: Options | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    forwarded_keywords: frozenset[str] = frozenset()  # keywords of forward that reach the loss function
    labels_position: int = 0  # of `labels` among the arguments of forward

    def is_native(self) -> bool:
        """True if the loss is the one that the model computes without a patch."""
        return self.loss == "cross_entropy" and not self.label_smoothing and not self.z_loss

    def value(self, head: nn.Linear, hidden: Tensor, targets: Tensor, perplexity: bool) -> Tensor:
        """Return the mean loss over the counted targets, or its perplexity."""
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


class FusedCall:
    """Computes the loss in the head. Instead of logits, the head returns the loss expanded to one number per token."""

    def __init__(self, config: LossConfig, labels: Tensor, shift_labels: Tensor | None, perplexity: bool) -> None:
        self.config, self.labels, self.shift_labels, self.perplexity = config, labels, shift_labels, perplexity
        self.native = False  # True if this forward has to use the native loss
        self.expanded_loss: Tensor | None = None  # (..., 1)
        self.logits: Any = None  # what the model passed to its loss function as logits
        if shift_labels is None:
            self.targets = next_token_targets(labels, ignore_index=config.ignore_index)
        else:
            self.targets = shift_labels

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor:
        shape = hidden.shape[:-1]
        # if the positions are not those of the labels, or if there are none, only the native loss knows what to do
        self.native = (self.targets.shape != shape and self.targets.numel() != shape.numel()) or shape.numel() == 0
        if self.native:
            return native(hidden)
        targets = self.targets.to(hidden.device).reshape(shape)
        value = self.config.value(module, hidden, targets, self.perplexity)
        self.expanded_loss = value.expand(*shape, 1)
        return self.expanded_loss

    def set_head_output(self, output: Tensor) -> None:
        """Use what the module call of the head returned, which hooks may have wrapped.

        Wrappers attach their work for backward to that output. For example, ZeRO-3 of DeepSpeed gathers the weight
        there.
        """
        if self.expanded_loss is not None and not self.native:
            self.expanded_loss = output

    def reduce(
        self,
        native: Native,
        /,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        *,
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.native:
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            kwargs |= {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return native(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        if self.expanded_loss is None:
            raise RuntimeError("The patched model did not call its head before its loss function.")
        self.logits = logits
        self._check_same(labels, self.labels, "labels")
        if (shift_labels is None) != (self.shift_labels is None):
            raise RuntimeError("The patched model added or dropped shift_labels before it called its loss function.")
        if shift_labels is not None:
            self._check_same(shift_labels, self.shift_labels, "shift_labels")
        if ignore_index != self.config.ignore_index:
            raise RuntimeError(
                f"The targets were computed for ignore_index={self.config.ignore_index}, but the model's loss function "
                f"got {ignore_index}. Call unpatch(model)."
            )
        value = self.expanded_loss
        while value.ndim:
            value = value.select(0, 0)
        if num_items_in_batch is None:
            return value
        count = self.targets.ne(self.config.ignore_index).sum().to(value.device)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(value.device)
        if self.perplexity:
            _check_whole_batch(num_items_in_batch, count)
            return value
        return torch.where(count > 0, value, 0) * (count / num_items_in_batch)

    def without_logits(self, out: Any) -> Any:
        """Return the output of the model, with None instead of the expanded loss as `logits`."""
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
                f"The patched model changed its {name} before it called its loss function, and the fused loss has used "
                "the old ones. Call unpatch(model)."
            )


def _check_whole_batch(num_items: float | Tensor, count: Tensor) -> None:
    """Check that the `count` targets of this call are the whole batch. Otherwise the perplexity would be wrong."""
    message = (
        "This model was patched with loss='perplexity' and got a num_items_in_batch larger than the number of its own "
        "targets. So this batch is a part of an accumulation window or of the batch of several ranks, and perplexities "
        "of parts do not add up. Train with class MyTrainer(PerplexityTrainerMixin, Trainer) from "
        "fused_ppl.integrations.huggingface, which scales the gradient of the whole window."
    )
    if torch.compiler.is_compiling():
        whole = torch.as_tensor(num_items, dtype=torch.float64, device=count.device) <= count
        torch._assert_async(whole.reshape(()), message)
    elif bool((count < num_items).any() if isinstance(num_items, Tensor) else count < num_items):
        raise RuntimeError(message)


class ProbeCall:
    """Returns known numbers instead of the logits, to find out what the model does to its logits after the head."""

    def __init__(self) -> None:
        self.probes: list[Tensor] = []

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor:
        self.probes.append(probe_values((*hidden.shape[:-1], module.weight.shape[0]), hidden.device))
        return self.probes[-1]

    def reduce(self, native: Native, /, *args: Any, **kwargs: Any) -> Tensor:
        return native(*args, **kwargs)


class NativeCall:
    """Computes the native loss. It makes the hidden states a leaf and records the keywords of the loss function."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.loss_keywords: dict[str, Any] | None = None

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor:
        self.hidden = hidden.detach().requires_grad_()
        return native(self.hidden)

    def reduce(self, native: Native, /, *args: Any, **kwargs: Any) -> Tensor:
        self.loss_keywords = kwargs
        return native(*args, **kwargs)


class FusedLeafCall(FusedCall):
    """Computes the fused loss. It makes the hidden states a leaf, so that their gradient can be compared."""

    hidden: Tensor | None = None

    def head(self, module: nn.Linear, hidden: Tensor, native: Native) -> Tensor:
        self.hidden = hidden.detach().requires_grad_()
        return super().head(module, self.hidden, native)
