# SPDX-License-Identifier: Apache-2.0
"""A divergence as ops and the sum over ranks between them, and the autograd.Functions around it.

Only the student's tensors have a gradient. Through two heads a mean or a sum makes it in forward, unscaled, and
backward multiplies it. Upstream gradients of each token are known in backward only, which computes the logits again.
"""

from __future__ import annotations

from typing import Any

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
    DivergenceRequest,
    DivergenceResults,
    DivergenceSums,
    HeadExecution,
    HeadInputs,
    LogitsInputs,
    Teacher,
    Unscaled,
    Upstream,
)

_read_results, _read_inputs, _read_teacher = (reader(kind) for kind in (DivergenceResults, HeadInputs, Teacher))
_NO_GRADS = (False, False, False)


def logits_divergence(inputs: LogitsInputs, teacher_logits: Tensor, request: DivergenceRequest) -> DivergenceResults:
    apply = apply_of(LogitsDivergence, inputs)
    if apply is None:
        transform_checks.check_no_graph_of_ops(inputs, "kl_divergence")
        return _logits_results(inputs, teacher_logits, request)
    results: DivergenceResults = _read_results(iter(apply(request, *inputs, teacher_logits)))
    return results


def head_divergence(inputs: HeadInputs, teacher: Teacher, request: DivergenceRequest) -> DivergenceResults:
    apply = apply_of(HeadDivergence, inputs)
    if apply is None:
        transform_checks.check_no_graph_of_ops(inputs, "linear_kl_divergence")
        return _head_results(inputs, teacher, request)
    results: DivergenceResults = _read_results(iter(apply(request, *inputs, *teacher)))
    return results


def _logits_results(inputs: LogitsInputs, teacher_logits: Tensor, request: DivergenceRequest) -> DivergenceResults:
    spec, execution = request.spec, request.execution
    sums = divergence_forward(inputs, teacher_logits, spec, execution, asked=request.divergence)
    return _finished(sums, inputs.num_items, request)


def _head_results(inputs: HeadInputs, teacher: Teacher, request: DivergenceRequest) -> DivergenceResults:
    execution = request.execution
    if not _made_in_forward(request):
        execution = HeadExecution(execution.backend, execution.memory_budget, execution.dtype, _NO_GRADS)
    sums = linear_divergence(inputs, teacher, request.spec, execution, asked=request.divergence)
    return _finished(sums, inputs.num_items, request)


def _made_in_forward(request: DivergenceRequest) -> bool:
    return request.plan == "rows"


def _finished(sums: DivergenceSums, num_items: Tensor | None, request: DivergenceRequest) -> DivergenceResults:
    """The sums of all ranks, and the value that they give."""
    added, groups, ranks = sums.sums, request.groups, 1
    if groups is not None and groups.tokens:
        added, ranks = all_reduce(added, "sum", groups.tokens), groups.ranks
    totals = finish(added, num_items, request.spec, dtype=sums.stats.divergence.dtype, ranks=ranks)
    return DivergenceResults(totals, sums.stats, sums.unscaled)


def _results_and_mark(ctx: Any, output: tuple[Any, ...]) -> DivergenceResults:
    """All outputs but the first are constants."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    results: DivergenceResults = _read_results(iter(output))
    return results


class LogitsDivergence(torch.autograd.Function):
    """The divergence of logits from a teacher's logits. The fields of `DivergenceResults` are the outputs."""

    @staticmethod
    def forward(request: DivergenceRequest, *tensors: Any) -> tuple[Tensor, ...]:
        *own, teacher_logits = tensors
        return tuple(flatten(_logits_results(LogitsInputs(*own), teacher_logits, request)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.request, logits, target, _, token_weight, _, teacher_logits = inputs
        factor = _results_and_mark(ctx, output).totals.loss_factor
        ctx.save_for_backward(logits, target, token_weight, teacher_logits, factor)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Any:
        rest = (None,) * len(LogitsInputs._fields)
        if grad_loss is None:
            return None, None, *rest
        request: DivergenceRequest = ctx.request
        logits, target, token_weight, teacher_logits, factor = ctx.saved_tensors
        inputs = LogitsInputs(logits, target, None, token_weight, None)
        with torch.no_grad():
            gradient = divergence_backward(
                inputs,
                teacher_logits,
                request.spec,
                request.execution,
                asked=request.divergence,
                upstream=Upstream(factor, factor, grad_loss, None),
            )
        if torch.is_grad_enabled():
            gradient = first_order(gradient, grad_loss, logits)
        return None, gradient, *rest


class HeadDivergence(torch.autograd.Function):
    """The divergence of hidden states and a head from those of a teacher."""

    @staticmethod
    def forward(request: DivergenceRequest, *tensors: Any) -> tuple[Tensor, ...]:
        values = iter(tensors)
        return tuple(flatten(_head_results(_read_inputs(values), _read_teacher(values), request)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.request, hidden, linear_weight, linear_bias, target, _, token_weight, _, *teacher = inputs
        results = _results_and_mark(ctx, output)
        given = (hidden, linear_weight, linear_bias, target, token_weight)
        if _made_in_forward(ctx.request):  # the teacher is not needed any more
            teacher = [None for _ in teacher]
        ctx.save_for_backward(*results.unscaled, results.totals.loss_factor, *given, *teacher)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> Any:
        rest = (None,) * (len(HeadInputs._fields) - len(DIFFERENTIABLE) + len(Teacher._fields))
        if grad_loss is None:
            return None, None, None, None, *rest
        request: DivergenceRequest = ctx.request
        spec, execution = request.spec, request.execution
        grad_hidden, grad_weight, grad_bias, factor, hidden, linear_weight, linear_bias, *others = ctx.saved_tensors
        target, token_weight, *teacher = others
        given = (hidden, linear_weight, linear_bias)
        inputs = HeadInputs(*given, target, None, token_weight, None)
        unscaled, upstream = Unscaled(grad_hidden, grad_weight, grad_bias), Upstream(factor, factor, grad_loss, None)
        with torch.no_grad():
            if not _made_in_forward(request):
                made = linear_divergence_backward(
                    inputs, Teacher(*teacher), spec, execution, asked=request.divergence, upstream=upstream
                )
            elif is_last_use(unscaled, grad_loss) and may_skip_dispatch(hidden):
                made = linear_rows.scale(inputs, unscaled, upstream, spec, grads=execution.grads, last=True)
            else:
                made = linear_scale(inputs, unscaled, upstream, spec, grads=execution.grads)
        gradients: list[Any] = [g if n else None for g, n in zip(made, execution.grads, strict=True)]
        if torch.is_grad_enabled():
            gradients = [None if g is None else first_order(g, grad_loss, *given) for g in gradients]
        return None, *gradients, *rest
