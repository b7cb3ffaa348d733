# SPDX-License-Identifier: Apache-2.0
"""Exact perplexity gradients over micro-batches and ranks."""

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

        PPL = exp(S / M),    d PPL = PPL / M * sum of d S of every micro-batch and rank

    **`finish` scales everything that is in `.grad` of the parameters**, so nothing but `add(...)` may be
    backpropagated into them between two steps. Call it after `scaler.unscale_`, before clipping and the step.

    The gradients of S add up by themselves; the one factor is known after the last micro-batch, and its two sums are
    then reduced over the group, in float64. DDP and FSDP average gradients over the ranks, which is undone by the
    factor. Where a wrapper adds them up instead, divide the loss by the number of ranks before `backward`.

    Args:
        parameters: those that are trained, `model.parameters()`.
        group: the ranks that hold parts of the batch, a ProcessGroup or one dimension of a DeviceMesh. None for one
            process.
        expected_items: about how many tokens a window holds on all ranks. The loss is divided by it on the way in, so
            that fp16 gradients of a long window do not overflow, and no longer after the factor. Any number > 0 gives
            the same result, up to rounding.
        max_nll: above this mean the perplexity goes on along its tangent, as in `fused_ppl.perplexity`.

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
        self.parameters = list(dict.fromkeys(parameters))  # tied ones are scaled once
        checks.check_parameters(self.parameters)
        checks.check_number("expected_items", expected_items, "> 0 and finite", lambda n: 0 < n < float("inf"))
        self.expected_items = expected_items
        self._spec = LossSpec.of(max_nll=max_nll)
        self._alone = group is None
        self._group = groups.token_group(group, "mean")
        self._reset()

    def _reset(self) -> None:
        device = self.parameters[0].device
        self._sums = torch.zeros(2, dtype=reduction.sum_dtype(device), device=device)

    def add(self, output: LossOutput) -> Tensor:
        """Take S and M of a micro-batch, and give the loss to call `.backward()` on.

        Args:
            output: of `cross_entropy_with_stats` or `linear_cross_entropy_with_stats` with reduction="sum", without
                z_loss and without `group`. Of a compiled function and of backend="reference" it cannot be seen that
                they have neither; nor that a reentrant checkpoint calls `add` twice: keep `add` outside of it.
        """
        checks.check_sum_output(output)
        request = getattr(output.loss.grad_fn, "request", None)
        shards = None if request is None else request.groups  # ranks that hold them have the same tokens
        if self._alone and not (shards and shards.vocab):
            groups.warn_without_group("mean", None, None, output.loss)
        with torch.no_grad():
            self._sums += torch.stack((output.loss.to(self._sums), output.total_weight.to(self._sums)))
        return output.loss if self.expected_items == 1 else output.loss / self.expected_items

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Scale every `.grad` by PPL / M in place, forget the window, and return PPL, a 0-d float64 tensor.

        One all-reduce of 16 bytes. A rank without a micro-batch calls it as well. Without a counted token on any rank
        PPL is NaN and every gradient becomes zero.
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
    """gradients *= factor, of which bf16 and fp16 ones lose nothing but the rounding of the result."""
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]  # DTensor: the same memory
    wide = [g for g in local if g.dtype.itemsize >= 4]
    for device in {g.device for g in wide}:
        torch._foreach_mul_([g for g in wide if g.device == device], factor.to(device))
    for g in local:
        if g.dtype.itemsize < 4:
            # of one dimension, a factor makes the product one of fp32
            g = g.unsqueeze(0)
            torch.mul(g, factor.to(g.device, torch.float32).expand(1), out=g)
