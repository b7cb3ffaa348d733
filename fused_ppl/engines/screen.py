# SPDX-License-Identifier: Apache-2.0
"""The cheap first product of the screened fused head: logits good enough to say which columns matter.

    int8   z = (q_h q_W^T) * s_h * s_W,   q = round(x / s), s = max |x| / 127 of each row       (torch._int_mm)
    fp8    the same with s = max |x| / 448                                                     (torch._scaled_mm)
    bf16   z = bf16(h) bf16(W)^T                                                                (torch.mm)

On a CPU the weight is converted once for all micro-batches of a step. Sums over all of its bits show whether it was
written to since, in a fraction of the time of the conversion. Its version counter would not, because fused optimizers
and FSDP2 do not change it. A GPU would have to wait for the sums, and converts the weight in every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fused_ppl.engines import memory
from fused_ppl.engines.head import SLICE, logits_into, slices

MIN_D = 8  # torch._int_mm with D = 1 returns uninitialised memory (torch 2.13)
MIN_ROWS = 32  # what torch._int_mm takes on a GPU
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_DTYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}

# by weight, then by kind: the fingerprint when it was converted, the converted values, and the scale of each row
_converted: Any = WeakTensorKeyDictionary()


class Screen:
    """Computes logits in low precision, and returns them in bf16."""

    dtype = torch.bfloat16

    def __init__(self, kind: str, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
        self.kind = kind
        self.weight, self.scale = _convert_once(kind, linear_weight)
        self.bias = None if linear_bias is None else linear_bias.to(torch.float32)

    def logits(self, h: Tensor, out: Tensor) -> None:
        """Write the logits (R, V) into `out`."""
        if self.kind == "bf16":
            logits_into(out, h.to(torch.bfloat16), self.weight, self.bias)
            return
        q, of_row = _convert(self.kind, h)
        if self.kind == "fp8":
            scales = (of_row.unsqueeze(1), self.scale.unsqueeze(0))
            out.copy_(torch._scaled_mm(q, self.weight.t(), *scales, out_dtype=torch.bfloat16))
            if self.bias is not None:
                out.add_(self.bias)
            return
        rows = q.shape[0]
        if q.is_cuda and rows < MIN_ROWS:
            q = torch.nn.functional.pad(q, (0, 0, 0, MIN_ROWS - rows))
        for s in slices(out.shape[1], SLICE):
            z = torch._int_mm(q, self.weight[s].t())[:rows].to(torch.float32)
            z.mul_(of_row.unsqueeze(1)).mul_(self.scale[s])
            out[:, s] = z if self.bias is None else z.add_(self.bias[s])


def _convert(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """x in the dtype of the screen, and the scale of each row."""
    of_row = x.abs().amax(1).to(torch.float32).clamp_min_(1e-30) / _LARGEST[kind]
    q = x.to(torch.float32) / of_row.unsqueeze(1)
    if kind == "int8" and x.shape[1] < MIN_D:
        q = torch.nn.functional.pad(q, (0, MIN_D - x.shape[1]))
    return (q.round_() if kind == "int8" else q).to(_DTYPE[kind]), of_row


def _convert_once(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The converted weight: the kept one, unless the weight was written to since."""
    if kind == "bf16" and weight.dtype == torch.bfloat16:
        return weight, weight
    print_ = _fingerprint(weight)
    kept = {} if print_ is None else _converted.setdefault(weight, {})
    if print_ is not None and kind in kept and torch.equal(kept[kind][0], print_):
        _, target, scale = kept[kind]
        return target, scale
    kept.pop(kind, None)  # frees its memory first
    (v, d), narrow = weight.shape, kind == "int8" and weight.shape[1] < MIN_D
    target = memory.empty((v, MIN_D if narrow else d), _DTYPE[kind], weight.device)
    scale = torch.empty(v if kind != "bf16" else 0, dtype=torch.float32, device=weight.device)
    for s in slices(v, SLICE):
        if kind == "bf16":
            target[s] = weight[s]
        else:
            target[s], scale[s] = _convert(kind, weight[s])
    kept[kind] = (print_, target, scale)
    return target, scale


def _fingerprint(weight: Tensor) -> Tensor | None:
    """Integer sums modulo 2**64 of the bits of each row and each column, and one element of each row.

    One element that changes is always seen. Several are, unless their changes cancel in every row and column; a swap or
    a changed sign does not. None if the weight cannot be read eight bytes at a time.
    """
    v, d = weight.shape
    first = weight.storage_offset()
    if (
        weight.device.type != "cpu"
        or not weight.is_contiguous()
        or any(n * weight.element_size() % 8 for n in (d, first))
    ):
        return None
    bits = weight.detach().view(torch.int64)
    row = torch.arange(v, dtype=torch.int64, device=weight.device)
    element = weight.detach()[row, row * 7919 % d].to(torch.float64).view(torch.int64)
    return torch.cat([bits.sum(1), bits.sum(0), element])
