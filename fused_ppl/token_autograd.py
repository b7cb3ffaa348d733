# SPDX-License-Identifier: Apache-2.0
"""The autograd.Functions of log-probabilities, entropies and lse of tokens, each differentiable by itself.

Forward is that of a loss with reduction "none" and statistics. In backward only what has an upstream gradient costs
anything. From hidden states that is plan "vocab": one product forward, and one again with two more in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ppl import loss, transform_checks
from fused_ppl.autograd import HeadLoss, apply_of, first_order
from fused_ppl.engines.logits import Saved
from fused_ppl.engines.ops import flatten
from fused_ppl.engines.token_loss import TokenFunction
from fused_ppl.records import (
    DIFFERENTIABLE,
    HeadInputs,
    HeadRequest,
    LogitsInputs,
    LogitsRequest,
    LossResults,
    TokenStats,
    TokenUpstream,
)
from fused_ppl.spec import LogProbs


def logits_log_probs(inputs: LogitsInputs, request: LogitsRequest) -> LogProbs:
    apply = apply_of(LogitsTokens, inputs)
    if apply is None:
        transform_checks.check_no_graph_of_ops(inputs, "log_probs")
        return _values(loss.logits_loss(inputs, request))
    log_prob, entropy, lse, *_ = apply(request, *inputs)
    return LogProbs(log_prob, entropy, lse)


def head_log_probs(inputs: HeadInputs, request: HeadRequest) -> LogProbs:
    apply = apply_of(HeadTokens, inputs)
    if apply is None:
        transform_checks.check_no_graph_of_ops(inputs, "linear_log_probs")
        return _values(loss.head_loss(inputs, request).losses)
    log_prob, entropy, lse, *_ = apply(request, *inputs)
    return LogProbs(log_prob, entropy, lse)


def _values(results: LossResults) -> LogProbs:
    nll, lse, entropy = results.nll, results.lse, results.entropy
    assert lse is not None and entropy is not None
    return LogProbs(0 - nll, entropy, lse.to(nll.dtype))  # 0 - nll: an ignored token has 0 and not -0


def _outputs(results: LossResults) -> tuple[Tensor, ...]:
    """`LogProbs`, and what backward needs: nll and lse as they are."""
    values = _values(results)
    assert results.lse is not None
    lse = results.lse.clone() if results.lse is values.lse else results.lse
    return (*values, results.nll, lse)


def _upstream(grad_log_prob: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None, *_: None) -> Any:
    """`TokenUpstream`, or None if there is none. The constants among the outputs have no gradient."""
    if grad_log_prob is None and grad_entropy is None and grad_lse is None:
        return None
    return TokenUpstream(grad_log_prob, grad_entropy, grad_lse)


class TokenLossCall(NamedTuple):
    """One call of `linear_token_loss`, without its differentiable tensors."""

    request: HeadRequest
    function: TokenFunction
    per_token: tuple[Tensor, ...]


def head_token_loss(inputs: HeadInputs, call: TokenLossCall) -> Tensor:
    apply = apply_of(HeadTokenLoss, inputs)
    if apply is None:
        return loss.head_token_loss(inputs, call.request, function=call.function, per_token=call.per_token).losses.loss
    value: Tensor = apply(call, *inputs)[0]
    return value


class HeadTokenLoss(HeadLoss):
    """`HeadLoss` with another forward: its backward multiplies the same kind of unscaled gradients."""

    @staticmethod
    def forward(call: TokenLossCall, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # its request
        inputs = HeadInputs(*tensors)  # type: ignore[arg-type]  # in order
        results = loss.head_token_loss(inputs, call.request, function=call.function, per_token=call.per_token)
        return tuple(flatten(results))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, *tensors = inputs
        HeadLoss.setup_context(ctx, (call.request, *tensors), output)


class LogitsTokens(torch.autograd.Function):
    """`LogProbs` of logits; the outputs after its fields have no gradient."""

    @staticmethod
    def forward(request: LogitsRequest, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _outputs(loss.logits_loss(LogitsInputs(*tensors), request))  # type: ignore[arg-type]  # in order

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.request, logits, target, *_ = inputs
        _, entropy, _, nll, lse = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(nll, lse)
        ctx.save_for_backward(logits, target, lse, nll, entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rest = (None,) * (len(LogitsInputs._fields) - 1)
        upstream = _upstream(*gradients)
        if upstream is None:
            return None, None, *rest
        logits, target, lse, nll, entropy = ctx.saved_tensors
        saved = Saved(logits, target, None, None, lse, nll)
        with torch.no_grad():
            gradient = loss.logits_token_gradient(saved, upstream, ctx.request, entropy=entropy)
        if torch.is_grad_enabled():
            gradient = first_order(gradient, *upstream, logits)
        return None, gradient, *rest


class HeadTokens(torch.autograd.Function):
    """`LogProbs` of hidden states and the weight of the head, which saves no logits."""

    @staticmethod
    def forward(request: HeadRequest, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _outputs(loss.head_loss(HeadInputs(*tensors), request).losses)  # type: ignore[arg-type]  # in order

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.request, hidden, linear_weight, linear_bias, target, *_ = inputs
        _, entropy, _, nll, lse = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(nll, lse)
        ctx.save_for_backward(hidden, linear_weight, linear_bias, target, nll, lse, entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rest = (None,) * (len(HeadInputs._fields) - len(DIFFERENTIABLE))
        upstream, request = _upstream(*gradients), ctx.request
        if upstream is None:
            return None, None, None, None, *rest
        hidden, linear_weight, linear_bias, target, nll, lse, entropy = ctx.saved_tensors
        given = (hidden, linear_weight, linear_bias)
        inputs = HeadInputs(*given, target, weight=None, token_weight=None, num_items=None)
        with torch.no_grad():
            stats = TokenStats(nll, lse, entropy)
            made = loss.head_token_gradients(inputs, stats, upstream, request)
        needed: list[Any] = [g if n else None for g, n in zip(made, request.execution.grads, strict=True)]
        if torch.is_grad_enabled():
            needed = [None if g is None else first_order(g, *upstream, *given) for g in needed]
        return None, *needed, *rest
