# SPDX-License-Identifier: Apache-2.0
"""The matrix products of an LM head, and the rows that take part in them.

Products run in one dtype: that of the hidden states, or what autocast says. Three kinds of half precision compute in
fp32 instead, from slices of the weight that are converted on the way. fp16 does not hold the gradient of a logit
(p < 3e-8 is flushed, a large token weight overflows). A CPU may have no instructions for bf16. A GPU, or its torch, may
have no product of bf16 that is summed in fp32. What a product adds to is fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_ppl import plan
from fused_ppl.backends import presence
from fused_ppl.engines import memory
from fused_ppl.spec import LossSpec

SLICE = 4096  # columns of a product that is converted or added in cache
SLICE_ELEMENTS = 2**19  # of a gradient that is scaled and rounded in cache
# a constant, which torch.compile need not trace
CPU_HAS_BF16: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the products of this dtype run in on this device."""
    if dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16:
        return dtype if _has_bf16(device.type) else torch.float32
    return dtype


def _has_bf16(kind: str) -> bool:
    if kind == "meta":  # as on the device that it stands for
        return True
    if kind != "cpu":
        return presence.widens_half_products(kind)
    return CPU_HAS_BF16


# what torch.compiler.assume_constant_result does, without the second that importing Dynamo takes
_has_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_gradients(
    hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, grads: Sequence[bool], fake: bool = False
) -> tuple[Tensor, ...]:
    """Contiguous, in the dtype of what each is the gradient of; 0 elements where none is needed.

    Fake ones take no memory, and ask nothing of a size that torch.compile does not know.
    """
    likes = (hidden, linear_weight, linear_bias)
    make = torch.empty if fake else memory.empty
    return tuple(
        make(like.shape, dtype=like.dtype, device=like.device) if needed and like is not None else hidden.new_empty(0)
        for like, needed in zip(likes, grads, strict=True)
    )


def scale_into(out: Tensor, gradient: Tensor, factor: Tensor) -> None:
    """out = gradient * factor, rounded once; by slices where a CPU would first make all of it in the wider dtype."""
    factor = factor.to(gradient.dtype)
    if out.dtype == gradient.dtype or out.device.type != "cpu" or factor.ndim:
        torch.mul(gradient, factor, out=out)
        return
    for rounded, exact in zip(out.view(-1).split(SLICE_ELEMENTS), gradient.view(-1).split(SLICE_ELEMENTS), strict=True):
        rounded.copy_(exact * factor)


def slices(columns: int, step: int) -> Iterator[slice]:
    for v in range(0, columns, step):
        yield slice(v, min(v + step, columns))


def logits_into(out: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, step: int = SLICE) -> None:
    """h W^T + bias in the dtype of h. By slices of `step` columns where the weight is to be converted, and in bf16 on a
    CPU, which is faster so."""
    columns, dtype = out.shape[1], h.dtype
    sliced = weight.dtype != dtype or (h.device.type == "cpu" and dtype.itemsize == 2)
    for s in slices(columns, step if sliced else columns):
        w = weight[s].to(dtype).t()
        if bias is None:
            torch.mm(h, w, out=out[:, s])
        else:
            torch.addmm(bias[s].to(dtype), h, w, out=out[:, s])


class Head:
    """logits = h W^T + bias for the counted rows, and the two products that lead back."""

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        linear_weight: Tensor,  # (V, D)
        linear_bias: Tensor | None,  # (V,)
        target: Tensor,  # (N,)
        spec: LossSpec,
        dtype: torch.dtype,
        memory_budget: int | None,
    ) -> None:
        self.dtype = product_dtype(dtype, hidden.device)
        self.wide = wide_dtype(self.dtype)
        self.on_cpu = hidden.device.type == "cpu"
        self.weight, self.bias, self.target = linear_weight, linear_bias, target
        self.converts = self.converted = linear_weight.dtype != self.dtype
        v, d = linear_weight.shape
        step = plan.converted_columns(v, d, self.dtype.itemsize, memory_budget)
        self.step = min(SLICE, step)
        if self.converted and self.dtype != torch.float32 and step == v:
            self.weight, self.converted = linear_weight.to(self.dtype), False
        self.kept: Tensor | None = None  # on a CPU the counted rows, where some are not
        counted = None if spec.ignore_index is None else target != spec.ignore_index
        if counted is not None and self.on_cpu:
            if not bool(counted.all()):
                self.kept = counted.nonzero().squeeze(1)
                hidden, self.target = hidden[self.kept], target[self.kept]
        elif counted is not None:
            # what an ignored row holds must not reach the gradient of the weight, not even NaN times 0
            hidden = hidden.masked_fill(~counted.unsqueeze(1), 0)
        self.hidden = hidden

    def rows(self, values: Tensor | None) -> Tensor | None:
        """A value of every token, or one for all, for the rows that take part."""
        return values if values is None or self.kept is None or values.ndim == 0 else values[self.kept]

    def spread(self, values: Tensor, num_tokens: int, ignored: float = 0) -> Tensor:
        """A value of every row that takes part, for every token."""
        if self.kept is None:
            return values
        out = values.new_full((num_tokens, *values.shape[1:]), ignored)
        return out.index_copy_(0, self.kept, values)

    def zeros(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=self.wide, device=self.target.device)

    def logits(self, h: Tensor, out: Tensor, first: int = 0) -> None:
        """h W^T + bias over the columns from `first` on, into a buffer."""
        here = slice(first, first + out.shape[1])
        logits_into(out, h, self.weight[here], None if self.bias is None else self.bias[here], self.step)

    def target_logits(self, h: Tensor, label: Tensor) -> Tensor:
        """The logit of each row's class as an fp32 dot, not rounded to the dtype of the products."""
        label = label.clamp(0, self.weight.shape[0] - 1).long()
        dot = (h.to(self.wide) * self.weight[label].to(self.dtype).to(self.wide)).sum(1)
        return dot if self.bias is None else dot + self.bias[label].to(self.wide)

    def add_hidden_gradient(self, g: Tensor, out: Tensor, first: int = 0) -> None:
        """out += g W, for the columns of g."""
        for s in slices(g.shape[1], self.step if self.converted else g.shape[1]):
            self.add_product(out, g[:, s], self.weight[first + s.start : first + s.stop].to(self.dtype))

    def add_weight_gradient(self, g: Tensor, h: Tensor, out: Tensor, fresh: bool) -> None:
        """out += g^T h; out = g^T h where `out` is fresh, and holds nothing yet.

        A product that a CPU rounds to bf16 is added slice by slice, while it is in cache.
        """
        direct = g.dtype == out.dtype
        for s in slices(g.shape[1], g.shape[1] if direct else SLICE):
            self.add_product(out[s], g[:, s].t(), h, fresh)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, fresh: bool = False) -> None:
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out) if fresh else out.addmm_(a, b)
            return
        product = torch.mm(a, b) if self.on_cpu else torch.mm(a, b, out_dtype=out.dtype)
        out.copy_(product) if fresh else out.add_(product)
