# SPDX-License-Identifier: Apache-2.0
"""The exact gradient of the perplexity of a batch that is split into micro-batches and over ranks.

Gradients of perplexities of parts do not add up to the gradient of the whole perplexity. Gradients of S do. So `add`
lets each part backpropagate S, and `finish` multiplies the accumulated gradient by PPL / M.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_ppl import checks, groups, reduction
from fused_ppl.spec import LossOutput, LossSpec

if TYPE_CHECKING:
    from fused_ppl.groups import Group


class PerplexityAccumulator:
    """The gradient of the perplexity of a whole window of micro-batches, on one rank or on many.

        PPL = exp(S / M),    d PPL = PPL / M * (sum of d S over all micro-batches and ranks)

    **`finish` scales everything that is in `.grad` of the parameters**, so only losses from `add(...)` may be
    backpropagated into them between two optimizer steps. Call `finish` after `scaler.unscale_`, and before clipping and
    the optimizer step.

    S and M are summed over the group in float64, once for each window. DDP and FSDP average gradients over ranks, and
    `finish` multiplies by the number of ranks to undo that. If a wrapper sums the gradients instead, divide the loss by
    the number of ranks before `backward`.

    Args:
        parameters: the parameters that are trained, usually `model.parameters()`.
        group: the ranks that hold parts of the batch, as a ProcessGroup or one dimension of a DeviceMesh. None means
            that this process has the whole batch.
        expected_items: about the number of tokens of a window on all ranks. `add` divides the loss by it and `finish`
            multiplies by it, so that fp16 gradients of a long window do not overflow. Up to rounding, the result is
            the same for every number > 0.
        max_nll: above this mean the perplexity continues along its tangent, as in `fused_ppl.perplexity`.

    Example:
        >>> import torch, fused_ppl
        >>> logits = torch.zeros(3, 8, requires_grad=True)
        >>> acc = fused_ppl.PerplexityAccumulator([logits])
        >>> for part, y in zip(logits.split([1, 2]), torch.tensor([3, 1, 5]).split([1, 2])):
        ...     acc.add(fused_ppl.cross_entropy_with_stats(part, y, reduction="sum")).backward()
        >>> round(acc.finish().item(), 4)
        8.0
        >>> round(logits.grad[0, 3].item(), 4)         # 8 / 3 * (1 / 8 - 1)
        -2.3333
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        group: Group | None = None,
        expected_items: float = 1.0,
        max_nll: float | None = None,
    ) -> None:
        self.parameters = list(dict.fromkeys(parameters))  # a tied parameter must be scaled once
        checks.check_parameters(self.parameters)
        checks.check_number("expected_items", expected_items, "> 0 and finite", lambda n: 0 < n < float("inf"))
        self.expected_items = expected_items
        self._spec = LossSpec.of(max_nll=max_nll)
        self._group_given = group is not None
        self._group = groups.token_group(group, "mean")
        self._reset()

    def _reset(self) -> None:
        device = self.parameters[0].device
        self._sums = torch.zeros(2, dtype=reduction.sum_dtype(device), device=device)

    def add(self, output: LossOutput) -> Tensor:
        """Add S and M of a micro-batch. Call `.backward()` on the loss that this returns.

        With a reentrant checkpoint, call `add` outside of it, because the checkpoint would call `add` twice.

        Args:
            output: the result of `cross_entropy_with_stats` or `linear_cross_entropy_with_stats` with reduction="sum",
                without z_loss and without `group`. `add` cannot check this for results of a compiled function or of
                backend="reference".
        """
        checks.check_sum_output(output)
        request = getattr(output.loss.grad_fn, "request", None)
        shards = None if request is None else request.groups
        # ranks that hold shards of the vocabulary have the same tokens, so there is nothing to sum over them
        if not self._group_given and not (shards and shards.vocab):
            groups.warn_without_group("mean", None, None, output.loss)
        with torch.no_grad():
            self._sums += torch.stack((output.loss.to(self._sums), output.total_weight.to(self._sums)))
        return output.loss if self.expected_items == 1 else output.loss / self.expected_items

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Scale every `.grad` by PPL / M in place, start a new window, and return PPL, a 0-d float64 tensor.

        With a group, this is one all-reduce of 16 bytes. A rank without a micro-batch must call it too. If no rank has
        a counted token, PPL is NaN and every gradient becomes zero.
        """
        sums, group = self._sums, self._group
        if group is not None:
            sums = groups.all_reduce(sums, "sum", group.tokens)
        s, m = sums.unbind()
        totals = reduction.finish(reduction.Sums(s, m, None), self._spec, num_items=None, dtype=sums.dtype)
        ranks = 1 if group is None else group.ranks
        _scale(
            [p.grad for p in self.parameters if p.grad is not None],
            totals.perplexity_factor * (self.expected_items * ranks),
        )
        self._reset()
        return totals.perplexity


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Compute gradients *= factor in place. The product of a bf16 or fp16 gradient is fp32 and is rounded once."""
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]  # shares the memory of a DTensor
    wide = [g for g in local if g.dtype.itemsize >= 4]
    for device in {g.device for g in wide}:
        torch._foreach_mul_([g for g in wide if g.device == device], factor.to(device))
    for g in local:
        if g.dtype.itemsize < 4:
            # a 0-d factor would be rounded to the dtype of the gradient; a factor of one dimension stays fp32
            g = g.unsqueeze(0)
            torch.mul(g, factor.to(g.device, torch.float32).expand(1), out=g)
