# SPDX-License-Identifier: Apache-2.0
"""The autograd of the ops themselves, for whoever reaches them without the Functions of `autograd`.

Dynamo inlines a Function where a transform of torch.func is active, and torch.export does: what is left are the ops,
with this. The losses of one process have the gradient that the Functions have; every other op says that it has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd.function import _SingleLevelFunction

from fused_ppl import transform_checks
from fused_ppl.autograd import LinearLoss, LogitsLoss
from fused_ppl.engines import LIBRARY, flops

_OPS = torch.ops.fused_ppl
_SPEC = 8  # fields in the schema


def _logits_inputs(args: tuple[Any, ...], needed: tuple[bool, ...]) -> tuple[Any, ...]:
    """As `LogitsLoss` takes them: where the op stands alone, nobody has given its logits away."""
    tensors, rest = args[:5], args[5:]
    return (*tensors, rest[:_SPEC], *rest[_SPEC:], False, None)


def _linear_inputs(args: tuple[Any, ...], needed: tuple[bool, ...]) -> tuple[Any, ...]:
    """As `LinearLoss` takes them: gradients that forward has not made are computed in backward."""
    tensors, rest = args[:7], args[7:]
    backend, dtype, made, memory_budget = rest[_SPEC:]
    enough = all(m or not n for m, n in zip(made, needed, strict=False))
    kind, grads = ("rows", tuple(made)) if enough else ("vocab", needed[:3])
    return (*tensors, rest[:_SPEC], kind, grads, dtype, backend, memory_budget, None, None)


def _of_loss(name: str) -> Any:
    """The Function of an op that does what the forward of one of ours does."""
    function, inputs, tensors = _LOSSES[name]
    op = getattr(_OPS, name).default

    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = _below(op, keyset, args)
        ctx.arguments = len(args)
        function.setup_context(ctx, inputs(args, ctx.needs_input_grad[1:]), output)
        return output

    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = function.backward(ctx, *upstream)[:tensors]
        return (None, *gradients, *(None,) * (ctx.arguments - tensors))

    return _function(name, forward, backward)


def _without(name: str) -> Any:
    """The Function of an op whose results nobody can differentiate."""
    op = getattr(_OPS, name).default

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        return _below(op, keyset, args)

    def backward(ctx: Any, *upstream: Tensor | None) -> None:
        if _is_gradient(name):
            transform_checks.fail_second_derivative()
        transform_checks.fail_op_gradient(name)

    return _function(name, forward, backward)


def _function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """Below a transform of torch.func it is applied at the level that the dispatcher has come to."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(torch.autograd.Function)(name, (_SingleLevelFunction,), methods)  # type: ignore[misc]


def _below(op: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _kernel(name: str) -> Callable[..., Any]:
    op = getattr(_OPS, name).default
    function = (_of_loss if name in _LOSSES else _without)(name)
    first_order = _is_gradient(name)

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch._C._len_torch_dispatch_stack():  # of which one may count
            flops.register()
        tensors = [a for a in args if isinstance(a, Tensor)]
        if any(_is_dual(t) for t in tensors):
            transform_checks.fail_jvp()
        if not torch.is_grad_enabled():
            return _below(op, keyset, args)
        if not any(t.requires_grad for t in tensors):
            # a compiled backward with create_graph=True: before torch 2.13 it may have lost what it depends on
            if first_order and torch._C._current_graph_task_id() != -1:
                transform_checks.fail_second_derivative()
            return _below(op, keyset, args)
        if op._schema.is_mutable:
            transform_checks.fail_op_gradient(name)
        with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
            return function.apply(keyset, *args)

    return kernel


def _is_gradient(name: str) -> bool:
    """Whether it is an op of a backward."""
    return "backward" in name or name == "linear_scale"


def _is_dual(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation has come here."""
    return torch._VF._unpack_dual(tensor, level=0).tangent is not None


_LOSSES: dict[str, tuple[Any, Callable[..., tuple[Any, ...]], int]] = {
    "logits_forward": (LogitsLoss, _logits_inputs, 5),
    "linear_forward": (LinearLoss, _linear_inputs, 7),
}
_OTHERS = (
    *("logits_sums", "logits_backward", "logits_backward_", "linear_sums", "linear_scale", "linear_vocab_backward"),
    *("linear_compact", "linear_compact_shard", "finish", "shard_logits", "shard_hidden", "shard_sums", "shard_merge"),
    *("shard_logits_backward", "shard_logits_backward_"),
)
for _name in (*_LOSSES, *_OTHERS):
    LIBRARY.impl(_name, _kernel(_name), "Autograd", with_keyset=True)
