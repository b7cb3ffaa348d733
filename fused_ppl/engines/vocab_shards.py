# SPDX-License-Identifier: Apache-2.0
"""The loss where ranks hold shards of the vocabulary: what each op does between two collectives.

    shard_logits or shard_hidden -> [maximum] -> shard_sums -> [sum] -> shard_merge -> [sum of S, M, Z] -> finish

Forward keeps lse and nll, which are the same on all ranks; backward computes each rank's own columns from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl import backends, checks, rank_checks, reduction
from fused_ppl.backends import shards
from fused_ppl.engines import logits
from fused_ppl.engines.head import HeadLoop
from fused_ppl.engines.ops import op
from fused_ppl.records import (
    Execution,
    HeadExecution,
    HeadInputs,
    LogitsInputs,
    Shard,
    ShardStats,
    TokenInputs,
    TokenSums,
    Upstream,
)
from fused_ppl.spec import LossSpec

FIELDS = 6  # numbers that a shard says of a row


def _stats_fake(inputs: LogitsInputs | HeadInputs, spec: LossSpec, *_: object, **__: object) -> ShardStats:
    like, n, dtype = inputs.target, inputs.target.numel(), reduction.sum_dtype(inputs.target.device)
    maxima = (n + shards.CHECKS, 2 if spec.stats else 1)
    return ShardStats(like.new_empty((n, FIELDS), dtype=dtype), like.new_empty(maxima, dtype=dtype))


@op(_stats_fake)
def shard_logits(
    inputs: LogitsInputs, spec: LossSpec, execution: Execution, *, shard: Shard, layout: int
) -> ShardStats:
    tokens = logits.token_inputs(inputs)
    fields = backends.load(execution.backend).nll_forward_shard(
        logits.as_rows(inputs.logits),
        tokens,
        spec,
        target_logit=None,
        memory_budget=execution.memory_budget,
        shard=shard,
    )
    return ShardStats(fields, shards.maxima(fields, tokens.target, spec, first=shard.first, layout=layout))


@op(_stats_fake)
def shard_hidden(
    inputs: HeadInputs, spec: LossSpec, execution: HeadExecution, *, shard: Shard, layout: int
) -> ShardStats:
    """The logits of a chunk of rows at a time, as the forward of one process."""
    backend = backends.load(execution.backend)
    loop = HeadLoop(inputs, spec, execution._replace(grads=(False, False, False)), kind="forward", shard=shard)
    parts = [torch.zeros(0, FIELDS, dtype=reduction.sum_dtype(inputs.hidden.device), device=inputs.hidden.device)]
    for chunk in loop.chunks():
        loop.head.logits(chunk.hidden, chunk.logits)
        parts.append(
            backend.nll_forward_shard(
                chunk.logits,
                TokenInputs(chunk.tokens.target, inputs.weight, None),
                spec,
                target_logit=chunk.target_logit,
                memory_budget=execution.memory_budget,
                shard=shard,
            )
        )
    fields = loop.head.for_all_tokens(torch.cat(parts), inputs.target.numel())
    return ShardStats(fields, shards.maxima(fields, logits.flat(inputs.target), spec, first=shard.first, layout=layout))


def _sums_fake(stats: ShardStats, spec: LossSpec) -> Tensor:
    return stats.fields.new_empty((stats.fields.shape[0], 2 + (spec.label_smoothing > 0) + spec.stats))


@op(_sums_fake)
def shard_sums(stats: ShardStats, spec: LossSpec) -> Tensor:
    """`stats.maxima` are those of all ranks."""
    if stats.maxima.device.type == "cpu" or checks.debug():
        rank_checks.check_same_shards(*shards.same(stats.maxima).tolist())
    return shards.sums(stats.fields, stats.maxima, spec)


def _merge_fake(
    maxima: Tensor, added: Tensor, tokens: TokenInputs, spec: LossSpec, *, num_classes: int, dtype: torch.dtype
) -> TokenSums:
    return reduction.empty_token_sums(maxima, tokens.target, spec, dtype)


@op(_merge_fake)
def shard_merge(
    maxima: Tensor, added: Tensor, tokens: TokenInputs, spec: LossSpec, *, num_classes: int, dtype: torch.dtype
) -> TokenSums:
    """The sums of one process with all of the classes. `tokens` has the shape of the target."""
    shape, rows = (
        tokens.target.shape,
        TokenInputs(logits.flat(tokens.target), tokens.weight, logits.flat(tokens.token_weight)),
    )
    stats = shards.merge(maxima, added, rows, spec, num_classes=num_classes, dtype=dtype)
    return reduction.token_sums(stats, spec, shape)


@op(lambda saved, *_, **__: logits.empty_gradient(saved.logits))
def shard_logits_backward(
    saved: logits.Saved, upstream: Upstream, spec: LossSpec, execution: Execution, *, shard: Shard
) -> Tensor:
    out = logits.empty_gradient(saved.logits)
    logits.backward_into(out, saved, upstream, spec, execution=execution, shard=shard)
    return out


@op(lambda *_, **__: None, mutates=True)
def shard_logits_backward_(
    saved: logits.Saved, upstream: Upstream, spec: LossSpec, execution: Execution, *, shard: Shard
) -> None:
    """`shard_logits_backward` over the logits."""
    logits.write_over_logits(saved, upstream, spec, execution=execution, shard=shard)
