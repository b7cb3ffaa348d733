# SPDX-License-Identifier: Apache-2.0
"""The autograd.Functions around the opaque ops: what is saved, what is differentiable, what raises. No loop.

`once_differentiable` is not used: it is silent when the upstream gradient is a constant, as that of a mean is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import fused_ppl.engines.linear_compact
import fused_ppl.engines.linear_vocab
import fused_ppl.engines.totals
import fused_ppl.engines.vocab_parallel  # noqa: F401  (they register their ops)
from fused_ppl import parallel, transform_checks
from fused_ppl.engines import flops, linear_rows
from fused_ppl.engines import logits as logits_engine

_OPS = torch.ops.fused_ppl


def run(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """`function.apply`, or its forward alone where nothing records a gradient.

    Dynamo would take a forward of one variadic parameter for one that wants a ctx.
    """
    compiling, transformed = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
    if compiling and (transformed or _exporting()):
        # the autograd of the ops is the one that stays: Dynamo takes a Function apart, and may lose what it has left
        return function.forward(*args)  # type: ignore[no-any-return]
    if not compiling and torch._C._len_torch_dispatch_stack():
        flops.register()
    if not compiling and (transformed or torch.autograd.forward_ad._current_level >= 0):
        return _transformed(function).apply(*args)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled() or not any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return function.forward(*args)  # type: ignore[no-any-return]
    return (function if compiling else _eager(function)).apply(*args)  # type: ignore[no-any-return]


def _exporting() -> bool:
    """True if torch.export traces. This reads the flag: before torch 2.13, `is_exporting()` is True for Dynamo."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


@functools.cache
def _eager(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same without the form that torch.func and Dynamo want, which takes longer to apply than a small loss."""

    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output  # type: ignore[no-any-return]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(torch.autograd.Function)(function.__name__, (torch.autograd.Function,), methods)  # type: ignore[misc, no-any-return]


@functools.cache
def _transformed(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same for transforms of torch.func, which asks it for more; Dynamo takes none that has a `jvp`."""
    methods = {"jvp": staticmethod(transform_checks.fail_jvp), "vmap": staticmethod(transform_checks.fail_vmap)}
    return type(torch.autograd.Function)(function.__name__, (function,), methods)  # type: ignore[misc, no-any-return]


def _kept() -> bool:
    """Whether the graph of the backward that is under way is kept for another one; if in doubt, it is."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or bool(kept())


def _unhooked(*saved: Any) -> bool:
    """Whether no hook on saved tensors has seen one of these: else the graph holds what its hook has made of it, and
    not the tensor itself beside us."""
    return bool(min([tensor._use_count() for tensor in saved]) > 1)


def _untraced(tensor: Tensor) -> bool:
    """Whether an op may be left out for what it does: nothing traces, counts or fakes what is dispatched,
    and there is something to compute."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _unwatched(tensor: Tensor) -> bool:
    """The same, and no profiler would miss the name of the op."""
    return _untraced(tensor) and not torch._C._autograd._profiler_enabled()


class LogitsLoss(torch.autograd.Function):
    """(loss, perplexity, total_weight, loss_factor, perplexity_factor, nll, lse, entropy, predicted) from logits."""

    # (logits, target, weight, token_weight, num_items, spec, backend, memory_budget, inplace_backward, groups), as one
    # parameter: Function.apply inspects the signature at every call, which costs as much as a small loss
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, spec, backend, memory_budget, _, groups = args
        if groups is not None:
            return parallel.logits_forward(tensors, spec, backend, memory_budget, groups)
        op: Any = logits_engine.forward if _unwatched(tensors[0]) else _OPS.logits_forward
        return tuple(op(*tensors, *spec, backend, memory_budget))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, token_weight, _, ctx.spec, ctx.backend, ctx.memory_budget, ctx.inplace, ctx.groups = (
            inputs
        )
        loss_factor, perplexity_factor, nll, lse = output[3:7]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in output[2:] if t is not None))
        ctx.save_for_backward(logits, target, weight, token_weight, lse, nll, loss_factor, perplexity_factor)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, grad_perplexity = upstream[:2]
        if grad_loss is None and grad_perplexity is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        logits = saved[0]
        args = (*saved, grad_loss, grad_perplexity, *ctx.spec, ctx.backend, ctx.memory_budget)
        if not torch.is_grad_enabled():
            return (_logits_gradient(ctx.inplace, ctx.groups, args), *(None,) * 9)
        with torch.no_grad():
            gradient = _logits_gradient(ctx.inplace, ctx.groups, args)
        return (_FirstOrderOnly.apply(gradient, grad_loss, grad_perplexity, logits), *(None,) * 9)  # type: ignore[no-untyped-call]


