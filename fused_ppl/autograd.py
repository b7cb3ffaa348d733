# SPDX-License-Identifier: Apache-2.0
"""The autograd.Functions around a loss: what is saved, what is differentiable, what raises. No loop, no op.

A Function takes the request, and then each tensor of the inputs, because autograd looks at nothing inside a record.
`once_differentiable` is not used: it is silent when the upstream gradient is a constant, as that of a mean is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fused_ppl import loss, transform_checks
from fused_ppl.engines import flops
from fused_ppl.engines.logits import Saved
from fused_ppl.engines.ops import flatten, reader
from fused_ppl.records import (
    DIFFERENTIABLE,
    HeadInputs,
    HeadRequest,
    HeadResults,
    LogitsInputs,
    LogitsRequest,
    LossResults,
    Normalizers,
    Unscaled,
    Upstream,
)

_read_head_results = reader(HeadResults)


def logits_loss(inputs: LogitsInputs, request: LogitsRequest) -> LossResults:
    apply = apply_of(LogitsLoss, inputs)
    return loss.logits_loss(inputs, request) if apply is None else LossResults(*apply(request, *inputs))


def head_loss(inputs: HeadInputs, request: HeadRequest) -> HeadResults:
    apply = apply_of(HeadLoss, inputs)
    if apply is None:
        return loss.head_loss(inputs, request)
    results: HeadResults = _read_head_results(iter(apply(request, *inputs)))
    return results


def apply_of(function: Any, inputs: Iterable[Tensor | None]) -> Any:
    """`apply` of the Function in the form that this call needs, or None where nothing records a gradient."""
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or _exporting():
            # the autograd of the ops stays: Dynamo takes a Function apart, and may lose what it has left
            return None
    else:
        if torch._C._len_torch_dispatch_stack():
            flops.register()
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return _transformed(function).apply
        function = _eager(function)
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                return function.apply
    return None


def _exporting() -> bool:
    """True if torch.export traces. This reads the flag: before torch 2.13, `is_exporting()` is True for Dynamo."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


@functools.cache
def _eager(function: Any) -> Any:
    """The same without the form that torch.func and Dynamo want, which takes longer to apply than a small loss."""

    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        output: tuple[Any, ...] = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return new_function(function.__name__, torch.autograd.Function, methods)


@functools.cache
def _transformed(function: Any) -> Any:
    """The same for transforms of torch.func, which asks it for more; Dynamo takes none that has a `jvp`."""
    methods = {"jvp": staticmethod(transform_checks.fail_jvp), "vmap": staticmethod(transform_checks.fail_vmap)}
    return new_function(function.__name__, function, methods)


def new_function(name: str, base: Any, methods: dict[str, Any]) -> Any:
    """A subclass of an autograd.Function."""
    metaclass: Any = type(torch.autograd.Function)
    return metaclass(name, (base,), methods)


# what backward returns for the inputs after the differentiable ones, which are the first fields
_REST_OF_LOGITS = (None,) * (len(LogitsInputs._fields) - 1)
_REST_OF_HEAD = (None,) * (len(HeadInputs._fields) - len(DIFFERENTIABLE))


def _batched(*upstream: Tensor | None) -> bool:
    """True if upstream gradients are a batch, by is_grads_batched. torch.func does not call that a transform."""
    functorch: Any = torch._C._functorch
    if torch.compiler.is_compiling():
        return False
    for g in upstream:
        if g is not None and (functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g)):
            return True
    return False


class LogitsLoss(torch.autograd.Function):
    """`loss.logits_loss` with its gradient. The fields of `LossResults` are the outputs."""

    @staticmethod
    def forward(request: LogitsRequest, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(loss.logits_loss(LogitsInputs(*tensors), request))  # type: ignore[arg-type]  # in order

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.request, logits, target, weight, token_weight, _ = inputs
        _, _, *detached = output
        _, loss_factor, perplexity_factor, nll, lse, *_ = detached
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[t for t in detached if t is not None])
        ctx.save_for_backward(loss_factor, perplexity_factor, logits, target, weight, token_weight, lse, nll)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_perplexity: Tensor | None, *_: None) -> Any:
        if grad_loss is None and grad_perplexity is None:
            return None, None, *_REST_OF_LOGITS
        loss_factor, perplexity_factor, *tensors = ctx.saved_tensors
        saved, upstream = Saved(*tensors), Upstream(loss_factor, perplexity_factor, grad_loss, grad_perplexity)
        batched = _batched(grad_loss, grad_perplexity)
        if batched and ctx.request.inplace_backward:
            transform_checks.fail_batched_inplace()
        if not torch.is_grad_enabled():
            return None, loss.logits_gradient(saved, upstream, ctx.request, batched=batched), *_REST_OF_LOGITS
        with torch.no_grad():
            gradient = loss.logits_gradient(saved, upstream, ctx.request, batched=batched)
        return None, first_order(gradient, grad_loss, grad_perplexity, saved.logits), *_REST_OF_LOGITS


