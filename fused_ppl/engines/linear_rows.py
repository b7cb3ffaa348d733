# SPDX-License-Identifier: Apache-2.0
"""The fused LM head by chunks of rows: logits of a chunk -> their gradient in place -> dh = G W, dW += G^T h.

The gradients are those of S (and of z_loss * Z), unscaled. One number multiplies them. It is known after the last row,
and `linear_scale` applies it. This is why every product is computed once: 6NVD FLOPs with all three gradients. Without
gradients to make, the same loop is the forward of every plan.

The largest buffers are a chunk of logits, and the float32 gradient of the weight, V x D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl import backends, reduction
from fused_ppl.engines.head import Head, HeadLoop, empty_gradients, empty_unscaled, scale_into
from fused_ppl.engines.ops import op, without_autocast
from fused_ppl.records import (
    HeadExecution,
    HeadInputs,
    HeadResults,
    HeadSums,
    LossResults,
    Needed,
    RowStats,
    Unscaled,
    Upstream,
)
from fused_ppl.spec import LossSpec


@without_autocast
def forward(inputs: HeadInputs, spec: LossSpec, execution: HeadExecution) -> HeadResults:
    """The op `linear_forward`."""
    stats, unscaled = stats_and_gradients(inputs, spec, execution)
    sums = reduction.sum_rows(stats, spec, inputs.target.shape)
    totals = reduction.finish(sums, spec, num_items=inputs.num_items, dtype=stats.nll.dtype)
    return HeadResults(LossResults(*totals, *reduction.token_stats(stats, inputs.target.shape)), unscaled, None, None)


def _forward_fake(inputs: HeadInputs, spec: LossSpec, execution: HeadExecution) -> HeadResults:
    dtype, nothing = reduction.wide_dtype(execution.dtype), inputs.hidden.new_empty(0)
    groups = reduction.group_shape(spec.reduction, inputs.target.shape)
    tokens = reduction.empty_token_sums(inputs.hidden, inputs.target, spec, dtype)
    stats = (tokens.nll, tokens.lse, tokens.entropy, tokens.predicted)
    losses = LossResults(*reduction.empty_totals(inputs.hidden, groups, dtype), *stats)
    return HeadResults(losses, empty_unscaled(inputs, execution), nothing, nothing.clone())


@op(_forward_fake)
def linear_forward(inputs: HeadInputs, spec: LossSpec, execution: HeadExecution) -> HeadResults:
    nothing = inputs.hidden.new_empty(0)
    return forward(inputs, spec, execution)._replace(residual=nothing, loss_error=nothing.clone())


def _sums_fake(inputs: HeadInputs, spec: LossSpec, execution: HeadExecution) -> HeadSums:
    dtype = reduction.wide_dtype(execution.dtype)
    tokens = reduction.empty_token_sums(inputs.hidden, inputs.target, spec, dtype)
    return HeadSums(tokens, empty_unscaled(inputs, execution))


@op(_sums_fake)
def linear_sums(inputs: HeadInputs, spec: LossSpec, execution: HeadExecution) -> HeadSums:
    """The part of `linear_forward` that comes before the sums of other ranks are added."""
    stats, unscaled = stats_and_gradients(inputs, spec, execution)
    return HeadSums(reduction.token_sums(stats, spec, inputs.target.shape), unscaled)


def stats_and_gradients(inputs: HeadInputs, spec: LossSpec, execution: HeadExecution) -> tuple[RowStats, Unscaled]:
    backend, grads = backends.load(execution.backend), execution.grads
    loop = HeadLoop(inputs, spec, execution, kind="rows" if any(grads) else "forward")
    head, parts = loop.head, []
    loop.clear()
    for chunk in loop.chunks():
        g = chunk.logits
        head.logits(chunk.hidden, g)
        parts.append(
            backend.nll_forward_backward(
                g,
                chunk.tokens,
                spec,
                target_logit=chunk.target_logit,
                upstream=1.0 if any(grads) else None,
                memory_budget=execution.memory_budget,
            )
        )
        loop.add_gradients(chunk)
    return stats_of_all(head, parts, spec, inputs.target.numel()), loop.finished()


def stats_of_all(head: Head, parts: list[RowStats], spec: LossSpec, num_tokens: int) -> RowStats:
    """The statistics of every token, from those of the rows that take part."""
    if not parts:
        loss, row_weight, nll, lse, entropy = (head.zeros(num_tokens) for _ in range(5))
        lse = lse.to(reduction.sum_dtype(lse.device))
        asked = (entropy, nll.long() - 1) if spec.stats else (None, None)
        return RowStats(loss, row_weight, nll, lse, *asked)
    stats = RowStats.concatenate(parts)
    if head.counted_rows is None:
        return stats
    return stats.map(lambda t, ignored: head.for_all_tokens(t, num_tokens, ignored))


@without_autocast
def scale(
    inputs: HeadInputs, unscaled: Unscaled, upstream: Upstream, spec: LossSpec, *, grads: Needed, last: bool = False
) -> Unscaled:
    """The op `linear_scale`; at the `last` use of the unscaled gradients, in their own memory."""
    dtype = unscaled.grad_hidden.dtype
    of_tokens, of_all = _factors(reduction.upstream_of_sum(upstream), inputs.target, spec.ignore_index, dtype=dtype)
    likes = (inputs.hidden, inputs.linear_weight, inputs.linear_bias)
    reused = [
        last and needed and like is not None and made.dtype == like.dtype
        for like, made, needed in zip(likes, unscaled, grads, strict=True)
    ]
    fresh = [needed and not again for needed, again in zip(grads, reused, strict=True)]
    results = list(empty_gradients(inputs, fresh))
    for i, needed in enumerate(grads):
        if reused[i]:
            results[i] = unscaled[i]
        if needed:
            scale_into(results[i], unscaled[i], of_all if i else of_tokens)
    return Unscaled(*results)


@op(lambda inputs, unscaled, upstream, spec, *, grads: empty_gradients(inputs, grads, fake=True))
def linear_scale(
    inputs: HeadInputs, unscaled: Unscaled, upstream: Upstream, spec: LossSpec, *, grads: Needed
) -> Unscaled:
    return scale(inputs, unscaled, upstream, spec, grads=grads)


def _factors(factor: Tensor, target: Tensor, ignore_index: int | None, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factor of each token, (*target.shape, 1), or of all; and that of a sum over tokens.

    It is 0 where no token is counted: the zeros that stand there must stay zeros where the factor is inf in `dtype`.
    """
    if factor.device.type == "cpu" and abs(factor.item()) <= torch.finfo(dtype).max:
        return factor, factor
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    of_tokens = torch.where(counted, factor, 0).unsqueeze(-1)
    return of_tokens, torch.where(counted.any(), factor, 0)
