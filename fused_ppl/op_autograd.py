# SPDX-License-Identifier: Apache-2.0
"""The autograd of the ops themselves, for callers that reach them without the Functions of `autograd`.

Dynamo inlines a Function where a transform of torch.func is active, and torch.export does so too. What is left are the
ops, with this. The losses of one process have the gradient of the Functions. Every other op says that it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd.function import _SingleLevelFunction

from fused_ppl import transform_checks
from fused_ppl.autograd import HeadLoss, LogitsLoss, new_function
from fused_ppl.engines import flops
from fused_ppl.engines.linear_rows import linear_forward
from fused_ppl.engines.logits import logits_forward
from fused_ppl.engines.ops import LIBRARY, OPS, Op
from fused_ppl.records import DIFFERENTIABLE, Compact, HeadInputs, HeadRequest, LogitsInputs, LogitsRequest


def _logits_request(records: Sequence[Any], needed: Sequence[bool]) -> LogitsRequest:
    """Where the op stands alone, nobody has given its logits away."""
    _, spec, execution = records
    return LogitsRequest(spec, execution, inplace_backward=False, groups=None)


def _head_request(records: Sequence[Any], needed: Sequence[bool]) -> HeadRequest:
    """Gradients that forward has not made are computed in backward."""
    _, spec, execution = records
    asked = dict(zip(HeadInputs._fields, needed, strict=True))
    wanted = tuple(asked[name] for name in DIFFERENTIABLE)
    made = all(m or not w for m, w in zip(execution.grads, wanted, strict=True))
    if not made:
        execution = execution._replace(grads=wanted)
    return HeadRequest(spec, execution, "rows" if made else "vocab", Compact(None, None, None), None)


_LOSSES: dict[str, tuple[Any, Callable[..., Any], Any]] = {
    logits_forward.name: (LogitsLoss, _logits_request, LogitsInputs),
    linear_forward.name: (HeadLoss, _head_request, HeadInputs),
}


def _loss_function(op: Op[..., Any]) -> Any:
    """The Function of an op that does what the forward of one of ours does."""
    function, request, inputs = _LOSSES[op.name]
    count = len(inputs._fields)

    def forward(ctx: Any, keyset: Any, *values: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = _below(op, keyset, values)
        ctx.values = len(values)
        needed = ctx.needs_input_grad[1 : 1 + count]
        records = op.records(values)
        function.setup_context(ctx, (request(records, needed), *records[0]), output)
        return output

    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = function.backward(ctx, *upstream)  # of the keyset, which has none, and of the inputs
        return (*gradients, *(None for _ in range(ctx.values - count)))

    return _function(op.name, forward, backward)


def _failing_function(op: Op[..., Any]) -> Any:
    """The Function of an op whose results nobody can differentiate."""

    def forward(ctx: Any, keyset: Any, *values: Any) -> Any:
        return _below(op, keyset, values)

    def backward(ctx: Any, *upstream: Tensor | None) -> None:
        if _is_gradient(op.name):
            transform_checks.fail_second_derivative()
        transform_checks.fail_op_gradient(op.name)

    return _function(op.name, forward, backward)


def _function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """Below a transform of torch.func it is applied at the level that the dispatcher has come to."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return new_function(name, _SingleLevelFunction, methods)


def _below(op: Op[..., Any], keyset: Any, values: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *values)


def _kernel(op: Op[..., Any]) -> Callable[..., Any]:
    function = (_loss_function if op.name in _LOSSES else _failing_function)(op)
    first_order = _is_gradient(op.name)

    def kernel(keyset: Any, *values: Any) -> Any:
        if torch._C._len_torch_dispatch_stack():  # one of the modes may count
            flops.register()
        tensors = [value for value in values if isinstance(value, Tensor)]
        if any(_is_dual(t) for t in tensors):
            transform_checks.fail_jvp()
        if not torch.is_grad_enabled():
            return _below(op, keyset, values)
        if not any(t.requires_grad for t in tensors):
            # a compiled backward with create_graph=True: before torch 2.13 it may have lost what it depends on
            if first_order and torch._C._current_graph_task_id() != -1:
                transform_checks.fail_second_derivative()
            return _below(op, keyset, values)
        if op.overload._schema.is_mutable:
            transform_checks.fail_op_gradient(op.name)
        with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]  # not in its stub
            return function.apply(keyset, *values)

    return kernel


def _is_gradient(name: str) -> bool:
    """True for an op of a backward."""
    return "backward" in name or name == "linear_scale"


def _is_dual(tensor: Tensor) -> bool:
    """True if forward-mode differentiation has come here."""
    return torch._VF._unpack_dual(tensor, level=0).tangent is not None


for _op in OPS.values():
    LIBRARY.impl(_op.name, _kernel(_op), "Autograd", with_keyset=True)