class HeadLoss(torch.autograd.Function):
    """`loss.head_loss` with its gradient. The fields of `HeadResults` are the outputs.

    Plans "rows" and "compact" save unscaled gradients and multiply them in backward; "vocab" saves lse and computes
    them there.
    """

    @staticmethod
    def forward(request: HeadRequest, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(flatten(loss.head_loss(HeadInputs(*tensors), request)))  # type: ignore[arg-type]  # in order

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.request, *tensors = inputs
        given, results = HeadInputs(*tensors), _read_head_results(iter(output))
        ctx.set_materialize_grads(False)
        _, _, *detached = output
        ctx.mark_non_differentiable(*(t for t in detached if t is not None))
        losses = results.losses
        scalars = (losses.loss_factor, losses.perplexity_factor, losses.lse, losses.nll)
        # not num_items: its owner may change it before backward
        kept = (given.hidden, given.linear_weight, given.linear_bias, given.target, given.weight, given.token_weight)
        ctx.save_for_backward(*scalars, *results.unscaled, *kept, None)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_perplexity: Tensor | None, *_: None) -> Any:
        if grad_loss is None and grad_perplexity is None:
            return None, None, None, None, *_REST_OF_HEAD
        request: HeadRequest = ctx.request
        loss_factor, perplexity_factor, lse, nll, hidden, linear_weight, linear_bias, *tensors = ctx.saved_tensors
        inputs, unscaled = HeadInputs(*tensors), Unscaled(hidden, linear_weight, linear_bias)
        upstream = Upstream(loss_factor, perplexity_factor, grad_loss, grad_perplexity)
        with torch.no_grad():
            last = is_last_use(unscaled, grad_loss, grad_perplexity)
            known = Normalizers(lse, nll), unscaled
            made = loss.head_gradients(inputs, known, upstream, request, last=last)
        gradients: list[Any] = [g if n else None for g, n in zip(made, request.execution.grads, strict=True)]
        if torch.is_grad_enabled():
            parents = (grad_loss, grad_perplexity, inputs.hidden, inputs.linear_weight, inputs.linear_bias)
            gradients = [None if g is None else first_order(g, *parents) for g in gradients]
        return None, *gradients, *_REST_OF_HEAD


def is_last_use(unscaled: Unscaled, *upstream: Tensor | None) -> bool:
    """True if nothing reads the saved gradients after this backward, so that it may write to them."""
    if torch.compiler.is_compiling() or _kept() or _batched(*upstream):
        return False
    return _unhooked(*unscaled)


def _kept() -> bool:
    """True if the graph of the backward that is under way is kept for another one; if in doubt, it is."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or bool(kept())


def _unhooked(*saved: Any) -> bool:
    """True if no hook on saved tensors has seen one of these.

    With a hook the graph holds what the hook has made of a tensor, and not the tensor itself beside us.
    """
    return bool(min([tensor._use_count() for tensor in saved]) > 1)


def first_order(gradient: Tensor, *parents: Tensor | None) -> Any:
    return _FirstOrderOnly.apply(gradient, *parents)  # type: ignore[no-untyped-call]  # torch has no annotation


class _FirstOrderOnly(torch.autograd.Function):
    """The identity on a gradient that knows what it was computed from, so that a second derivative raises."""

    @staticmethod
    def forward(gradient: Tensor, *parents: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], gradient: Tensor, *parents: Tensor | None) -> Any:
        return first_order(gradient, *parents), in_dims[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[None, ...]:
        transform_checks.fail_second_derivative()
