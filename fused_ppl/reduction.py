# SPDX-License-Identifier: Apache-2.0
"""(S, M, Z) -> value and factor. The only place outside the kernels that takes exp of a mean.

    loss       = (S + z_loss * Z) / D,   D = num_items, or M for "mean" and "sequence", or 1 for "sum" and "none"
    perplexity = exp(L),                 L = S / M, or S for "none";  exp(c) * (1 + L - c) where L > max_nll = c

Sums are float64 where the device has it. The gradients of all rows are kept unscaled; d loss / d S and
d perplexity / d S are one number per group of rows, applied in fp32 at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_ppl.spec import LossSpec, RowStats, Totals


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: M in fp32 stops counting at 2**24."""
    return torch.float32 if device.type == "mps" else torch.float64


def group_shape(reduction: str, target_shape: torch.Size) -> torch.Size:
    """The shape of the loss."""
    if reduction == "none":
        return target_shape
    return target_shape[:-1] if reduction == "sequence" else torch.Size(())


def sum_rows(rows: RowStats, spec: LossSpec, target_shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """S, M and Z of every group of rows."""
    dtype = sum_dtype(rows.loss.device)
    z = rows.count * rows.lse.square() if spec.z_loss else torch.zeros_like(rows.count)
    if spec.reduction == "none":
        return tuple(r.view(target_shape).to(dtype) for r in (rows.loss, rows.count, z))  # type: ignore[return-value]
    dim = (-1,) if spec.reduction == "sequence" else tuple(range(len(target_shape)))
    if not dim:
        return tuple(r.view(()).to(dtype) for r in (rows.loss, rows.count, z))  # type: ignore[return-value]
    return tuple(r.view(target_shape).sum(dim, dtype=dtype) for r in (rows.loss, rows.count, z))  # type: ignore[return-value]


def finish(s: Tensor, m: Tensor, z: Tensor, spec: LossSpec, num_items: Tensor | None, dtype: torch.dtype) -> Totals:
    """Values and factors from the sums. M = 0 gives NaN as in PyTorch, and the factor 0."""
    zero = m == 0
    inverse = torch.where(zero, 0.0, m.reciprocal())
    mean = s if spec.reduction == "none" else s / m
    if spec.max_nll is None:
        perplexity = slope = mean.exp()
    else:
        slope = mean.clamp(max=spec.max_nll).exp()
        perplexity = slope * (1 + (mean - spec.max_nll).clamp(min=0))
    if spec.reduction == "none":
        return Totals((s + spec.z_loss * z).to(dtype), perplexity.to(dtype), m, torch.ones_like(s), slope)
    slope = torch.where(zero, 0.0, slope * inverse)
    total = s + spec.z_loss * z if spec.z_loss else s
    if num_items is not None:
        loss, factor = total / num_items, num_items.to(s.dtype).reciprocal().expand_as(s).contiguous()
    elif spec.reduction == "sum":
        loss, factor = total, torch.ones_like(s)
    else:
        loss, factor = total / m, inverse
    return Totals(loss.to(dtype), perplexity.to(dtype), m, factor, slope)


def row_upstream(
    grad_loss: Tensor | None,
    grad_perplexity: Tensor | None,
    loss_factor: Tensor,
    perplexity_factor: Tensor,
    spec: LossSpec,
    target_shape: torch.Size,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The upstream gradients of S and of Z for every row, (N,), with stride 0 where all rows share one.

    Z takes part in the loss and not in the perplexity.
    """
    zero = loss_factor.new_zeros(())
    of_z = zero if grad_loss is None else grad_loss * loss_factor
    of_s = of_z if grad_perplexity is None else of_z + grad_perplexity * perplexity_factor
    n = math.prod(target_shape)

    def rows(g: Tensor) -> Tensor:
        g = g.to(dtype)
        if spec.reduction == "sequence":
            g = g.unsqueeze(-1).expand(target_shape)
        return g.reshape(-1).expand(n)

    return rows(of_s), rows(of_z)
