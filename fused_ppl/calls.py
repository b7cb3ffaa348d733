# SPDX-License-Identifier: Apache-2.0
"""From the arguments of a public function to its op: checks, backend, plan, group; then the call."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fused_ppl import (  # noqa: F401  (op_autograd registers)
    backends,
    checks,
    dtensors,
    op_autograd,
    parallel,
    plan,
    rank_checks,
    reference,
)
from fused_ppl.autograd import LinearLoss, LogitsLoss, run
from fused_ppl.engines.head import product_dtype
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import LossOutput, LossSpec, Options

_DEFAULT = Options()


def from_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: float | Tensor | None,
    class_dim: int,
    spec: LossSpec,
    options: Options | None,
    group: parallel.Group | None,
    vocab_group: parallel.VocabGroup | None,
) -> LossOutput:
    options = _DEFAULT if options is None else options
    checks.check_options(options, Options)
    checks.check_logits(input, class_dim)
    if options.inplace_backward:
        checks.check_inplace_backward(input)
    groups = parallel.token_group(group, spec.reduction)
    if vocab_group is not None or not dtensors.all_plain(input, target):
        input, groups = dtensors.local_logits(input, class_dim, vocab_group, groups)
        target, token_weight, weight = dtensors.whole(target), dtensors.whole(token_weight), dtensors.whole(weight)
        num_items = dtensors.whole(num_items) if isinstance(num_items, Tensor) else num_items
    logits = input if input.ndim == 1 or class_dim in (-1, input.ndim - 1) else input.movedim(class_dim, -1)
    checks.check_classes(logits.shape[-1])
    checks.check_target(target, logits.shape[:-1], input)
    checks.check_sequence(spec.reduction, target)
    num_classes = groups.num_classes if groups is not None and groups.vocab else logits.shape[-1]
    checks.check_constant("weight", weight, (num_classes,), "one number for each class", input)
    checks.check_constant("token_weight", token_weight, target.shape, "the shape of target", input)
    checks.check_num_items(num_items, spec.reduction)
    backend = backends.choose(options.backend, input.device, input.dtype)
    if num_items is not None:
        num_items = _scalar(num_items, input)
    if backend == "reference":
        rank_checks.check_no_group(groups)
        if checks.readable(target):
            checks.check_target_range(target, logits.shape[-1], spec.ignore_index)
        return reference.logits_loss(logits, target, spec, weight, token_weight, num_items)
    if groups is not None and checks.debug():
        _compare(groups, spec, num_classes, target, input.dtype, {"class weights": weight, "num_items": num_items})
    out = run(
        LogitsLoss,
        logits,
        target,
        weight,
        token_weight,
        num_items,
        spec.op_args(),
        backend,
        options.memory_budget,
        options.inplace_backward,
        groups,
    )
    loss, perplexity_, total_weight, _, _, nll, lse, entropy, predicted = out
    if spec.stats:
        lse = lse.to(nll.dtype)
    return LossOutput(loss, perplexity_, nll, lse, entropy, predicted, total_weight)


def from_hidden(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: float | Tensor | None,
    spec: LossSpec,
    options: Options | None,
    group: parallel.Group | None,
    vocab_group: parallel.VocabGroup | None,
) -> LossOutput:
    options = _DEFAULT if options is None else options
    checks.check_options(options, Options)
    groups = parallel.token_group(group, spec.reduction)
    more = [t for t in (linear_bias, token_weight) if t is not None]
    if vocab_group is not None or not dtensors.all_plain(input, linear_weight, target, *more):
        input, linear_weight, linear_bias, groups = dtensors.local_head(
            input, linear_weight, linear_bias, vocab_group, groups
        )
        target, token_weight, weight = dtensors.whole(target), dtensors.whole(token_weight), dtensors.whole(weight)
        num_items = dtensors.whole(num_items) if isinstance(num_items, Tensor) else num_items
    num_classes = 0 if groups is None else groups.num_classes  # of all shards, where there are others
    checks.check_head(input, linear_weight, linear_bias)
    checks.check_target(target, input.shape[:-1], input)
    checks.check_sequence(spec.reduction, target)
    checks.check_constant(
        "weight", weight, (num_classes or linear_weight.shape[0],), "one number for each class", input
    )
    checks.check_constant("token_weight", token_weight, target.shape, "the shape of target", input)
    checks.check_num_items(num_items, spec.reduction)
    checks.check_no_inplace(options.inplace_backward)
    device = input.device.type
    cast = checks.autocast(device) and input.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(device) if cast else input.dtype
    backend = backends.choose(options.backend, input.device, dtype)
    if num_items is not None:
        num_items = _scalar(num_items, input)
    if backend == "reference":
        rank_checks.check_no_group(groups)
        if checks.readable(target):
            checks.check_target_range(target, linear_weight.shape[0], spec.ignore_index)
        logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
        return reference.logits_loss(logits, target, spec, weight, token_weight, num_items)
    tensors = (input, linear_weight, linear_bias)
    grads = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    asked, compact = (options.gradient_tolerance, options.gradient_columns, options.screen), None
    if any(asked):
        checks.check_screen(options.screen, dtype, device, linear_weight.shape, num_classes)
        # under a cap the smoothing's part of the gradient is no product: there nothing is left out
        if not (spec.softcap and spec.label_smoothing):
            compact = plan.Compact(*asked)
    case = _case(input, linear_weight, dtype=dtype, grads=grads, memory_budget=options.memory_budget, compact=compact)
    per_token = spec.reduction in ("none", "sequence") or (spec.stats and spec.z_loss > 0)
    # a shard of the vocabulary knows its gradients only when the others have been heard
    kind = plan.linear_kind(case, per_token or (num_classes > 0 and case.compact is None))
    if groups is not None and checks.debug():
        given = {"class weights": weight, "num_items": num_items, "bias": linear_bias}
        _compare(groups, spec, num_classes or linear_weight.shape[0], target, dtype, given)
    out = run(
        LinearLoss,
        *tensors,
        target,
        weight,
        token_weight,
        num_items,
        spec.op_args(),
        kind,
        grads,
        dtype,
        backend,
        options.memory_budget,
        groups,
        asked,
    )
    loss, perplexity_, total_weight, _, _, nll, lse, entropy, predicted = out[:9]
    if spec.stats:
        lse = lse.to(nll.dtype)
    return LossOutput(loss, perplexity_, nll, lse, entropy, predicted, total_weight, *out[12:])


def _case(
    input: Tensor,
    linear_weight: Tensor,
    *,
    dtype: torch.dtype,
    grads: tuple[bool, ...],
    memory_budget: int | None,
    compact: plan.Compact | None,
) -> plan.LinearCase:
    """What the kind of plan depends on: the element size is that of the products, as in the engines."""
    products, (v, d) = product_dtype(dtype, input.device), linear_weight.shape
    return plan.LinearCase(
        math.prod(input.shape[:-1]),
        v,
        d,
        products.itemsize,
        input.device.type,
        grads,  # type: ignore[arg-type]
        memory_budget,
        compact,
        converts=linear_weight.dtype != products,
    )


def _compare(
    groups: parallel.Groups,
    spec: LossSpec,
    num_classes: int,
    target: Tensor,
    dtype: torch.dtype,
    given: Mapping[str, Tensor | float | None],
) -> None:
    facts = {"number of classes": num_classes, "dtype": dtype, "options": spec}
    facts |= {f"choice of {name}": "given" if value is not None else "left out" for name, value in given.items()}
    if groups.vocab:
        parallel.compare_ranks(groups.vocab, {**facts, "shape of target": tuple(target.shape)})
    if groups.tokens:
        parallel.compare_ranks(groups.tokens, facts)


def _scalar(value: float | Tensor, input: Tensor) -> Tensor:
    """A number on the device of the input, without waiting for it."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(input.device, non_blocking=True)
    return torch.full((), float(value), dtype=sum_dtype(input.device), device=input.device)
