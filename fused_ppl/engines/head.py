# SPDX-License-Identifier: Apache-2.0
"""The matrix products of an LM head, and the rows that take part in them.

Products run in the dtype of the hidden states, or in the dtype of autocast. Half precision is computed in float32 in
three cases, from slices of the weight that are converted one after another. float16 cannot hold the gradient of a
logit: p < 3e-8 becomes 0, and a large token weight overflows. A CPU may have no instructions for bf16. A GPU, or its
torch, may have no bf16 product that is summed in float32. Accumulators are float32, or float64 for float64.

The row formula stands in the backends. This file has the loop over chunks that all plans share, except the backward of
plan `vocab`, which goes over slices of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_ppl import checks, plan, reduction
from fused_ppl.backends import presence
from fused_ppl.engines import memory
from fused_ppl.records import Compact, HeadExecution, HeadInputs, Shard, TokenInputs, Unscaled
from fused_ppl.spec import LossSpec

T = TypeVar("T", Tensor, Tensor | None)

SLICE = 4096  # classes that are converted or added at once, in cache
SLICE_ELEMENTS = 2**19  # elements of a gradient that are scaled and rounded at once, in cache
# a constant, so that torch.compile does not trace the question
CPU_HAS_BF16: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products of `dtype` are computed in on this device."""
    if dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16:
        return dtype if _has_bf16(device.type) else torch.float32
    return dtype


def _has_bf16(kind: str) -> bool:
    if kind == "meta":  # it stands for a device that has bf16
        return True
    if kind != "cpu":
        return presence.widens_half_products(kind)
    return CPU_HAS_BF16


# as torch.compiler.assume_constant_result marks it, which would import Dynamo for a second
_has_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any


def linear_case(
    hidden: Tensor, linear_weight: Tensor, execution: HeadExecution, compact: Compact | None = None
) -> plan.LinearCase:
    """What the plan depends on. The element size is the one of the products, not of the hidden states."""
    products, (v, d) = product_dtype(execution.dtype, hidden.device), linear_weight.shape
    return plan.LinearCase(
        num_tokens=math.prod(hidden.shape[:-1]),
        num_classes=v,
        hidden_size=d,
        itemsize=products.itemsize,
        device_type=hidden.device.type,
        grads=execution.grads,
        memory_budget=execution.memory_budget,
        compact=compact,
        converts=linear_weight.dtype != products,
    )


def empty_gradients(inputs: HeadInputs, grads: Sequence[bool], fake: bool = False) -> Unscaled:
    """Uninitialised gradients, contiguous and in the dtype of their tensors; 0 elements if none is needed.

    A fake gradient takes no memory and no branch on a size that torch.compile does not know.
    """
    likes = (inputs.hidden, inputs.linear_weight, inputs.linear_bias)
    make = torch.empty if fake else memory.empty
    return Unscaled(
        *(
            make(like.shape, dtype=like.dtype, device=like.device)
            if needed and like is not None
            else inputs.hidden.new_empty(0)
            for like, needed in zip(likes, grads, strict=True)
        )
    )


def accumulator_shapes(inputs: HeadInputs, grads: Sequence[bool]) -> list[Sequence[int]]:
    """The shapes of the unscaled gradients; (0,) if none is needed."""
    shapes = (inputs.hidden.shape, inputs.linear_weight.shape, inputs.linear_weight.shape[:1])
    return [shape if needed else (0,) for shape, needed in zip(shapes, grads, strict=True)]


def empty_unscaled(inputs: HeadInputs, execution: HeadExecution) -> Unscaled:
    """The fake of the unscaled gradients."""
    wide, shapes = reduction.wide_dtype(execution.dtype), accumulator_shapes(inputs, execution.grads)
    return Unscaled(*(inputs.hidden.new_empty(shape, dtype=wide) for shape in shapes))


def scale_into(out: Tensor, gradient: Tensor, factor: Tensor) -> None:
    """out = gradient * factor, rounded once. A CPU does it by slices, to hold only a slice in the wider dtype."""
    factor = factor.to(gradient.dtype)
    if out.dtype == gradient.dtype or out.device.type != "cpu" or factor.ndim:
        torch.mul(gradient, factor, out=out)
        return
    for rounded, exact in zip(out.view(-1).split(SLICE_ELEMENTS), gradient.view(-1).split(SLICE_ELEMENTS), strict=True):
        rounded.copy_(exact * factor)


def slices(columns: int, step: int) -> Iterator[slice]:
    for v in range(0, columns, step):
        yield slice(v, min(v + step, columns))


