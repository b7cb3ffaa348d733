# SPDX-License-Identifier: Apache-2.0
"""The fused LM head by slices of the vocabulary: backward recomputes the logits of a slice and writes its dW once.

For upstream gradients of each token, which forward cannot know, and for memory too tight for a float32 gradient of the
weight. Forward is that of `linear_rows` without gradients. Backward computes the logits a second time: 8NVD FLOPs.

The largest buffer of backward is a slice of logits, N x columns; forward holds a chunk, rows x V. The gradient of the
weight is written in its own dtype.
"""

from __future__ import annotations

import torch

from fused_ppl import backends, plan, reduction
from fused_ppl.engines import memory
from fused_ppl.engines.head import Head, empty_gradients, linear_case
from fused_ppl.engines.ops import op
from fused_ppl.records import (
    HeadExecution,
    HeadInputs,
    Normalizers,
    RowUpstream,
    Shard,
    TokenStats,
    TokenUpstream,
    Unscaled,
    Upstream,
)
from fused_ppl.spec import LossSpec


def _fake(inputs: HeadInputs, upstream: Upstream, spec: LossSpec, execution: HeadExecution, **_: object) -> Unscaled:
    return empty_gradients(inputs, execution.grads, fake=True)


@op(_fake)
def linear_vocab_backward(
    inputs: HeadInputs,
    upstream: Upstream,
    spec: LossSpec,
    execution: HeadExecution,
    *,
    normalizers: Normalizers,
    shard: Shard,
) -> Unscaled:
    """The gradients, scaled. The weight is that of the shard; where no other rank has classes, of all of them."""
    of_rows = reduction.row_upstream(upstream, spec, inputs.target.shape, normalizers.nll.dtype)
    return gradients(inputs, of_rows, spec, execution=execution, normalizers=normalizers, shard=shard)


@op(_fake)
def linear_token_backward(
    inputs: HeadInputs,
    upstream: TokenUpstream,
    spec: LossSpec,
    execution: HeadExecution,
    *,
    stats: TokenStats,
    shard: Shard,
) -> Unscaled:
    """The gradients from those of log-probabilities, entropies and lse of all classes."""
    of_rows = reduction.token_upstream(upstream, stats.entropy, stats.nll)
    known = Normalizers(stats.lse, stats.nll)
    return gradients(inputs, of_rows, spec, execution=execution, normalizers=known, shard=shard)


def gradients(
    inputs: HeadInputs,
    upstream: RowUpstream,
    spec: LossSpec,
    *,
    execution: HeadExecution,
    normalizers: Normalizers,
    shard: Shard,
) -> Unscaled:
    """The loop over slices of the vocabulary. `upstream` and `normalizers` are those of all tokens."""
    backend, grads = backends.load(execution.backend), execution.grads
    head, (v, d) = Head(inputs, spec, execution), inputs.linear_weight.shape
    of_rows = upstream.map(head.of_rows)
    known = Normalizers(*(head.of_rows(t.reshape(-1)) for t in normalizers))
    h, n = head.hidden.to(head.dtype), head.num_rows
    columns = plan.linear_plan(linear_case(h, inputs.linear_weight, execution), "vocab").columns

    grad_hidden, grad_weight, grad_bias = made = empty_gradients(inputs, grads)
    dh = torch.zeros((n, d) if grads[0] else (0,), dtype=head.wide, device=h.device)
    buffer = memory.empty((n * columns,), head.dtype, h.device, brief=True)  # that of forward, if it is as large
    for first in range(0, v, columns):
        last = min(first + columns, v)
        g = buffer[: n * (last - first)].view(n, last - first)
        head.logits(h, g, first)
        backend.nll_backward(
            g,
            head.tokens,
            spec,
            normalizers=known,
            upstream=of_rows,
            out=g,
            memory_budget=execution.memory_budget,
            shard=shard._replace(first=shard.first + first),
        )
        if grads[0]:
            head.add_hidden_gradient(g, dh, first)
        if grads[1] and grad_weight.dtype == g.dtype:
            torch.mm(g.t(), h, out=grad_weight[first:last])
        elif grads[1]:
            grad_weight[first:last] = torch.mm(g.t(), h)
        if grads[2]:
            grad_bias[first:last] = g.sum(0, dtype=head.wide)
    if grads[0]:
        grad_hidden.copy_(head.for_all_tokens(dh, inputs.target.numel()).view(inputs.hidden.shape))
    return made
