# SPDX-License-Identifier: Apache-2.0
"""The fused LM head by chunks of rows: logits of a chunk -> its gradient in place -> dh = G W, dW += G^T h.

The gradients are those of S (and of z_loss * Z), unscaled; what multiplies them is one number, known after the last
row and applied by `linear_scale`. Without gradients to make, the same walk is the forward of every plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_ppl import backends, checks, plan, reduction
from fused_ppl.engines import LIBRARY, memory, without_autocast
from fused_ppl.engines.head import Head, empty_gradients, scale_into, wide_dtype
from fused_ppl.spec import SPEC_SCHEMA, LossSpec, RowStats

LIBRARY.define(
    "linear_forward(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    f"Tensor? token_weight, Tensor? num_items, {SPEC_SCHEMA}, str backend, ScalarType dtype, bool[3] grads, "
    "int? memory_budget) "
    "-> (Tensor loss, Tensor perplexity, Tensor total_weight, Tensor loss_factor, Tensor perplexity_factor, "
    "Tensor nll, Tensor lse, Tensor entropy, Tensor predicted, Tensor dhidden, Tensor dweight, Tensor dbias)"
)
LIBRARY.define(
    "linear_sums(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    f"Tensor? token_weight, {SPEC_SCHEMA}, str backend, ScalarType dtype, bool[3] grads, int? memory_budget) "
    "-> (Tensor sums, Tensor nll, Tensor lse, Tensor entropy, Tensor predicted, Tensor dhidden, Tensor dweight, "
    "Tensor dbias)"
)
LIBRARY.define(
    "linear_scale(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor dhidden, "
    "Tensor dweight, Tensor dbias, Tensor loss_factor, Tensor perplexity_factor, Tensor? grad_loss, "
    "Tensor? grad_perplexity, int? ignore_index, bool[3] grads) -> (Tensor, Tensor, Tensor)"
)


@without_autocast
def forward(*args):  # type: ignore[no-untyped-def]
    *tensors, num_items = args[:7]
    spec, rows, gradients = _walk(*tensors, *args[7:])  # type: ignore[no-untyped-call]
    shape = tensors[3].shape
    totals = reduction.finish(*reduction.sum_rows(rows, spec, shape), spec, num_items, rows.nll.dtype)
    return *totals, *tokens_of(rows, shape), *gradients


@without_autocast
def _sums(*args):  # type: ignore[no-untyped-def]
    """The part of `forward` that comes before the sums of other ranks are added."""
    spec, rows, gradients = _walk(*args)  # type: ignore[no-untyped-call]
    shape = args[3].shape
    return reduction.stack_sums(rows, spec, shape), *tokens_of(rows, shape), *gradients


def tokens_of(rows: RowStats, shape: torch.Size) -> tuple[Tensor | None, ...]:
    tokens = [t if t is None else t.view(shape) for t in rows[2:]]
    return *tokens[:2], *reduction.or_empty(tokens[2], tokens[3], rows.nll)


def _walk(hidden, linear_weight, linear_bias, target, weight, token_weight, *rest):  # type: ignore[no-untyped-def]
    *spec_args, backend_name, dtype, grads, memory_budget = rest
    spec, backend = LossSpec.of(*spec_args), backends.load(backend_name)
    (v, d), n = linear_weight.shape, target.numel()
    flat, labels = hidden.reshape(-1, d), target.reshape(-1)
    head = Head(flat, linear_weight, linear_bias, labels, spec, dtype, memory_budget)
    case = plan.LinearCase(
        n, v, d, head.dtype.itemsize, hidden.device.type, tuple(grads), memory_budget, converts=head.converts
    )
    chunk = plan.linear_plan(case, "rows" if any(grads) else "forward").rows
    shapes = accumulator_shapes(hidden, linear_weight, grads)
    dhidden, dweight, dbias = (memory.empty(s, wide_dtype(dtype), hidden.device) for s in shapes)
    if head.on_cpu:
        checks.check_target_range(labels, v, spec.ignore_index)  # here, where positions are still the caller's
    m = head.target.shape[0]
    # what the first chunk overwrites is not cleared: for the weight that would take as long as the row formula
    for accumulator in (dhidden, dbias) if m else (dhidden, dweight, dbias):
        accumulator.zero_()
    u = head.rows(None if token_weight is None else token_weight.reshape(-1))
    buffer = memory.empty((min(chunk, max(m, 1)), v), head.dtype, hidden.device)
    dh = dhidden.view(-1, d) if head.kept is None else dhidden.new_zeros((m, d) if grads[0] else (0, d))
    parts = []
    for start in range(0, m, chunk):
        r = slice(start, min(start + chunk, m))
        h, y = head.hidden[r].to(head.dtype), head.target[r]
        g = buffer[: h.shape[0]]
        head.logits(h, g)
        target_logit = head.target_logits(h, y)
        parts.append(
            backend.nll_forward_backward(
                g,
                target_logit,
                y,
                spec,
                weight,
                None if u is None else u[r],
                1.0 if any(grads) else None,
                memory_budget,
            )
        )
        if grads[0]:
            head.add_hidden_gradient(g, dh[r])
        if grads[1]:
            head.add_weight_gradient(g, h, dweight, start == 0)
        if grads[2]:
            dbias += g.sum(0, dtype=dbias.dtype)
    if head.kept is not None and grads[0]:
        dhidden.view(-1, d).index_copy_(0, head.kept, dh)

    return spec, all_tokens(head, parts, spec, n, dtype), (dhidden, dweight, dbias)


def all_tokens(head: Head, parts: list[RowStats], spec: LossSpec, n: int, dtype: torch.dtype) -> RowStats:
    if not parts:
        loss, row_weight, nll, lse, entropy = (head.zeros(n) for _ in range(5))
        lse = lse.to(reduction.sum_dtype(lse.device))
        asked = (entropy, nll.long() - 1) if spec.stats else (None, None)
        return RowStats(loss, row_weight, nll, lse, *asked)
    stats = RowStats.concatenate(parts)
    return stats if head.kept is None else stats.map(lambda t, ignored: head.spread(t, n, ignored))


def accumulator_shapes(hidden: Tensor, linear_weight: Tensor, grads: Sequence[bool]) -> list[Sequence[int]]:
    """Of the gradients of hidden states, weight and bias; 0 elements where none is needed."""
    shapes = (hidden.shape, linear_weight.shape, linear_weight.shape[:1])
    return [shape if needed else (0,) for shape, needed in zip(shapes, grads, strict=True)]


def scale(hidden, linear_weight, linear_bias, target, dhidden, dweight, dbias, *rest, last=False):  # type: ignore[no-untyped-def]
    """What the op of that name does; where this is the `last` use of the unscaled gradients, in their own memory."""
    loss_factor, perplexity_factor, grad_loss, grad_perplexity, ignore_index, grads = rest
    factor = reduction.upstream(grad_loss, grad_perplexity, loss_factor, perplexity_factor)
    of_tokens, of_all = _of_counted(factor, target, ignore_index)
    likes, made = (hidden, linear_weight, linear_bias), (dhidden, dweight, dbias)
    reused = [last and needed and m.dtype == like.dtype for like, m, needed in zip(likes, made, grads, strict=True)]
    fresh = [needed and not again for needed, again in zip(grads, reused, strict=True)]
    results = list(empty_gradients(hidden, linear_weight, linear_bias, fresh))
    for i, needed in enumerate(grads):
        if reused[i]:
            results[i] = made[i]
        if needed:
            scale_into(results[i], made[i], of_all if i else of_tokens)
    return tuple(results)


def _of_counted(factor: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """The factor of each token, (*target.shape, 1), or of all; and that of what is summed over them. 0 where no token
    is counted: the zeros that stand there must stay zeros where the factor is inf."""
    if factor.device.type == "cpu" and math.isfinite(factor.item()):
        return factor, factor
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    of_tokens = torch.where(counted, factor, 0).unsqueeze(-1)
    return of_tokens, torch.where(counted.any(), factor, 0)


def _scale_fake(hidden, linear_weight, linear_bias, *rest):  # type: ignore[no-untyped-def]
    return empty_gradients(hidden, linear_weight, linear_bias, rest[-1], fake=True)


def _forward_fake(hidden, linear_weight, linear_bias, target, weight, token_weight, num_items, *rest):  # type: ignore[no-untyped-def]
    reduction_, stats, dtype, grads = rest[0], rest[7], rest[-3], rest[-2]
    results = reduction.empty_results(hidden, target, wide_dtype(dtype), reduction_, stats)
    return *results, *made_fake(hidden, linear_weight, dtype, grads)


def _sums_fake(hidden, linear_weight, linear_bias, target, weight, token_weight, *rest):  # type: ignore[no-untyped-def]
    reduction_, z_loss, stats, dtype, grads = rest[0], rest[5], rest[7], rest[-3], rest[-2]
    tokens = reduction.empty_results(hidden, target, wide_dtype(dtype), reduction_, stats)[5:]
    sums = reduction.empty_sums(hidden, target, reduction_, z_loss)
    return sums, *tokens, *made_fake(hidden, linear_weight, dtype, grads)


def made_fake(hidden: Tensor, linear_weight: Tensor, dtype: torch.dtype, grads: Sequence[bool]) -> list[Tensor]:
    return [hidden.new_empty(s, dtype=wide_dtype(dtype)) for s in accumulator_shapes(hidden, linear_weight, grads)]


LIBRARY.impl("linear_forward", forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_sums", _sums, "CompositeExplicitAutograd")
LIBRARY.impl("linear_scale", scale, "CompositeExplicitAutograd")
torch.library.register_fake("fused_ppl::linear_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fused_ppl::linear_sums", _sums_fake, lib=LIBRARY)
torch.library.register_fake("fused_ppl::linear_scale", _scale_fake, lib=LIBRARY)
