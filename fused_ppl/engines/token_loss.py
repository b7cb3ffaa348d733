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
from fused_ppl.records import HeadExecution, HeadInputs, Normalizers, RowStats, RowUpstream, Unscaled
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
        loop.head.logits(chunk.hidden, chunk.logits)
        stats = backend.nll_forward_backward(
            chunk.logits,
            chunk.tokens,
            spec,
            target_logit=chunk.target_logit,
            upstream=None,
            memory_budget=execution.memory_budget,
        )
        loss, upstream = _losses(chunk, stats, spec, function=function, constants=constants, differentiate=any(grads))
        total += loss.sum(dtype=dtype)
        count += stats.weight.sum(dtype=dtype)
        if upstream is None:
            continue
        assert stats.lse is not None
        backend.nll_backward(
            chunk.logits,
            chunk.tokens,
            spec,
            normalizers=Normalizers(stats.lse, stats.nll),
            upstream=upstream,
            out=chunk.logits,
            memory_budget=execution.memory_budget,
        )
        loop.add_gradients(chunk)
    return torch.stack((total, count)), loop.finished()


def _losses(
    chunk: Chunk,
    stats: RowStats,
    spec: LossSpec,
    *,
    function: TokenFunction,
    constants: Sequence[Tensor],
    differentiate: bool,
) -> tuple[Tensor, RowUpstream | None]:
    """The loss of each row of a chunk, 0 where it is ignored, and the upstream gradients of the rows."""
    assert stats.entropy is not None
    log_prob, entropy = 0 - stats.nll, stats.entropy.clone()
    with torch.set_grad_enabled(differentiate):
        if differentiate:
            log_prob.requires_grad_(), entropy.requires_grad_()
        loss = function(log_prob, entropy, *(values[chunk.rows] for values in constants))
        token_checks.check_token_loss(loss, log_prob)
        if spec.ignore_index is not None:
            loss = torch.where(chunk.tokens.target != spec.ignore_index, loss, 0)
        if not differentiate or not loss.requires_grad:
            return loss.detach(), None if not differentiate else _no_upstream(log_prob)
        token_checks.check_depends_on_nothing_else(loss, log_prob, entropy)
        of_log_prob, of_entropy = torch.autograd.grad(loss.sum(), (log_prob, entropy), allow_unused=True)
    of_nll = torch.zeros_like(stats.nll) if of_log_prob is None else -of_log_prob
    value = None if of_entropy is None else stats.entropy
    return loss.detach(), RowUpstream(of_nll, None, None, of_entropy, value)


def _no_upstream(like: Tensor) -> RowUpstream:
    return RowUpstream(torch.zeros_like(like, requires_grad=False), None)