def logits_into(out: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, *, step: int = SLICE) -> None:
    """out = h W^T + bias in the dtype of h.

    It goes by slices of `step` classes if the weight must be converted, and for bf16 on a CPU, where that is faster.
    """
    columns, dtype = out.shape[1], h.dtype
    sliced = weight.dtype != dtype or (h.device.type == "cpu" and dtype.itemsize == 2)
    for s in slices(columns, step if sliced else columns):
        w = weight[s].to(dtype).t()
        if bias is None:
            torch.mm(h, w, out=out[:, s])
        else:
            torch.addmm(bias[s].to(dtype), h, w, out=out[:, s])


class Head:
    """logits = h W^T + bias for the rows that take part, and the two products that lead back.

    On a CPU the counted rows take part. A GPU would have to wait for their number: there all rows do, and the hidden
    states of the ignored ones are replaced by 0.
    """

    def __init__(self, inputs: HeadInputs, spec: LossSpec, execution: HeadExecution) -> None:
        hidden, target = inputs.hidden.reshape(-1, inputs.linear_weight.shape[1]), inputs.target.reshape(-1)
        self.dtype = product_dtype(execution.dtype, hidden.device)
        self.wide = reduction.wide_dtype(self.dtype)
        self.on_cpu = hidden.device.type == "cpu"
        self.weight, self.bias = inputs.linear_weight, inputs.linear_bias
        self.converted = self.weight.dtype != self.dtype  # in each product, slice by slice
        v, d = self.weight.shape
        step = plan.converted_columns(v, d, self.dtype.itemsize, execution.memory_budget)
        self.step = min(SLICE, step)
        if self.converted and self.dtype != torch.float32 and step == v:
            self.weight, self.converted = self.weight.to(self.dtype), False
        self.counted_rows: Tensor | None = None  # None where all rows take part
        counted = None if spec.ignore_index is None else target != spec.ignore_index
        if counted is not None and self.on_cpu:
            if not bool(counted.all()):
                self.counted_rows = counted.nonzero().squeeze(1)
                hidden, target = hidden[self.counted_rows], target[self.counted_rows]
        elif counted is not None:
            # an ignored row may hold NaN, and NaN times 0 would reach the gradient of the weight
            hidden = hidden.masked_fill(~counted.unsqueeze(1), 0)
        self.hidden = hidden
        token_weight = None if inputs.token_weight is None else inputs.token_weight.reshape(-1)
        self.tokens = TokenInputs(target, inputs.weight, self.of_rows(token_weight))

    @property
    def num_rows(self) -> int:
        """The number of rows that take part."""
        return self.hidden.shape[0]

    def of_rows(self, values: T) -> T:
        """Values of the rows that take part, from values of all tokens or one value for all."""
        return values if values is None or self.counted_rows is None or values.ndim == 0 else values[self.counted_rows]

    def for_all_tokens(self, values: Tensor, num_tokens: int, ignored: float = 0) -> Tensor:
        """Values of all tokens, from values of the rows that take part."""
        if self.counted_rows is None:
            return values
        out = values.new_full((num_tokens, *values.shape[1:]), ignored)
        return out.index_copy_(0, self.counted_rows, values)

    def zeros(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=self.wide, device=self.hidden.device)

    def logits(self, h: Tensor, out: Tensor, first: int = 0) -> None:
        """Write h W^T + bias into `out`, for the classes from `first` on."""
        here = slice(first, first + out.shape[1])
        logits_into(out, h, self.weight[here], None if self.bias is None else self.bias[here], step=self.step)

    def target_logits(self, h: Tensor, label: Tensor) -> Tensor:
        """The logit of each row's target as a float32 dot product, not rounded to the dtype of the products."""
        label = label.clamp(0, self.weight.shape[0] - 1).long()
        dot = (h.to(self.wide) * self.weight[label].to(self.dtype).to(self.wide)).sum(1)
        return dot if self.bias is None else dot + self.bias[label].to(self.wide)

    def add_hidden_gradient(self, g: Tensor, out: Tensor, first: int = 0) -> None:
        """out += g W, for the columns of g."""
        for s in slices(g.shape[1], self.step if self.converted else g.shape[1]):
            self.add_product(out, g[:, s], self.weight[first + s.start : first + s.stop].to(self.dtype))

    def add_weight_gradient(self, g: Tensor, h: Tensor, out: Tensor, fresh: bool) -> None:
        """out += g^T h, or out = g^T h if `out` is `fresh` and holds nothing yet.

        A product that a CPU rounds to bf16 is added slice by slice, while it is in cache.
        """
        direct = g.dtype == out.dtype
        for s in slices(g.shape[1], g.shape[1] if direct else SLICE):
            self.add_product(out[s], g[:, s].t(), h, fresh)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, fresh: bool = False) -> None:
        if a.dtype == out.dtype:
            # not addmm_, whose FLOPs torch.utils.flop_counter does not count
            torch.mm(a, b, out=out) if fresh else torch.addmm(out, a, b, out=out)
            return
        if not self.on_cpu and presence.adds_half_products(out.device.type):  # no buffer for the product
            how: dict[str, Any] = {"out_dtype": out.dtype, "out": out}  # which torch's stubs do not know together
            torch.mm(a, b, **how) if fresh else torch.addmm(out, a, b, **how)
            return
        product = torch.mm(a, b) if self.on_cpu else torch.mm(a, b, out_dtype=out.dtype)
        out.copy_(product) if fresh else out.add_(product)


