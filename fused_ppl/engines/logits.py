# SPDX-License-Identifier: Apache-2.0
"""The loss from logits of shape (..., V), classes last, of any strides: one op forward, one op backward.

    forward    row statistics of the backend -> S, M, Z -> loss, perplexity, and their derivatives by S
    backward   the upstream gradients of S and Z -> the backend's gradient of every row

The largest buffer is the gradient, N x V in the dtype of the logits, or nothing where it is written over the logits.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_ppl import backends, reduction
from fused_ppl.engines import memory
from fused_ppl.engines.ops import op, without_autocast
from fused_ppl.records import (
    Execution,
    HeadInputs,
    LogitsInputs,
    LossResults,
    Normalizers,
    RowUpstream,
    Shard,
    TokenInputs,
    TokenSums,
    TokenUpstream,
    Upstream,
)
from fused_ppl.spec import LossSpec


@without_autocast
def forward(inputs: LogitsInputs, spec: LossSpec, execution: Execution, *, keep_lse: bool = True) -> LossResults:
    """The op `logits_forward`. Without `keep_lse`, lse is None if neither the result nor the gradient needs it."""
    shape, num_items = inputs.target.shape, inputs.num_items
    rows, totals = backends.load(execution.backend).nll_forward(
        as_rows(inputs.logits),
        token_inputs(inputs),
        spec,
        num_items=num_items,
        memory_budget=execution.memory_budget,
        keep_lse=keep_lse,
    )
    if totals is None:
        sums = reduction.sum_rows(rows, spec, shape)
        totals = reduction.finish(sums, spec, num_items=num_items, dtype=rows.nll.dtype)
    if len(shape) != 1:
        rows = rows.map(lambda t, _: t.view(shape))
    return LossResults(*totals, rows.nll, rows.lse, rows.entropy, rows.predicted)


def _forward_fake(inputs: LogitsInputs, spec: LossSpec, execution: Execution) -> LossResults:
    dtype, groups = (
        reduction.wide_dtype(inputs.logits.dtype),
        reduction.group_shape(spec.reduction, inputs.target.shape),
    )
    tokens = reduction.empty_token_sums(inputs.logits, inputs.target, spec, dtype)
    stats = (tokens.nll, tokens.lse, tokens.entropy, tokens.predicted)
    return LossResults(*reduction.empty_totals(inputs.logits, groups, dtype), *stats)


@op(_forward_fake)
def logits_forward(inputs: LogitsInputs, spec: LossSpec, execution: Execution) -> LossResults:
    results = forward(inputs, spec, execution)
    entropy, predicted = reduction.or_empty(results.entropy, results.predicted, results.nll)
    return results._replace(entropy=entropy, predicted=predicted)


def _sums_fake(inputs: LogitsInputs, spec: LossSpec, execution: Execution) -> TokenSums:
    return reduction.empty_token_sums(inputs.logits, inputs.target, spec, reduction.wide_dtype(inputs.logits.dtype))


@op(_sums_fake)
def logits_sums(inputs: LogitsInputs, spec: LossSpec, execution: Execution) -> TokenSums:
    """The part of `logits_forward` that comes before the sums of other ranks are added."""
    rows, _ = backends.load(execution.backend).nll_forward(
        as_rows(inputs.logits),
        token_inputs(inputs),
        spec._replace(reduction="none"),  # the statistics of rows only
        num_items=None,
        memory_budget=execution.memory_budget,
        keep_lse=True,
    )
    return reduction.token_sums(rows, spec, inputs.target.shape)


class Saved(NamedTuple):
    """The tensors that backward needs."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    token_weight: Tensor | None
    lse: Tensor | None
    nll: Tensor


def backward_into(
    out: Tensor, saved: Saved, upstream: Upstream, spec: LossSpec, *, execution: Execution, shard: Shard | None = None
) -> None:
    """Write the gradient of the logits, which may be those of a shard, into `out`, or over the logits themselves."""
    of_rows = reduction.row_upstream(upstream, spec, saved.target.shape, saved.nll.dtype)
    rows_backward_into(out, saved, of_rows, spec, execution=execution, shard=shard)


def rows_backward_into(
    out: Tensor, saved: Saved, upstream: RowUpstream, spec: LossSpec, *, execution: Execution, shard: Shard | None
) -> None:
    """`backward_into` from the upstream gradients of rows."""
    logits, target, weight, token_weight, lse, nll = saved
    rows = as_rows(logits)
    backends.load(execution.backend).nll_backward(
        rows,
        TokenInputs(flat(target), weight, flat(token_weight)),
        spec,
        normalizers=Normalizers(flat(lse), flat(nll)),  # type: ignore[arg-type]  # None where unused
        upstream=upstream,
        out=out if out.ndim == 2 else out.view(rows.shape),  # contiguous, or with the strides of the logits
        memory_budget=execution.memory_budget,
        shard=shard,
    )


