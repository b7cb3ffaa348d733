# SPDX-License-Identifier: Apache-2.0
"""From the arguments of a public function to its request: checks, groups, backend and plan, each decided once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import (  # noqa: F401  (op_autograd registers)
    autograd,
    backends,
    checks,
    divergence_autograd,
    divergence_checks,
    dtensors,
    groups,
    op_autograd,
    plan,
    rank_checks,
    reference,
    token_autograd,
    token_checks,
)
from fused_ppl.divergence_autograd import HeadCall, LogitsCall
from fused_ppl.engines.head import linear_case
from fused_ppl.engines.token_loss import TokenFunction
from fused_ppl.records import (
    Compact,
    Divergence,
    DivergenceResults,
    Execution,
    Groups,
    HeadExecution,
    HeadInputs,
    HeadRequest,
    LogitsInputs,
    LogitsRequest,
    LossResults,
    Teacher,
)
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import DivergenceOutput, LogProbs, LossOutput, LossSpec, Options, TopK, with_tensors
from fused_ppl.token_autograd import TokenLossCall

_DEFAULT = Options()


class DivergenceExtras(NamedTuple):
    """What only a divergence takes, and what it shares with the losses."""

    asked: Divergence
    shared: Extras


class TeacherGiven(NamedTuple):
    """A teacher as the caller gives it: a head, or its most likely classes in the place of the hidden states."""

    input: Tensor | TopK
    linear_weight: Tensor | None
    linear_bias: Tensor | None


class Extras(NamedTuple):
    """The arguments that all public functions share, beside what defines the loss."""

    weight: Tensor | None
    token_weight: Tensor | None
    num_items: float | Tensor | None
    options: Options | None
    group: groups.Group | None
    vocab_group: groups.VocabGroup | None


def from_logits(input: Tensor, target: Tensor, spec: LossSpec, *, class_dim: int, extras: Extras) -> LossOutput:
    inputs, request = _logits_call(input, target, spec, class_dim=class_dim, extras=extras)
    if request.execution.backend == "reference":
        return _reference(inputs, spec, request.groups)
    return _output(autograd.logits_loss(inputs, request), spec)


def log_probs_from_logits(input: Tensor, target: Tensor, spec: LossSpec, *, class_dim: int, extras: Extras) -> LogProbs:
    token_checks.check_exact(_options(extras), "log-probabilities")
    inputs, request = _logits_call(input, target, spec, class_dim=class_dim, extras=extras)
    if request.execution.backend == "reference":
        return _reference_log_probs(inputs, spec, request.groups)
    return token_autograd.logits_log_probs(inputs, request)


def _logits_call(
    input: Tensor, target: Tensor, spec: LossSpec, *, class_dim: int, extras: Extras
) -> tuple[LogitsInputs, LogitsRequest]:
    options = _options(extras)
    checks.check_logits(input, class_dim)
    if options.inplace_backward:
        checks.check_inplace_backward(input)
    ranks = None if extras.group is None else groups.token_group(extras.group, spec.reduction)
    if extras.vocab_group is not None or not dtensors.all_plain(input, target):
        input, ranks = dtensors.local_logits(input, class_dim, extras.vocab_group, ranks)
        target, extras = _whole(target, extras)
    logits = _classes_last(input, class_dim)
    checks.check_classes(logits.shape[-1])
    checks.check_target(target, logits.shape[:-1], input)
    num_classes = ranks.num_classes if ranks is not None and ranks.vocab else logits.shape[-1]
    num_items = _check_extras(input, target, spec, extras=extras, num_classes=num_classes)
    backend = backends.choose(options.backend, input.device, input.dtype)
    inputs = LogitsInputs(logits, target, extras.weight, extras.token_weight, num_items)
    if ranks is not None and backend != "reference" and checks.debug():
        given = {"class weights": extras.weight, "num_items": num_items}
        _compare(ranks, spec, target, facts={"number of classes": num_classes, "dtype": input.dtype}, given=given)
    return inputs, LogitsRequest(spec, Execution(backend, options.memory_budget), options.inplace_backward, ranks)


def from_hidden(
    input: Tensor, linear_weight: Tensor, target: Tensor, spec: LossSpec, *, linear_bias: Tensor | None, extras: Extras
) -> LossOutput:
    inputs, request = _head_call(input, linear_weight, target, spec, linear_bias=linear_bias, extras=extras)
    if request.execution.backend == "reference":
        return _reference(_with_logits(inputs), spec, request.groups)
    results = autograd.head_loss(inputs, request)
    output = _output(results.losses, spec)
    if request.plan != "compact":
        return output
    loss, perplexity, nll, lse, entropy, predicted, total_weight, _, _ = output
    errors = (results.residual, results.loss_error)
    return LossOutput(loss, perplexity, nll, lse, entropy, predicted, total_weight, *errors)


def log_probs_from_hidden(
    input: Tensor, linear_weight: Tensor, target: Tensor, spec: LossSpec, *, linear_bias: Tensor | None, extras: Extras
) -> LogProbs:
    token_checks.check_exact(_options(extras), "log-probabilities")
    inputs, request = _head_call(input, linear_weight, target, spec, linear_bias=linear_bias, extras=extras)
    if request.execution.backend == "reference":
        return _reference_log_probs(_with_logits(inputs), spec, request.groups)
    return token_autograd.head_log_probs(inputs, request)


def token_loss_from_hidden(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    spec: LossSpec,
    *,
    linear_bias: Tensor | None,
    extras: Extras,
    function: TokenFunction,
    per_token: Sequence[Tensor],
) -> Tensor:
    token_checks.check_exact(_options(extras), "a loss of tokens")
    inputs, request = _head_call(input, linear_weight, target, spec, linear_bias=linear_bias, extras=extras)
    for k, values in enumerate(per_token):
        token_checks.check_per_token(f"per_token[{k}]", values, target)
    if request.execution.backend == "reference":
        logits = _with_logits(inputs)
        spec = _check_for_reference(logits, spec, request.groups)
        labels, *constants = (t.reshape(-1) for t in (target, *per_token))
        found = reference.log_probs(logits.logits.flatten(0, -2), labels, spec)
        loss = function(found.log_prob, found.entropy, *constants)
        token_checks.check_token_loss(loss, found.log_prob)
        return reference.token_loss(loss.to(found.log_prob.dtype), labels, spec, inputs.num_items)
    execution = request.execution
    # forward knows the derivatives, and so the gradients are made there
    kind = "rows" if any(execution.grads) else "forward"
    request = HeadRequest(request.spec, execution, kind, request.compact, request.groups)
    return token_autograd.head_token_loss(inputs, TokenLossCall(request, function, tuple(per_token)))


def divergence_from_logits(
    input: Tensor,
    teacher_input: Tensor | TopK,
    target: Tensor | None,
    spec: LossSpec,
    *,
    class_dim: int,
    extras: DivergenceExtras,
) -> DivergenceOutput:
    token_checks.check_exact(_options(extras.shared), "a divergence")
    divergence_checks.check_plain(input, *_tensors(teacher_input), target, extras.shared.token_weight)
    checks.check_logits(input, class_dim)
    shape = _classes_last(input, class_dim).shape[:-1]
    asked = extras.asked
    if isinstance(teacher_input, TopK):
        asked = divergence_checks.check_top_k(teacher_input, asked, input, shape=shape, stats=spec.stats)
        teacher = _constants(None, None, None, *teacher_input[:2])
    else:
        divergence_checks.check_teacher_logits(input, teacher_input)
        teacher = _constants(_classes_last(teacher_input, class_dim))
    target, spec = _counted(target, shape, spec, input=input)
    inputs, request = _logits_call(input, target, spec, class_dim=class_dim, extras=extras.shared)
    if request.execution.backend == "reference":
        spec = _check_for_reference(inputs, spec, request.groups)
        return reference.divergence(inputs, teacher, spec, asked=asked)
    return _divergence_output(divergence_autograd.logits_divergence(inputs, teacher, LogitsCall(request, asked)))


def divergence_from_hidden(
    input: Tensor, linear_weight: Tensor, teacher: TeacherGiven, spec: LossSpec, *, target: Tensor | None,
    linear_bias: Tensor | None, extras: DivergenceExtras,
) -> DivergenceOutput:  # fmt: skip
    token_checks.check_exact(_options(extras.shared), "a divergence")
    hidden, weight, bias = teacher
    constants = (target, extras.shared.token_weight)
    divergence_checks.check_plain(input, linear_weight, linear_bias, *_tensors(hidden), weight, bias, *constants)
    checks.check_head(input, linear_weight, linear_bias)
    asked, shape = extras.asked, input.shape[:-1]
    if isinstance(hidden, TopK):
        divergence_checks.check_no_second_head(weight, bias)
        asked = divergence_checks.check_top_k(hidden, asked, input, shape=shape, stats=spec.stats)
        known, dtype = _constants(None, None, None, *hidden[:2]), input.dtype
    else:
        divergence_checks.check_teacher(input, linear_weight, hidden, weight, bias=bias)
        known, dtype = _constants(hidden, weight, bias), _product_dtype(hidden)
    target, spec = _counted(target, shape, spec, input=input)
    inputs, request = _head_call(input, linear_weight, target, spec, linear_bias=linear_bias, extras=extras.shared)
    if request.execution.backend == "reference":
        logits = _with_logits(inputs)
        spec = _check_for_reference(logits, spec, request.groups)
        if known.teacher_input is not None and known.teacher_weight is not None:
            of_teacher = torch.nn.functional.linear(known.teacher_input, known.teacher_weight, known.teacher_bias)
            known = Teacher(of_teacher)
        return reference.divergence(logits, known, spec, asked=asked)
    return _divergence_output(divergence_autograd.head_divergence(inputs, known, HeadCall(request, asked, dtype)))


def _tensors(teacher: Tensor | TopK) -> Sequence[Tensor]:
    return teacher[:2] if isinstance(teacher, TopK) else (teacher,)


def _constants(*teacher: Tensor | None) -> Teacher:
    return Teacher(*(None if t is None else _constant(t) for t in teacher))


def _classes_last(logits: Tensor, class_dim: int) -> Tensor:
    return logits if logits.ndim == 1 or class_dim in (-1, logits.ndim - 1) else logits.movedim(class_dim, -1)


def _constant(teacher: Tensor) -> Tensor:
    """Without a graph. What inference mode has made is copied, because autograd saves no such tensor."""
    constant = teacher.detach()
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not constant.is_inference():
        return constant
    return constant.clone()


def _counted(target: Tensor | None, shape: torch.Size, spec: LossSpec, *, input: Tensor) -> tuple[Tensor, LossSpec]:
    """Without targets every token counts, and log-probabilities are compared at class 0."""
    if target is not None:
        return target, spec
    return torch.zeros(shape, dtype=torch.int64, device=input.device), spec._replace(ignore_index=None)


def _divergence_output(results: DivergenceResults) -> DivergenceOutput:
    totals, stats = results
    return DivergenceOutput(totals.loss, *stats, totals.total_weight)


def _head_call(
    input: Tensor, linear_weight: Tensor, target: Tensor, spec: LossSpec, *, linear_bias: Tensor | None, extras: Extras
) -> tuple[HeadInputs, HeadRequest]:
    options, vocab_group = _options(extras), extras.vocab_group
    ranks = None if extras.group is None else groups.token_group(extras.group, spec.reduction)
    optional = [t for t in (linear_bias, extras.token_weight) if t is not None]
    if vocab_group is not None or not dtensors.all_plain(input, linear_weight, target, *optional):
        input, linear_weight, linear_bias, ranks = dtensors.local_head(
            input, linear_weight, linear_bias, vocab_group=vocab_group, groups=ranks
        )
        target, extras = _whole(target, extras)
    checks.check_head(input, linear_weight, linear_bias)
    checks.check_target(target, input.shape[:-1], input)
    num_classes = linear_weight.shape[0] if ranks is None or not ranks.vocab else ranks.num_classes
    num_items = _check_extras(input, target, spec, extras=extras, num_classes=num_classes)
    checks.check_no_inplace(options.inplace_backward)
    dtype = _product_dtype(input)
    backend = backends.choose(options.backend, input.device, dtype)
    inputs = HeadInputs(input, linear_weight, linear_bias, target, extras.weight, extras.token_weight, num_items)
    if backend == "reference":
        execution = HeadExecution(backend, None, dtype, (False, False, False))
        return inputs, HeadRequest(spec, execution, "forward", Compact(None, None, None), ranks)
    request = _head_request(inputs, spec, options, backend=backend, dtype=dtype, ranks=ranks)
    if ranks is not None and checks.debug():
        given = {"class weights": extras.weight, "num_items": num_items, "bias": linear_bias}
        _compare(ranks, spec, target, facts={"number of classes": num_classes, "dtype": dtype}, given=given)
    return inputs, request


def _with_logits(inputs: HeadInputs) -> LogitsInputs:
    logits = torch.nn.functional.linear(inputs.hidden, inputs.linear_weight, inputs.linear_bias)
    return LogitsInputs(logits, inputs.target, inputs.weight, inputs.token_weight, inputs.num_items)


def _options(extras: Extras) -> Options:
    if extras.options is None:
        return _DEFAULT
    checks.check_options(extras.options, Options)
    return extras.options


def _whole(target: Tensor, extras: Extras) -> tuple[Tensor, Extras]:
    """Targets, weights and num_items that are not DTensors."""
    num_items = dtensors.whole(extras.num_items) if isinstance(extras.num_items, Tensor) else extras.num_items
    weight, token_weight = dtensors.whole(extras.weight), dtensors.whole(extras.token_weight)
    return dtensors.whole(target), Extras(
        weight, token_weight, num_items, extras.options, extras.group, extras.vocab_group
    )


def _check_extras(input: Tensor, target: Tensor, spec: LossSpec, *, extras: Extras, num_classes: int) -> Tensor | None:
    """Raises where an argument breaks its rule; num_items on the device of the input, without waiting for it."""
    if spec.reduction == "sequence":
        checks.check_sequence(target)
    if extras.weight is not None:
        checks.check_constant("weight", extras.weight, (num_classes,), "one number for each class", input=input)
    if extras.token_weight is not None:
        shape = tuple(target.shape)
        checks.check_constant("token_weight", extras.token_weight, shape, "the shape of target", input=input)
    num_items = extras.num_items
    if num_items is None:
        return None
    checks.check_num_items(num_items, spec.reduction)
    if isinstance(num_items, Tensor):
        return num_items.detach().reshape(()).to(input.device, non_blocking=True)
    return torch.full((), float(num_items), dtype=sum_dtype(input.device), device=input.device)


def _product_dtype(input: Tensor) -> torch.dtype:
    """The dtype that the products are asked for: that of autocast, which leaves float64 alone."""
    device = input.device.type
    if checks.autocast(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


def _head_request(
    inputs: HeadInputs, spec: LossSpec, options: Options, *, backend: str, dtype: torch.dtype, ranks: Groups | None
) -> HeadRequest:
    tensors = (inputs.hidden, inputs.linear_weight, inputs.linear_bias)
    hidden, weight, bias = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    execution = HeadExecution(backend, options.memory_budget, dtype, (hidden, weight, bias))
    sharded = ranks is not None and ranks.vocab != ""
    asked = Compact(options.gradient_tolerance, options.gradient_columns, options.screen)
    compact = None
    if any(asked):
        shards = ranks.num_classes if ranks is not None else 0
        shape = inputs.linear_weight.shape
        checks.check_screen(options.screen, dtype, inputs.hidden.device.type, shape=shape, shards=shards)
        # under a cap the smoothing's part of the gradient is no product: there nothing is left out
        if not (spec.softcap and spec.label_smoothing):
            compact = asked
    case = linear_case(inputs.hidden, inputs.linear_weight, execution, compact)
    per_token = spec.reduction in ("none", "sequence") or (spec.stats and spec.z_loss > 0)
    # a shard of the vocabulary knows its gradients only when the others have been heard
    kind = plan.linear_kind(case, per_token or (sharded and compact is None))
    return HeadRequest(spec, execution, kind, asked, ranks)


def _check_for_reference(inputs: LogitsInputs, spec: LossSpec, ranks: Groups | None) -> LossSpec:
    rank_checks.check_no_group(ranks)
    if checks.readable(inputs.target):
        checks.check_target_range(inputs.target, inputs.logits.shape[-1], spec.ignore_index)
    return with_tensors(spec, inputs.logits.device)


def _reference_log_probs(inputs: LogitsInputs, spec: LossSpec, ranks: Groups | None) -> LogProbs:
    return reference.log_probs(inputs.logits, inputs.target, _check_for_reference(inputs, spec, ranks))


def _reference(inputs: LogitsInputs, spec: LossSpec, ranks: Groups | None) -> LossOutput:
    spec = _check_for_reference(inputs, spec, ranks)
    weights = {"weight": inputs.weight, "token_weight": inputs.token_weight}
    return reference.logits_loss(inputs.logits, inputs.target, spec, **weights, num_items=inputs.num_items)


def _output(losses: LossResults, spec: LossSpec) -> LossOutput:
    loss, perplexity, total_weight, _, _, nll, lse, entropy, predicted = losses
    if spec.stats and lse is not None:
        lse = lse.to(nll.dtype)
    return LossOutput(loss, perplexity, nll, lse, entropy, predicted, total_weight)  # type: ignore[arg-type]  # None where nobody asked


def _compare(
    ranks: Groups,
    spec: LossSpec,
    target: Tensor,
    *,
    facts: Mapping[str, object],
    given: Mapping[str, Tensor | float | None],
) -> None:
    """Under FUSED_PPL_DEBUG=1: all ranks mean the same loss."""
    facts = {**facts, "options": spec}
    facts |= {f"choice of {name}": "given" if value is not None else "left out" for name, value in given.items()}
    if ranks.vocab:
        groups.compare_ranks(ranks.vocab, {**facts, "shape of target": tuple(target.shape)})
    if ranks.tokens:
        groups.compare_ranks(ranks.tokens, facts)