class Chunk(NamedTuple):
    """Some of the rows that take part."""

    rows: slice
    hidden: Tensor  # (R, D), in the dtype of the products
    tokens: TokenInputs
    target_logit: Tensor  # (R,)
    logits: Tensor  # (R, V): the buffer for the logits, still empty


class HeadLoop:
    """One pass over the hidden states by chunks of rows: the plan, the range check, the buffer and the gradients.

    What is done with the logits of a chunk is the caller's step.
    """

    def __init__(
        self,
        inputs: HeadInputs,
        spec: LossSpec,
        execution: HeadExecution,
        *,
        kind: str,
        compact: Compact | None = None,
        shard: Shard | None = None,
        teacher: Head | None = None,
    ) -> None:
        self.head, self.inputs, self.grads = Head(inputs, spec, execution), inputs, execution.grads
        self.case = linear_case(inputs.hidden, inputs.linear_weight, execution, compact)
        if teacher is not None:
            size, itemsize = teacher.weight.shape[1], teacher.dtype.itemsize
            self.case = dataclasses.replace(self.case, teacher_size=size, teacher_itemsize=itemsize)
        self.plan = plan.linear_plan(self.case, kind)
        self.first = 0 if shard is None else shard.first
        if self.head.on_cpu:  # before ignored rows are left out, so that a message names the caller's position
            num_classes = self.case.num_classes if shard is None else shard.num_classes
            checks.check_target_range(inputs.target.reshape(-1), num_classes, spec.ignore_index)
        wide, device = reduction.wide_dtype(execution.dtype), inputs.hidden.device
        self.unscaled = Unscaled(*(memory.empty(s, wide, device) for s in accumulator_shapes(inputs, self.grads)))
        self.grad_hidden = self.unscaled.grad_hidden.view(-1, self.case.hidden_size)  # of the rows that take part
        if self.head.counted_rows is not None:
            rows = self.head.num_rows if self.grads[0] else 0
            self.grad_hidden = self.unscaled.grad_hidden.new_zeros((rows, self.case.hidden_size))

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[Chunk]:
        """The chunks, with a buffer for their logits in `dtype`, or in the dtype of the products."""
        head, n = self.head, self.head.num_rows
        shape = (min(self.plan.rows, max(n, 1)), self.case.num_classes)
        buffer = memory.empty(shape, dtype or head.dtype, head.hidden.device)
        for start in range(0, n, self.plan.rows):
            rows = slice(start, min(start + self.plan.rows, n))
            h, tokens = head.hidden[rows].to(head.dtype), head.tokens.of_rows(rows)
            label = tokens.target - self.first if self.first else tokens.target
            target_logit = head.target_logits(h, label)
            yield Chunk(rows, h, tokens, target_logit, buffer[: h.shape[0]])

    def clear(self) -> None:
        """Zeros for `add_gradients`. What the first chunk overwrites is left: for the weight it would take long."""
        unscaled = self.unscaled
        for gradient in (unscaled.grad_hidden, unscaled.grad_bias) if self.head.num_rows else unscaled:
            gradient.zero_()

    def add_gradients(self, chunk: Chunk) -> None:
        """The products of the gradient that now stands in `chunk.logits`."""
        g, unscaled = chunk.logits, self.unscaled
        if self.grads[0]:
            self.head.add_hidden_gradient(g, self.grad_hidden[chunk.rows])
        if self.grads[1]:
            self.head.add_weight_gradient(g, chunk.hidden, unscaled.grad_weight, fresh=chunk.rows.start == 0)
        if self.grads[2]:
            unscaled.grad_bias.add_(g.sum(0, dtype=unscaled.grad_bias.dtype))

    def finished(self) -> Unscaled:
        """The unscaled gradients, with the rows of ignored tokens put back as zeros."""
        if self.head.counted_rows is not None and self.grads[0]:
            grad_hidden = self.unscaled.grad_hidden.view(-1, self.case.hidden_size)
            grad_hidden.index_copy_(0, self.head.counted_rows, self.grad_hidden)
        return self.unscaled
