# SPDX-License-Identifier: Apache-2.0
"""The loss from logits: local op -> row statistics and (S, M, Z) -> finish, and the gradient of it.

Opaque ops over logits of shape (..., V) with the classes last, of any strides.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from fused_ppl import backends, reduction
from fused_ppl.engines import LIBRARY, memory, without_autocast
from fused_ppl.spec import SPEC_SCHEMA, LossSpec

LIBRARY.define(
    "logits_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor? num_items, "
    f"{SPEC_SCHEMA}, str backend, int? memory_budget) "
    "-> (Tensor loss, Tensor perplexity, Tensor total_weight, Tensor loss_factor, Tensor perplexity_factor, "
    "Tensor nll, Tensor lse, Tensor entropy, Tensor predicted)"
)
LIBRARY.define(
    "logits_sums(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, "
    f"{SPEC_SCHEMA}, str backend, int? memory_budget) "
    "-> (Tensor sums, Tensor nll, Tensor lse, Tensor entropy, Tensor predicted)"
)
LIBRARY.define(
    "logits_backward(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor lse, Tensor nll, "
    "Tensor loss_factor, Tensor perplexity_factor, Tensor? grad_loss, Tensor? grad_perplexity, "
    f"{SPEC_SCHEMA}, str backend, int? memory_budget) -> Tensor"
)
LIBRARY.define(
    "logits_backward_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor lse, Tensor nll, "
    "Tensor loss_factor, Tensor perplexity_factor, Tensor? grad_loss, Tensor? grad_perplexity, "
    f"{SPEC_SCHEMA}, str backend, int? memory_budget) -> ()"
)


@without_autocast
def forward(logits, target, weight, token_weight, num_items, *rest, keep_lse=False):  # type: ignore[no-untyped-def]
    """What the op of that name does, without the dispatcher and without what only its schema asks for."""
    spec, backend, budget = LossSpec.of(*rest[:-2]), backends.load(rest[-2]), rest[-1]
    shape = target.shape
    rows, totals = backend.nll_forward(
        as_rows(logits), _flat(target), spec, weight, _flat(token_weight), num_items, budget, keep_lse
    )
    if totals is None:
        totals = reduction.finish(*reduction.sum_rows(rows, spec, shape), spec, num_items, rows.nll.dtype)
    return *totals, *(t if t is None or len(shape) == 1 else t.view(shape) for t in rows[2:])


@without_autocast
def _forward(*args):  # type: ignore[no-untyped-def]
    *results, entropy, predicted = forward(*args, keep_lse=True)
    return *results, *reduction.or_empty(entropy, predicted, results[0])


@without_autocast
def _sums(logits, target, weight, token_weight, *rest):  # type: ignore[no-untyped-def]
    """The part of `_forward` that comes before the sums of other ranks are added."""
    spec, backend, budget = LossSpec.of(*rest[:-2]), backends.load(rest[-2]), rest[-1]
    shape = target.shape
    rows, _ = backend.nll_forward(
        as_rows(logits),
        _flat(target),
        dataclasses.replace(spec, reduction="none"),  # rows only: their sums are not the loss yet
        weight,
        _flat(token_weight),
        None,
        budget,
    )
    nll, lse, entropy, predicted = (t if t is None else t.view(shape) for t in rows[2:])
    return reduction.stack_sums(rows, spec, shape), nll, lse, *reduction.or_empty(entropy, predicted, rows.nll)


def backward_into(  # type: ignore[no-untyped-def]
    out: Tensor, logits, target, weight, token_weight, lse, nll, *rest, columns: tuple[int, int] | None = None
) -> None:
    loss_factor, perplexity_factor, grad_loss, grad_perplexity = rest[:4]
    spec, backend, budget = LossSpec.of(*rest[4:-2]), backends.load(rest[-2]), rest[-1]
    of_s, of_z = reduction.row_upstream(
        grad_loss, grad_perplexity, loss_factor, perplexity_factor, spec, target.shape, nll.dtype
    )
    rows = as_rows(logits)
    backend.nll_backward(
        rows,
        _flat(target),
        _flat(lse),
        _flat(nll),
        of_s,
        of_z,
        spec,
        weight,
        _flat(token_weight),
        out if out.ndim == 2 else out.view(rows.shape),  # row by row as the logits: contiguous, or of their strides
        budget,
        columns,
    )


@without_autocast
def backward(logits, *args):  # type: ignore[no-untyped-def]
    contiguous = logits.is_contiguous()
    out = memory.empty(logits.shape, logits.dtype, logits.device) if contiguous else empty_gradient(logits)
    backward_into(out, logits, *args)
    return out


@without_autocast
def _backward_(logits, *args):  # type: ignore[no-untyped-def]
    if row_view(logits) is None:
        logits.copy_(backward(logits, *args))
    else:
        backward_into(logits, logits, *args)
    # a kernel writes past autograd, which has to know: another backward of the logits must raise
    torch.autograd.graph.increment_version(logits)


def _forward_fake(logits, target, weight, token_weight, num_items, reduction_, *rest):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(reduction.empty_results(logits, target, dtype, reduction_, rest[6]))


def _sums_fake(logits, target, weight, token_weight, reduction_, *rest):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens = reduction.empty_results(logits, target, dtype, reduction_, rest[6])[5:]
    return reduction.empty_sums(logits, target, reduction_, rest[4]), *tokens


LIBRARY.impl("logits_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("logits_sums", _sums, "CompositeExplicitAutograd")
LIBRARY.impl("logits_backward", backward, "CompositeExplicitAutograd")
LIBRARY.impl("logits_backward_", _backward_, "CompositeExplicitAutograd")
torch.library.register_fake("fused_ppl::logits_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fused_ppl::logits_sums", _sums_fake, lib=LIBRARY)
torch.library.register_fake("fused_ppl::logits_backward", lambda logits, *args: empty_gradient(logits), lib=LIBRARY)
torch.library.register_fake("fused_ppl::logits_backward_", lambda logits, *args: None, lib=LIBRARY)


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
    """Whether one stride walks over all of these (size, stride). By arithmetic: a fake tensor must decide as a real."""
    dims = [(size, stride) for size, stride in dims if size != 1]
    return all(stride == n * inner for (_, stride), (n, inner) in itertools.pairwise(dims))


def as_rows(logits: Tensor) -> Tensor:
    """`row_view`, or a contiguous copy."""
    rows = row_view(logits)
    return logits.reshape(1, -1, logits.shape[-1]) if rows is None else rows


def empty_gradient(logits: Tensor) -> Tensor:
    """Uninitialised, with the strides of the logits, so that rows keep their alignment; else contiguous.

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


def _flat(values: Tensor | None) -> Tensor | None:
    return values if values is None or values.ndim == 1 else values.reshape(-1)
