# SPDX-License-Identifier: Apache-2.0
"""A loss as ops and the collectives between them: local op -> S, M, Z -> [sum over the token group] -> finish.

Collectives are functional ones between opaque ops, so that torch.compile sees them. One process is the case without
collectives; there forward is one op, or a plain call of its function where nothing watches what is dispatched.

No record is changed by `_replace` here, and none has a property: torch 2.6 traces neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_ppl import reduction
from fused_ppl.engines import linear_rows, logits
from fused_ppl.engines.finish import finish
from fused_ppl.engines.linear_compact import linear_compact, linear_compact_shard
from fused_ppl.engines.linear_rows import linear_forward, linear_scale, linear_sums
from fused_ppl.engines.linear_vocab import linear_token_backward, linear_vocab_backward
from fused_ppl.engines.logits import (
    Saved,
    logits_backward,
    logits_backward_,
    logits_forward,
    logits_sums,
    token_backward,
)
from fused_ppl.engines.ops import may_skip_dispatch, may_skip_name
from fused_ppl.engines.token_loss import TokenFunction, sums_and_gradients
from fused_ppl.engines.vocab_shards import (
    shard_hidden,
    shard_logits,
    shard_logits_backward,
    shard_logits_backward_,
    shard_merge,
    shard_sums,
)
from fused_ppl.groups import all_reduce
from fused_ppl.records import (
    Groups,
    HeadExecution,
    HeadInputs,
    HeadRequest,
    HeadResults,
    LogitsInputs,
    LogitsRequest,
    LossResults,
    Normalizers,
    Shard,
    ShardStats,
    TokenInputs,
    TokenStats,
    TokenSums,
    TokenUpstream,
    Unscaled,
    Upstream,
)
from fused_ppl.spec import LossSpec

_NO_GRADS = (False, False, False)


def logits_loss(inputs: LogitsInputs, request: LogitsRequest) -> LossResults:
    """The results over the batch and the vocabulary of all ranks."""
    spec, execution, groups = request.spec, request.execution, request.groups
    if groups is None:
        if may_skip_name(inputs.logits):
            return logits.forward(inputs, spec, execution, keep_lse=False)
        return logits_forward(inputs, spec, execution)
    shard = _shard_of(groups)
    if shard is None:
        return _finish(logits_sums(inputs, spec, execution), inputs.num_items, spec, groups=groups)
    stats = shard_logits(inputs, spec, execution, shard=shard, layout=groups.layout)
    tokens = TokenInputs(inputs.target, inputs.weight, inputs.token_weight)
    dtype = reduction.wide_dtype(inputs.logits.dtype)
    return _finish(_merge(stats, tokens, spec, groups=groups, dtype=dtype), inputs.num_items, spec, groups=groups)


def logits_gradient(saved: Saved, upstream: Upstream, request: LogitsRequest, *, batched: bool) -> Tensor:
    """The gradient of the logits; with `inplace_backward` it is written over them."""
    spec, execution = request.spec, request.execution
    shard = _shard_of(request.groups)
    if request.inplace_backward:
        if shard is None:
            logits_backward_(saved, upstream, spec, execution)
        else:
            shard_logits_backward_(saved, upstream, spec, execution, shard=shard)
        return saved.logits.detach()  # the logits themselves would bring their graph along
    if shard is not None:
        return shard_logits_backward(saved, upstream, spec, execution, shard=shard)
    # only an op knows the numbers of `scalars`
    direct = not batched and spec.scalars is None and may_skip_name(saved.logits)
    function = logits.backward if direct else logits_backward
    return function(saved, upstream, spec, execution)


def head_loss(inputs: HeadInputs, request: HeadRequest) -> HeadResults:
    """The results over the batch and the vocabulary of all ranks, with the unscaled gradients that forward makes."""
    spec, execution, groups = request.spec, request.execution, request.groups
    shard = _shard_of(groups)
    if request.plan == "compact" and shard is None:
        found = linear_compact(inputs, spec, execution, request.compact)
        losses = _finish(found.tokens, inputs.num_items, spec, groups=groups)
        return HeadResults(losses, found.unscaled, found.residual, found.loss_error)
    if request.plan == "vocab":
        execution = HeadExecution(execution.backend, execution.memory_budget, execution.dtype, _NO_GRADS)
    if groups is None:
        function = linear_rows.forward if may_skip_name(inputs.hidden) else linear_forward
        return function(inputs, spec, execution)
    # an autograd.Function that torch 2.6 traces returns no None
    no_errors = [inputs.hidden.new_empty(0) for _ in range(2)]
    if shard is None:
        sums = linear_sums(inputs, spec, execution)
        return HeadResults(_finish(sums.tokens, inputs.num_items, spec, groups=groups), sums.unscaled, *no_errors)
    stats = shard_hidden(inputs, spec, execution, shard=shard, layout=groups.layout)
    tokens = TokenInputs(inputs.target, inputs.weight, inputs.token_weight)
    wide = reduction.wide_dtype(execution.dtype)
    merged = _merge(stats, tokens, spec, groups=groups, dtype=wide)
    if request.plan == "compact":
        normalizers = Normalizers(merged.lse, merged.nll)
        unscaled, residual = linear_compact_shard(
            inputs, spec, execution, request.compact, normalizers=normalizers, shard=shard
        )
        losses = _finish(merged, inputs.num_items, spec, groups=groups)
        return HeadResults(losses, unscaled, residual, residual.new_zeros(residual.shape))
    unscaled = Unscaled(*(inputs.hidden.new_empty(0, dtype=wide) for _ in range(3)))
    return HeadResults(_finish(merged, inputs.num_items, spec, groups=groups), unscaled, *no_errors)


def head_gradients(
    inputs: HeadInputs, known: tuple[Normalizers, Unscaled], upstream: Upstream, request: HeadRequest, *, last: bool
) -> Unscaled:
    """The gradients of hidden states, weight and bias. At the `last` use of the unscaled ones their memory is taken."""
    (normalizers, unscaled), spec, execution = known, request.spec, request.execution
    grads = execution.grads
    shard = _shard_of(request.groups)
    if request.plan == "vocab":
        every = Shard(0, inputs.linear_weight.shape[0])
        gradients = linear_vocab_backward(
            inputs, upstream, spec, execution, normalizers=normalizers, shard=shard or every
        )
    elif last and may_skip_dispatch(inputs.hidden):
        gradients = linear_rows.scale(inputs, unscaled, upstream, spec, grads=grads, last=True)
    else:
        gradients = linear_scale(inputs, unscaled, upstream, spec, grads=grads)
    return _summed(gradients, request)


def logits_token_gradient(
    saved: Saved, upstream: TokenUpstream, request: LogitsRequest, *, entropy: Tensor | None
) -> Tensor:
    """The gradient of the logits from those of log-probabilities, entropies and lse."""
    shard = _shard_of(request.groups) or Shard(0, saved.logits.shape[-1])
    return token_backward(saved, upstream, request.spec, request.execution, entropy=entropy, shard=shard)


def head_token_gradients(
    inputs: HeadInputs, stats: TokenStats, upstream: TokenUpstream, request: HeadRequest
) -> Unscaled:
    """`head_gradients` from the upstream gradients of log-probabilities, entropies and lse, by plan "vocab"."""
    shard = _shard_of(request.groups) or Shard(0, inputs.linear_weight.shape[0])
    made = linear_token_backward(inputs, upstream, request.spec, request.execution, stats=stats, shard=shard)
    return _summed(made, request)


def head_token_loss(
    inputs: HeadInputs, request: HeadRequest, *, function: TokenFunction, per_token: Sequence[Tensor]
) -> HeadResults:
    """The sum or the mean of f over the counted tokens of all ranks, and its unscaled gradients."""
    spec, execution, groups = request.spec, request.execution, request.groups
    sums, unscaled = sums_and_gradients(inputs, spec, execution, function=function, per_token=per_token)
    unknown = sums.new_empty(0)
    tokens = TokenSums(sums, unknown.to(reduction.wide_dtype(execution.dtype)), unknown, unknown, unknown)
    losses = _finish(tokens, inputs.num_items, spec, groups=groups)
    return HeadResults(losses, unscaled, None, None)


def _summed(gradients: Unscaled, request: HeadRequest) -> Unscaled:
    """Each shard of the vocabulary has made its part of the gradient of the hidden states, by whatever plan."""
    groups = request.groups
    if groups is None or not groups.sum_hidden or not request.execution.grads[0]:
        return gradients
    hidden, linear_weight, linear_bias = gradients
    return Unscaled(all_reduce(hidden, "sum", groups.vocab), linear_weight, linear_bias)


def _shard_of(groups: Groups | None) -> Shard | None:
    """The part of the vocabulary that this rank holds; None if it holds all classes."""
    return Shard(groups.first, groups.num_classes) if groups is not None and groups.vocab else None


def _merge(stats: ShardStats, tokens: TokenInputs, spec: LossSpec, *, groups: Groups, dtype: torch.dtype) -> TokenSums:
    """The rows of all shards of the vocabulary: a maximum, then sums relative to it."""
    maxima = all_reduce(stats.maxima, "max", groups.vocab)
    added = all_reduce(shard_sums(ShardStats(stats.fields, maxima), spec), "sum", groups.vocab)
    return shard_merge(maxima, added, tokens, spec, num_classes=groups.num_classes, dtype=dtype)


def _finish(tokens: TokenSums, num_items: Tensor | None, spec: LossSpec, *, groups: Groups | None) -> LossResults:
    sums = tokens.sums
    if groups is not None and groups.tokens:
        sums = all_reduce(sums, "sum", groups.tokens)
    ranks = 1 if groups is None else groups.ranks
    totals = finish(sums, num_items, spec, dtype=tokens.nll.dtype, ranks=ranks)
    return LossResults(*totals, tokens.nll, tokens.lse, tokens.entropy, tokens.predicted)
