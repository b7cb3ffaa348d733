# SPDX-License-Identifier: Apache-2.0
"""The loss where ranks hold shards of the vocabulary: what each op does between two collectives.

    shard_logits or shard_hidden -> [maximum] -> shard_sums -> [sum] -> shard_merge -> [sum of S, M, Z] -> finish

Forward keeps lse and nll, which are the same on all ranks; backward computes each rank's own columns from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ppl import backends, checks, plan, rank_checks, reduction
from fused_ppl.backends import shards as of_ranks
from fused_ppl.engines import LIBRARY, logits, memory, without_autocast
from fused_ppl.engines.head import Head
from fused_ppl.spec import SPEC_SCHEMA, LossSpec

_SHARD = "int first, int num_classes"
_FIELDS = 6

LIBRARY.define(
    f"shard_logits(Tensor logits, Tensor target, Tensor? weight, {SPEC_SCHEMA}, str backend, int? memory_budget, "
    f"{_SHARD}, int layout) -> (Tensor shards, Tensor maxima)"
)
LIBRARY.define(
    "shard_hidden(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    f"{SPEC_SCHEMA}, str backend, ScalarType dtype, int? memory_budget, {_SHARD}, int layout) "
    "-> (Tensor shards, Tensor maxima)"
)
LIBRARY.define(f"shard_sums(Tensor shards, Tensor maxima, {SPEC_SCHEMA}) -> Tensor")
LIBRARY.define(
    "shard_merge(Tensor maxima, Tensor added, Tensor target, Tensor? weight, Tensor? token_weight, "
    f"{SPEC_SCHEMA}, int num_classes, ScalarType dtype) "
    "-> (Tensor sums, Tensor nll, Tensor lse, Tensor entropy, Tensor predicted)"
)
for _name, _alias, _returns in (("", "", "Tensor"), ("_", "(a!)", "()")):
    LIBRARY.define(
        f"shard_logits_backward{_name}(Tensor{_alias} logits, Tensor target, Tensor? weight, Tensor? token_weight, "
        "Tensor lse, Tensor nll, Tensor loss_factor, Tensor perplexity_factor, Tensor? grad_loss, "
        f"Tensor? grad_perplexity, {SPEC_SCHEMA}, str backend, int? memory_budget, {_SHARD}) -> {_returns}"
    )


@without_autocast
def _shard_logits(x, target, weight, *rest):  # type: ignore[no-untyped-def]
    *spec_args, backend_name, budget, first, num_classes, layout = rest
    spec, backend = LossSpec.of(*spec_args), backends.load(backend_name)
    shards = backend.nll_forward_shard(
        logits.as_rows(x), target.reshape(-1), None, spec, weight, budget, (first, num_classes)
    )
    return shards, of_ranks.maxima(shards, target.reshape(-1), spec, first, layout)


@without_autocast
def _shard_hidden(hidden, linear_weight, linear_bias, target, weight, *rest):  # type: ignore[no-untyped-def]
    """The logits of a chunk of rows at a time, as the forward of one process walks."""
    *spec_args, backend_name, dtype, budget, first, num_classes, layout = rest
    spec, backend = LossSpec.of(*spec_args), backends.load(backend_name)
    (v, d), n, labels = linear_weight.shape, target.numel(), target.reshape(-1)
    head = Head(hidden.reshape(-1, d), linear_weight, linear_bias, labels, spec, dtype, budget)
    if head.on_cpu:
        checks.check_target_range(labels, num_classes, spec.ignore_index)
    case = plan.LinearCase(
        n, v, d, head.dtype.itemsize, hidden.device.type, (False,) * 3, budget, converts=head.converts
    )
    chunk, m = plan.linear_plan(case, "forward").rows, head.target.shape[0]
    buffer = memory.empty((min(chunk, max(m, 1)), v), head.dtype, hidden.device)
    parts = [torch.zeros(0, _FIELDS, dtype=reduction.sum_dtype(hidden.device), device=hidden.device)]
    for start in range(0, m, chunk):
        h, y = head.hidden[start : start + chunk].to(head.dtype), head.target[start : start + chunk]
        g = buffer[: h.shape[0]]
        head.logits(h, g)
        target_logit = head.target_logits(h, y - first)
        columns = (first, num_classes)
        parts.append(backend.nll_forward_shard(g, y, target_logit, spec, weight, budget, columns))
    shards = head.spread(torch.cat(parts), n)
    return shards, of_ranks.maxima(shards, target.reshape(-1), spec, first, layout)


@without_autocast
def _shard_sums(shards, maxima, *spec_args):  # type: ignore[no-untyped-def]
    if maxima.device.type == "cpu" or checks.debug():
        rank_checks.check_same_shards(*of_ranks.same(maxima).tolist())
    return of_ranks.sums(shards, maxima, LossSpec.of(*spec_args))


@without_autocast
def _shard_merge(maxima, added, target, weight, token_weight, *rest):  # type: ignore[no-untyped-def]
    *spec_args, num_classes, dtype = rest
    spec, shape = LossSpec.of(*spec_args), target.shape
    u = None if token_weight is None else token_weight.reshape(-1)
    rows = of_ranks.merge(maxima, added, target.reshape(-1), spec, weight, u, num_classes, dtype)
    nll, lse, entropy, predicted = (t if t is None else t.view(shape) for t in rows[2:])
    return reduction.stack_sums(rows, spec, shape), nll, lse, *reduction.or_empty(entropy, predicted, rows.nll)


@without_autocast
def _backward(x, *args):  # type: ignore[no-untyped-def]
    out = logits.empty_gradient(x)
    logits.backward_into(out, x, *args[:-2], columns=args[-2:])
    return out


@without_autocast
def _backward_(x, *args):  # type: ignore[no-untyped-def]
    if logits.row_view(x) is None:
        x.copy_(_backward(x, *args))
    else:
        logits.backward_into(x, x, *args[:-2], columns=args[-2:])
    torch.autograd.graph.increment_version(x)


def _shards_fake(like: Tensor, target: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    n, dtype = target.numel(), reduction.sum_dtype(like.device)
    return like.new_empty((n, _FIELDS), dtype=dtype), like.new_empty(
        (n + of_ranks.CHECKS, 2 if stats else 1), dtype=dtype
    )


def _sums_fake(shards, maxima, *spec_args):  # type: ignore[no-untyped-def]
    return shards.new_empty((shards.shape[0], 2 + (spec_args[2] > 0) + spec_args[7]))


def _merge_fake(maxima, added, target, weight, token_weight, *rest):  # type: ignore[no-untyped-def]
    tokens = reduction.empty_results(maxima, target, rest[-1], rest[0], rest[7])[5:]
    return reduction.empty_sums(maxima, target, rest[0], rest[5]), *tokens


_IMPLEMENTED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "shard_logits": (_shard_logits, lambda x, target, weight, *rest: _shards_fake(x, target, rest[7])),
    "shard_hidden": (_shard_hidden, lambda x, w, b, target, weight, *rest: _shards_fake(x, target, rest[7])),
    "shard_sums": (_shard_sums, _sums_fake),
    "shard_merge": (_shard_merge, _merge_fake),
    "shard_logits_backward": (_backward, lambda x, *args: logits.empty_gradient(x)),
    "shard_logits_backward_": (_backward_, lambda x, *args: None),
}
for _name, (_real, _fake) in _IMPLEMENTED.items():
    LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_ppl::{_name}", _fake, lib=LIBRARY)