def _batched(*upstream: Tensor | None) -> bool:
    """Whether there is a batch of upstream gradients: is_grads_batched, which is no transform to those who ask."""
    functorch: Any = torch._C._functorch
    return any(
        g is not None and (functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g)) for g in upstream
    )


def _logits_gradient(inplace: bool, groups: parallel.Groups | None, args: tuple[Any, ...]) -> Tensor:
    batched = not torch.compiler.is_compiling() and _batched(*args[8:10])
    op: Any = logits_engine.backward if _unwatched(args[0]) and not batched else _OPS.logits_backward
    op_ = _OPS.logits_backward_
    if groups is not None and groups.vocab:
        op, op_ = _OPS.shard_logits_backward, _OPS.shard_logits_backward_
        args = (*args, groups.first, groups.num_classes)
    if inplace:
        if batched:
            transform_checks.fail_batched_inplace()
        op_(*args)
        return args[0].detach()  # type: ignore[no-any-return]  # the logits themselves would bring their graph along
    return op(*args)  # type: ignore[no-any-return]


class LinearLoss(torch.autograd.Function):
    """The nine results of `LogitsLoss`, then the unscaled gradients, from hidden states and the weight of the head.

    Plans "rows" and "compact" save unscaled gradients and multiply them in backward; "vocab" saves lse and computes
    them there. "compact" has two results more, `residual` and `loss_error` of `LossOutput`.
    """

    # (hidden, linear_weight, linear_bias, target, weight, token_weight, num_items, spec, kind, grads, dtype, backend,
    # memory_budget, groups, (gradient_tolerance, gradient_columns, screen))
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, spec, kind, grads, dtype, backend, memory_budget, groups, compact = args
        if kind == "compact":
            return parallel.compact_forward(tensors, spec, (backend, dtype, grads, memory_budget, *compact), groups)
        made = grads if kind == "rows" else (False,) * 3
        if groups is not None:
            return parallel.hidden_forward(tensors, spec, backend, dtype, made, memory_budget, groups)
        op: Any = linear_rows.forward if _unwatched(tensors[0]) else _OPS.linear_forward
        return tuple(op(*tensors, *spec, backend, dtype, made, memory_budget))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.spec, ctx.kind, ctx.grads, ctx.dtype, ctx.backend, ctx.memory_budget, ctx.groups, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors[:6], *output[3:7], *output[9:12])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, grad_perplexity = upstream[:2]
        if grad_loss is None and grad_perplexity is None:
            return (None,) * 15
        *inputs, loss_factor, perplexity_factor, nll, lse, dhidden, dweight, dbias = ctx.saved_tensors
        scalars = (loss_factor, perplexity_factor, grad_loss, grad_perplexity)
        groups = ctx.groups
        with torch.no_grad():
            if ctx.kind in ("rows", "compact"):
                args = (*inputs[:4], dhidden, dweight, dbias, *scalars, ctx.spec[1], ctx.grads)
                if (
                    _untraced(inputs[0])
                    and not torch.is_grad_enabled()
                    and not _kept()
                    and not _batched(*upstream[:2])
                    and _unhooked(dhidden, dweight, dbias)
                ):
                    results = linear_rows.scale(*args, last=True)  # type: ignore[no-untyped-call]
                else:
                    results = _OPS.linear_scale(*args)
            else:
                columns = (0, inputs[1].shape[0])
                if groups is not None and groups.vocab:
                    columns = (groups.first, groups.num_classes)
                how = (ctx.backend, ctx.dtype, ctx.grads, ctx.memory_budget, *columns)
                results = _OPS.linear_vocab_backward(*inputs, lse, nll, *scalars, *ctx.spec, *how)
            if groups is not None and groups.sum_hidden and ctx.grads[0]:
                # each shard of the vocabulary has made its part, by whatever plan
                results = (parallel.reduce(results[0], "sum", groups.vocab), *results[1:])
        gradients = [r if needed else None for r, needed in zip(results, ctx.grads, strict=True)]
        if torch.is_grad_enabled():
            parents = (grad_loss, grad_perplexity, *inputs[:3])
            gradients = [None if g is None else _FirstOrderOnly.apply(g, *parents) for g in gradients]  # type: ignore[no-untyped-call]
        return (*gradients, *(None,) * 12)


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
        return _FirstOrderOnly.apply(gradient, *parents), in_dims[0]  # type: ignore[no-untyped-call]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[None, ...]:
        transform_checks.fail_second_derivative()