@without_autocast
def backward(saved: Saved, upstream: Upstream, spec: LossSpec, execution: Execution) -> Tensor:
    """The op `logits_backward`."""
    logits = saved.logits
    contiguous = logits.is_contiguous()
    out = memory.empty(logits.shape, logits.dtype, logits.device) if contiguous else empty_gradient(logits)
    backward_into(out, saved, upstream, spec, execution=execution)
    return out


@op(lambda saved, *_: empty_gradient(saved.logits))
def logits_backward(saved: Saved, upstream: Upstream, spec: LossSpec, execution: Execution) -> Tensor:
    return backward(saved, upstream, spec, execution)


@op(lambda *_: None, mutates=True)
def logits_backward_(saved: Saved, upstream: Upstream, spec: LossSpec, execution: Execution) -> None:
    """`logits_backward` over the logits."""
    write_over_logits(saved, upstream, spec, execution=execution, shard=None)


@op(lambda saved, *_, **__: empty_gradient(saved.logits))
def token_backward(
    saved: Saved, upstream: TokenUpstream, spec: LossSpec, execution: Execution, *, entropy: Tensor | None, shard: Shard
) -> Tensor:
    """The gradient of the logits from those of log-probabilities, entropies and lse of all classes."""
    out = empty_gradient(saved.logits)
    of_rows = reduction.token_upstream(upstream, entropy, saved.nll)
    whole = shard.num_classes == saved.logits.shape[-1]
    rows_backward_into(out, saved, of_rows, spec, execution=execution, shard=None if whole else shard)
    return out


def write_over_logits(
    saved: Saved, upstream: Upstream, spec: LossSpec, *, execution: Execution, shard: Shard | None
) -> None:
    logits = saved.logits
    if row_view(logits) is None:
        out = empty_gradient(logits)
        backward_into(out, saved, upstream, spec, execution=execution, shard=shard)
        logits.copy_(out)
    else:
        backward_into(logits, saved, upstream, spec, execution=execution, shard=shard)
    # autograd does not see the writes of a kernel; with this, another backward of the logits raises
    torch.autograd.graph.increment_version(logits)


def token_inputs(inputs: LogitsInputs | HeadInputs) -> TokenInputs:
    return TokenInputs(flat(inputs.target), inputs.weight, flat(inputs.token_weight))


T = TypeVar("T", Tensor, Tensor | None)


def flat(values: T) -> T:
    """(N,) from the shape of the target."""
    return values if values is None or values.ndim == 1 else values.reshape(-1)


def row_view(logits: Tensor) -> Tensor | None:
    """(..., V) as a view (N, V) or (B, R, V), row n = b * R + r, or None where no view is.

    (B, T, V) contiguous gives (1, N, V); (N, C, H, W) with the classes moved last gives (N, H * W, C).
    """
    if logits.ndim == 2:
        return logits
    lead = list(zip(logits.shape[:-1], logits.stride()[:-1], strict=True))
    for split in range(len(lead) + 1):
        if _merges(lead[:split]) and _merges(lead[split:]):
            return logits.view(
                *(math.prod(n for n, _ in part) for part in (lead[:split], lead[split:])), logits.shape[-1]
            )
    return None


def _merges(dims: list[tuple[int, int]]) -> bool:
    """True if dimensions of these (size, stride) are one dimension. A fake tensor must give the same answer."""
    dims = [(size, stride) for size, stride in dims if size != 1]
    return all(stride == n * inner for (_, stride), (n, inner) in itertools.pairwise(dims))


def as_rows(logits: Tensor) -> Tensor:
    """`row_view`, or a contiguous copy."""
    rows = row_view(logits)
    return logits.reshape(1, -1, logits.shape[-1]) if rows is None else rows


def empty_gradient(logits: Tensor) -> Tensor:
    """An uninitialised gradient with the strides of the logits, so that rows keep their alignment, or contiguous.

    Strides are not kept where elements overlap, where no row view is, or where they would cost over a quarter more
    memory (logits[:, -1] of a large tensor).
    """
    if logits.is_contiguous():
        return torch.empty_like(logits)
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                extent = 0
                break
            extent += stride * (size - 1)
    if 0 < extent <= logits.numel() * 5 // 4 and row_view(logits) is not None:
        return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
