# SPDX-License-Identifier: Apache-2.0
"""A divergence as ops and the sum over ranks between them, and the autograd.Functions around it.

Only the student's tensors have a gradient. Through two heads a mean or a sum makes it in forward, unscaled, and
backward multiplies it. Upstream gradients of each token are known in backward only, which computes the logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ppl import transform_checks
from fused_ppl.autograd import apply_of, first_order, is_last_use
from fused_ppl.engines import linear_rows
from fused_ppl.engines.divergence import (
    divergence_backward,
    divergence_forward,
    linear_divergence,
    linear_divergence_backward,
)
from fused_ppl.engines.finish import finish
from fused_ppl.engines.linear_rows import linear_scale
from fused_ppl.engines.ops import flatten, may_skip_dispatch, reader
from fused_ppl.groups import all_reduce
from fused_ppl.records import (
    DIFFERENTIABLE,
    Divergence,
    DivergenceResults,
    DivergenceSums,
    HeadDivergenceResults,
    HeadExecution,
    HeadInputs,
    HeadRequest,
    LogitsInputs,
    LogitsRequest,
    Teacher,
    Unscaled,
    Upstream,
)

_read_results, _read_head_results = reader(DivergenceResults), reader(HeadDivergenceResults)
_read_logits, _read_inputs, _read_teacher = reader(LogitsInputs), reader(HeadInputs), reader(Teacher)


class LogitsCall(NamedTuple):
    """One call of a divergence from logits, without its tensors."""

    request: LogitsRequest
    asked: Divergence


class HeadCall(NamedTuple):
    """One call of a divergence through two heads, without its tensors. Plan "rows" makes the gradients in forward."""

    request: HeadRequest
    asked: Divergence
    teacher_dtype: torch.dtype  # of the product of the teacher's head


def logits_divergence(inputs: LogitsInputs, teacher: Teacher, call: LogitsCall) -> DivergenceResults:
    apply = apply_of(LogitsDivergence, inputs)
    if apply is None:
        transform_checks.check_no_graph_of_ops(inputs, "kl_divergence")
        return _logits_results(inputs, teacher, call)
    results: DivergenceResults = _read_results(iter(apply(call, *inputs, *teacher)))
    return results


def head_divergence(inputs: HeadInputs, teacher: Teacher, call: HeadCall) -> DivergenceResults:
    apply = apply_of(HeadDivergence, inputs)
    if apply is None:
        transform_checks.check_no_graph_of_ops(inputs, "linear_kl_divergence")
        return _head_results(inputs, teacher, call).of_tokens
    results: HeadDivergenceResults = _read_head_results(iter(apply(call, *inputs, *teacher)))
    return results.of_tokens


def _logits_results(inputs: LogitsInputs, teacher: Teacher, call: LogitsCall) -> DivergenceResults:
    request = call.request
    sums = divergence_forward(inputs, teacher, request.spec, request.execution, asked=call.asked)
    return _finished(sums, inputs.num_items, request)


def _head_results(inputs: HeadInputs, teacher: Teacher, call: HeadCall) -> HeadDivergenceResults:
    request, execution = call.request, call.request.execution
    if request.plan != "rows":
        no_grads = (False, False, False)
        execution = HeadExecution(execution.backend, execution.memory_budget, execution.dtype, no_grads)
    of_tokens, unscaled = linear_divergence(
        inputs, teacher, request.spec, execution, asked=call.asked, teacher_dtype=call.teacher_dtype
    )
    return HeadDivergenceResults(_finished(of_tokens, inputs.num_items, request), unscaled)


def _finished(
    sums: DivergenceSums, num_items: Tensor | None, request: LogitsRequest | HeadRequest
) -> DivergenceResults:
    """The sums of all ranks, and the value that they give."""
    added, groups, ranks = sums.sums, request.groups, 1
    if groups is not None and groups.tokens:
        added, ranks = all_reduce(added, "sum", groups.tokens), groups.ranks
    totals = finish(added, num_items, request.spec, dtype=sums.stats.divergence.dtype, ranks=ranks)
    return DivergenceResults(totals, sums.stats)


def _only_the_loss_has_a_gradient(ctx: Any, output: tuple[Any, ...]) -> None:
    _, *constants = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*constants)


class LogitsDivergence(torch.autograd.Function):
    """The divergence of logits. The fields of `DivergenceResults` are the outputs."""

    @staticmethod
    def forward(call: LogitsCall, *tensors: Any) -> tuple[Tensor, ...]:
        values = iter(tensors)
        return tuple(flatten(_logits_results(_read_logits(values), _read_teacher(values), call)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call, logits, target, _, token_weight, _, *teacher = inputs
        _only_the_loss_has_a_gradient(ctx, output)
        factor = _read_results(iter(output)).totals.loss_factor
        ctx.save_for_backward(logits, target, token_weight, factor, *teacher)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Any:
        rest = (None,) * (len(LogitsInputs._fields) - 1 + len(Teacher._fields))
        if grad_loss is None:
            return None, None, *rest
        call: LogitsCall = ctx.call
        logits, target, token_weight, factor, *teacher = ctx.saved_tensors
        with torch.no_grad():
            gradient = divergence_backward(
                LogitsInputs(logits, target, None, token_weight, None),
                Teacher(*teacher),
                call.request.spec,
                call.request.execution,
                asked=call.asked,
                upstream=Upstream(factor, factor, grad_loss, None),
            )
        if torch.is_grad_enabled():
            gradient = first_order(gradient, grad_loss, logits)
        return None, gradient, *rest


class HeadDivergence(torch.autograd.Function):
    """The divergence of hidden states and a head from those of a teacher."""

    @staticmethod
    def forward(call: HeadCall, *tensors: Any) -> tuple[Tensor, ...]:
        values = iter(tensors)
        return tuple(flatten(_head_results(_read_inputs(values), _read_teacher(values), call)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call, hidden, linear_weight, linear_bias, target, _, token_weight, _, *teacher = inputs
        _only_the_loss_has_a_gradient(ctx, output)
        results: HeadDivergenceResults = _read_head_results(iter(output))
        given = (hidden, linear_weight, linear_bias, target, token_weight)
        if ctx.call.request.plan == "rows":  # the teacher is not needed any more
            teacher = [None for _ in teacher]
        ctx.save_for_backward(*results.unscaled, results.of_tokens.totals.loss_factor, *given, *teacher)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Any:
        rest = (None,) * (len(HeadInputs._fields) - len(DIFFERENTIABLE) + len(Teacher._fields))
        if grad_loss is None:
            return None, None, None, None, *rest
        call: HeadCall = ctx.call
        spec, execution = call.request.spec, call.request.execution
        grad_hidden, grad_weight, grad_bias, factor, hidden, linear_weight, linear_bias, *others = ctx.saved_tensors
        target, token_weight, *teacher = others
        given = (hidden, linear_weight, linear_bias)
        inputs = HeadInputs(*given, target, None, token_weight, None)
        unscaled, upstream = Unscaled(grad_hidden, grad_weight, grad_bias), Upstream(factor, factor, grad_loss, None)
        with torch.no_grad():
            if call.request.plan != "rows":
                made = linear_divergence_backward(
                    inputs,
                    Teacher(*teacher),
                    spec,
                    execution,
                    asked=call.asked,
                    teacher_dtype=call.teacher_dtype,
                    upstream=upstream,
                )
            elif is_last_use(unscaled, grad_loss) and may_skip_dispatch(hidden):
                made = linear_rows.scale(inputs, unscaled, upstream, spec, grads=execution.grads, last=True)
            else:
                made = linear_scale(inputs, unscaled, upstream, spec, grads=execution.grads)
        gradients: list[Any] = [g if n else None for g, n in zip(made, execution.grads, strict=True)]
        if torch.is_grad_enabled():
            gradients = [None if g is None else first_order(g, grad_loss, *given) for g in gradients]
        return None, *gradients, *rest
