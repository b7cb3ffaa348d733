# SPDX-License-Identifier: Apache-2.0
"""The loss from logits: local op -> row statistics and (S, M, Z) -> finish, and the gradient of it.

Two opaque ops over logits of shape (..., V) with the classes last, of any strides.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fused_ppl import backends, reduction
from fused_ppl.engines import LIBRARY
from fused_ppl.spec import SPEC_SCHEMA, LossSpec

_spec = functools.lru_cache(LossSpec)

LIBRARY.define(
    "logits_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor? num_items, "
    f"{SPEC_SCHEMA}, str backend, int? memory_budget) "
    "-> (Tensor loss, Tensor perplexity, Tensor total_weight, Tensor loss_factor, Tensor perplexity_factor, "
    "Tensor nll, Tensor lse, Tensor entropy, Tensor predicted)"
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


def _forward(logits, target, weight, token_weight, num_items, *rest):  # type: ignore[no-untyped-def]
    spec, backend, budget = _spec(*rest[:-2]), backends.load(rest[-2]), rest[-1]
    shape = target.shape
    rows, totals = backend.nll_forward(
        as_rows(logits), target.reshape(-1), spec, weight, _flat(token_weight), num_items, budget
    )
    if totals is None:
        totals = reduction.finish(*reduction.sum_rows(rows, spec, shape), spec, num_items, rows.nll.dtype)
    per_token = [t.view(shape) if t.numel() == math.prod(shape) else t for t in rows[2:]]
    return *totals, *per_token


def _backward_into(out: Tensor, logits, target, weight, token_weight, lse, nll, *rest) -> None:  # type: ignore[no-untyped-def]
    loss_factor, perplexity_factor, grad_loss, grad_perplexity = rest[:4]
    spec, backend, budget = _spec(*rest[4:-2]), backends.load(rest[-2]), rest[-1]
    of_s, of_z = reduction.row_upstream(
        grad_loss, grad_perplexity, loss_factor, perplexity_factor, spec, target.shape, nll.dtype
    )
    backend.nll_backward(
        as_rows(logits),
        target.reshape(-1),
        lse.reshape(-1),
        nll.reshape(-1),
        of_s,
        of_z,
        spec,
        weight,
        _flat(token_weight),
        as_rows(out),
        budget,
    )


def _backward(logits, *args):  # type: ignore[no-untyped-def]
    out = empty_gradient(logits)
    _backward_into(out, logits, *args)
    return out


def _backward_(logits, *args):  # type: ignore[no-untyped-def]
    if row_view(logits) is None:
        logits.copy_(_backward(logits, *args))  # type: ignore[no-untyped-call]
    else:
        _backward_into(logits, logits, *args)


def _forward_fake(logits, target, weight, token_weight, num_items, reduction_, *rest):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(reduction.empty_results(logits, target, dtype, reduction_, rest[6]))


LIBRARY.impl("logits_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("logits_backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("logits_backward_", _backward_, "CompositeExplicitAutograd")
torch.library.register_fake("fused_ppl::logits_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fused_ppl::logits_backward", lambda logits, *args: empty_gradient(logits), lib=LIBRARY)
torch.library.register_fake("fused_ppl::logits_backward_", lambda logits, *args: None, lib=LIBRARY)


def row_view(logits: Tensor) -> Tensor | None:
    """(..., V) as a view (B, R, V), row n = b * R + r, or None where no view is.

    (B, T, V) contiguous gives (1, N, V); (N, C, H, W) with the classes moved last gives (N, H * W, C).
    """
    lead, v = logits.shape[:-1], logits.shape[-1]
    for split in range(len(lead) + 1):
        try:
            return logits.view(math.prod(lead[:split]), math.prod(lead[split:]), v)
        except RuntimeError:
            continue
    return None


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


def _flat(token_weight: Tensor | None) -> Tensor | None:
    return None if token_weight is None else token_weight.reshape(-1)
