# SPDX-License-Identifier: Apache-2.0
"""Any loss of each token over the fused head in three products: sum_i f(log_prob[i], entropy[i], ...).

The derivatives of f are numbers of a token, and f is known in forward. So autograd gives them for the tokens of a
chunk, and the gradient of the chunk's logits is written in place at once: 6NVD FLOPs, as in `linear_rows`. Whoever
learns the upstream gradients only in backward computes the logits again, 8NVD (`linear_vocab`).

The largest buffers are those of `linear_rows`: a chunk of logits, and the float32 gradient of the weight, V x D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fused_ppl import backends, reduction, token_checks
from fused_ppl.engines.head import Chunk, HeadLoop
from fused_ppl.engines.ops import without_autocast
from fused_ppl.records import HeadExecution, HeadInputs, RowUpstream, Unscaled
from fused_ppl.spec import LossSpec

TokenFunction: TypeAlias = Callable[..., Tensor]  # (log_prob, entropy, *per_token), each (R,), to the loss (R,)


@without_autocast
def sums_and_gradients(
    inputs: HeadInputs,
    spec: LossSpec,
    execution: HeadExecution,
    *,
    function: TokenFunction,
    per_token: Sequence[Tensor],
) -> tuple[Tensor, Unscaled]:
    """(2,): the sum of f over the counted tokens, and their number; and the gradients of that sum."""
    backend, grads = backends.load(execution.backend), execution.grads
    loop = HeadLoop(inputs, spec, execution, kind="rows" if any(grads) else "forward")
    loop.clear()
    dtype, device = reduction.sum_dtype(inputs.hidden.device), inputs.hidden.device
    total, count = (torch.zeros((), dtype=dtype, device=device) for _ in range(2))
    constants = [loop.head.of_rows(values.reshape(-1)) for values in per_token]
    for chunk in loop.chunks():
        losses = _Losses(chunk, spec, total, function=function, constants=[values[chunk.rows] for values in constants])
        loop.head.logits(chunk.hidden, chunk.logits)
        stats = backend.nll_forward_backward(
            chunk.logits,
            chunk.tokens,
            spec,
            target_logit=chunk.target_logit,
            upstream=losses.differentiate if any(grads) else None,
            memory_budget=execution.memory_budget,
        )
        count += stats.weight.sum(dtype=dtype)
        if any(grads):
            loop.add_gradients(chunk)
        else:
            losses.add(0 - stats.nll, stats.entropy, slice(None))
    return torch.stack((total, count)), loop.finished()


class _Losses:
    """f for rows of a chunk: its sum over the counted rows is added to `total`."""

    def __init__(
        self, chunk: Chunk, spec: LossSpec, total: Tensor, *, function: TokenFunction, constants: list[Tensor]
    ) -> None:
        self.total, self.function, self.constants = total, function, constants
        target = chunk.tokens.target
        self.counted = None if spec.ignore_index is None else target != spec.ignore_index

    def add(self, log_prob: Tensor, entropy: Tensor | None, rows: slice) -> Tensor:
        """Add the losses of some rows of the chunk, and return them: 0 where a row is ignored."""
        loss = self.function(log_prob, entropy, *(values[rows] for values in self.constants))
        token_checks.check_token_loss(loss, log_prob)
        if self.counted is not None:
            loss = torch.where(self.counted[rows], loss, 0)
        self.total += loss.detach().sum(dtype=self.total.dtype)
        return loss

    def differentiate(self, nll: Tensor, entropy: Tensor | None, rows: slice) -> RowUpstream:
        """`add`, and the derivatives of the losses: the `RowFunction` of the backends."""
        assert entropy is not None
        known = (0 - nll).requires_grad_(), entropy.clone().requires_grad_()
        with torch.enable_grad():
            loss = self.add(*known, rows)
        if not loss.requires_grad:
            return RowUpstream(torch.zeros_like(nll), None)
        token_checks.check_depends_on_nothing_else(loss, *known)
        of_log_prob, of_entropy = torch.autograd.grad(loss, known, torch.ones_like(loss), allow_unused=True)
        of_nll = torch.zeros_like(nll) if of_log_prob is None else -of_log_prob
        return RowUpstream(of_nll, None, None, of_entropy, None if of_entropy is None else entropy)
