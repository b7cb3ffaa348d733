# SPDX-License-Identifier: Apache-2.0
"""The autograd.Functions around the opaque ops: what is saved, what is differentiable, what raises. No loop.

`once_differentiable` is not used: it is silent when the upstream gradient is a constant, as that of a mean is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import fused_ppl.engines.linear_vocab  # noqa: F401  (it registers its op)
from fused_ppl.engines import linear_rows
from fused_ppl.engines import logits as logits_engine

_OPS = torch.ops.fused_ppl


def run(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """`function.apply`, or its forward alone where nothing records a gradient.

    Dynamo would take a forward of one variadic parameter for one that wants a ctx.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and (torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0):
        return function.apply(*args)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled() or not any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return function.forward(*args)  # type: ignore[no-any-return]
    return (function if compiling else _eager(function)).apply(*args)  # type: ignore[no-any-return]


@functools.cache
def _eager(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same without the form that torch.func and Dynamo want, which takes longer to apply than a small loss."""

    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output  # type: ignore[no-any-return]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(torch.autograd.Function)(function.__name__, (torch.autograd.Function,), methods)  # type: ignore[misc, no-any-return]


def _kept() -> bool:
    """Whether the graph of the backward that is under way is kept for another one; if in doubt, it is."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or bool(kept())


def _untraced(tensor: Tensor) -> bool:
    """Whether an op may be left out for what it does: nothing traces, counts or fakes what is dispatched."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _unwatched(tensor: Tensor) -> bool:
    """The same, and no profiler would miss the name of the op."""
    return _untraced(tensor) and not torch._C._autograd._profiler_enabled()


class LogitsLoss(torch.autograd.Function):
    """(loss, perplexity, total_weight, loss_factor, perplexity_factor, nll, lse, entropy, predicted) from logits."""

    # (logits, target, weight, token_weight, num_items, spec, backend, memory_budget, inplace_backward), as one
    # parameter: Function.apply inspects the signature at every call, which costs as much as a small loss
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, spec, backend, memory_budget, _ = args
        op: Any = logits_engine.forward if _unwatched(tensors[0]) else _OPS.logits_forward
        return tuple(op(*tensors, *spec, backend, memory_budget))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, token_weight, _, ctx.spec, ctx.backend, ctx.memory_budget, ctx.inplace = inputs
        loss_factor, perplexity_factor, nll, lse = output[3:7]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in output[2:] if t is not None))
        ctx.save_for_backward(logits, target, weight, token_weight, lse, nll, loss_factor, perplexity_factor)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, grad_perplexity = upstream[:2]
        if grad_loss is None and grad_perplexity is None:
            return (None,) * 9
        saved = ctx.saved_tensors
        logits = saved[0]
        args = (*saved, grad_loss, grad_perplexity, *ctx.spec, ctx.backend, ctx.memory_budget)
        if not torch.is_grad_enabled():
            return (_logits_gradient(ctx.inplace, args), *(None,) * 8)
        with torch.no_grad():
            gradient = _logits_gradient(ctx.inplace, args)
        return (_FirstOrderOnly.apply(gradient, grad_loss, grad_perplexity, logits), *(None,) * 8)  # type: ignore[no-untyped-call]


def _logits_gradient(inplace: bool, args: tuple[Any, ...]) -> Tensor:
    if inplace:
        _OPS.logits_backward_(*args)
        return args[0].detach()  # type: ignore[no-any-return]  # the logits themselves would bring their graph along
    op: Any = logits_engine.backward if _unwatched(args[0]) else _OPS.logits_backward
    return op(*args)  # type: ignore[no-any-return]


class LinearLoss(torch.autograd.Function):
    """The nine results of `LogitsLoss`, then the unscaled gradients, from hidden states and the weight of the head.

    Plan "rows" saves unscaled gradients and multiplies them in backward; "vocab" saves lse and computes them there.
    """

    # (hidden, linear_weight, linear_bias, target, weight, token_weight, num_items, spec, kind, grads, dtype, backend,
    # memory_budget)
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, spec, kind, grads, dtype, backend, memory_budget = args
        made = grads if kind == "rows" else (False,) * 3
        return tuple(_OPS.linear_forward(*tensors, *spec, backend, dtype, made, memory_budget))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.spec, ctx.kind, ctx.grads, ctx.dtype, ctx.backend, ctx.memory_budget = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors[:6], *output[3:7], *output[9:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, grad_perplexity = upstream[:2]
        if grad_loss is None and grad_perplexity is None:
            return (None,) * 13
        *inputs, loss_factor, perplexity_factor, nll, lse, dhidden, dweight, dbias = ctx.saved_tensors
        scalars = (loss_factor, perplexity_factor, grad_loss, grad_perplexity)
        with torch.no_grad():
            if ctx.kind == "rows":
                args = (*inputs[:3], dhidden, dweight, dbias, *scalars, ctx.grads)
                if _untraced(inputs[0]) and not torch.is_grad_enabled() and not _kept():
                    results = linear_rows.scale(*args, last=True)  # type: ignore[no-untyped-call]
                else:
                    results = _OPS.linear_scale(*args)
            else:
                how = (ctx.backend, ctx.dtype, ctx.grads, ctx.memory_budget)
                results = _OPS.linear_vocab_backward(*inputs, lse, nll, *scalars, *ctx.spec, *how)
        gradients = [r if needed else None for r, needed in zip(results, ctx.grads, strict=True)]
        if torch.is_grad_enabled():
            parents = (grad_loss, grad_perplexity, *inputs[:3])
            gradients = [None if g is None else _FirstOrderOnly.apply(g, *parents) for g in gradients]  # type: ignore[no-untyped-call]
        return (*gradients, *(None,) * 10)


class _FirstOrderOnly(torch.autograd.Function):
    """The identity on a gradient that knows what it was computed from, so that a second derivative raises."""

    @staticmethod
    def forward(gradient: Tensor, *parents: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[None, ...]:
        raise RuntimeError(
            "fused_ppl computes first derivatives only, and this backward asks for a derivative of its gradient. "
            "Use Options(backend='reference'), which plain autograd differentiates any number of times."
        )
