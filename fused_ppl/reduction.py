# SPDX-License-Identifier: Apache-2.0
"""From the sums S, M and Z to the value and its derivative. Only this file and the kernels take exp of a mean.

    loss       = (S + z_loss * Z) / D,   D = num_items, or M for "mean" and "sequence", or 1 for "sum" and "none"
    perplexity = exp(L),                 L = S / M, or S for "none";  exp(c) * (1 + L - c) where L > max_nll = c

Sums are float64 where the device has it. The gradients of all rows are kept unscaled; d loss / d S and
d perplexity / d S are one number per group of rows, applied in fp32 at the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl.records import RowStats, RowUpstream, TokenSums, TokenUpstream, Totals, Upstream
from fused_ppl.spec import LossSpec


class Sums(NamedTuple):
    """The sums of every group of rows."""

    s: Tensor  # of the loss
    m: Tensor  # of the weight
    z: Tensor | None  # of weight * lse^2; None without z_loss


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64 if the device has it, because M in float32 stops counting at 2**24."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results and accumulators."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_shape(reduction: str, target_shape: torch.Size) -> torch.Size:
    """The shape of the loss."""
    if reduction == "none":
        return target_shape
    return target_shape[:-1] if reduction == "sequence" else torch.Size(())


def _may_have_z(spec: LossSpec) -> bool:
    """True if the sums have a Z. The fake of an op must say the same, and it may not know the number."""
    return spec.z_loss > 0 or spec.scalars is not None


def sum_rows(rows: RowStats, spec: LossSpec, target_shape: torch.Size) -> Sums:
    """S, M and Z of every group of rows."""
    dtype = sum_dtype(rows.loss.device)
    z = rows.weight * rows.lse.square() if _may_have_z(spec) and rows.lse is not None else None

    def grouped(r: Tensor) -> Tensor:
        if spec.reduction == "none":
            return r.view(target_shape).to(dtype, copy=True)
        if spec.reduction == "sequence":
            return r.view(target_shape).sum(-1, dtype=dtype)
        return r.sum(dtype=dtype)

    return Sums(grouped(rows.loss), grouped(rows.weight), None if z is None else grouped(z))


def token_sums(rows: RowStats, spec: LossSpec, target_shape: torch.Size) -> TokenSums:
    """S, M and Z in one tensor, so that one collective adds them over ranks, and the statistics of every token."""
    sums = torch.stack([t for t in sum_rows(rows, spec, target_shape) if t is not None])
    return TokenSums(sums, *token_stats(rows, target_shape))


def token_stats(rows: RowStats, target_shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy and predicted in the shape of the target. Without `stats` the last two have no elements."""
    assert rows.lse is not None
    nll, lse = rows.nll.view(target_shape), rows.lse.view(target_shape)
    if rows.entropy is None or rows.predicted is None:
        return nll, lse, *or_empty(None, None, nll)
    return nll, lse, rows.entropy.view(target_shape), rows.predicted.view(target_shape)


def or_empty(entropy: Tensor | None, predicted: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and argmax as an op returns them: without elements if they are None."""
    if entropy is None or predicted is None:
        return like.new_empty(0), like.new_empty(0, dtype=torch.int64)
    return entropy, predicted


def empty_totals(like: Tensor, groups: torch.Size, dtype: torch.dtype) -> Totals:
    """The fake of `finish`."""
    sums = sum_dtype(like.device)
    return Totals(*(like.new_empty(groups, dtype=d) for d in (dtype, dtype, sums, sums, sums)))


def empty_token_sums(like: Tensor, target: Tensor, spec: LossSpec, dtype: torch.dtype) -> TokenSums:
    """The fake of `token_sums`."""
    wide, asked = sum_dtype(like.device), target.shape if spec.stats else torch.Size((0,))
    groups = (3 if _may_have_z(spec) else 2, *group_shape(spec.reduction, target.shape))
    shapes = ((groups, wide), (target.shape, dtype), (target.shape, wide), (asked, dtype), (asked, torch.int64))
    return TokenSums(*(like.new_empty(shape, dtype=d) for shape, d in shapes))


def finish(sums: Sums, spec: LossSpec, *, num_items: Tensor | None, dtype: torch.dtype) -> Totals:
    """Values and factors from the sums.

    If M = 0, a mean and the perplexity are NaN, and their factors are 0. The sum, and the loss with `num_items`, do not
    divide by M and stay as they are: signed weights may add up to 0 there. A factor never marks an ignored token, whose
    gradient is 0 by itself.
    """
    s, m, z = sums
    total = s if z is None or not spec.z_loss else s + spec.z_loss * z
    if spec.reduction == "none":
        perplexity, slope = _exp(s, spec.max_nll)
        return Totals(total.to(dtype), perplexity.to(dtype, copy=True), m, torch.ones_like(s), slope)
    inverse = no_mean = m.reciprocal()
    if m.ndim or m.device.type != "cpu" or m.item() == 0:  # reading one number on a CPU is cheap
        # with label smoothing S may differ from 0 although M is 0, and then S / M is inf and not NaN
        no_mean = inverse.nan_to_num(nan=math.nan, posinf=math.nan, neginf=math.nan)
        inverse = inverse.nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)
    mean = s * no_mean
    perplexity, slope = _exp(mean, spec.max_nll)
    if inverse is not no_mean:
        _, slope = _exp(s * inverse, spec.max_nll)
    if num_items is not None:
        loss, factor = total / num_items, torch.ones_like(s) / num_items
    elif spec.reduction == "sum":
        loss, factor = total, torch.ones_like(s)
    else:
        loss, factor = mean if z is None else total * no_mean, inverse
    return Totals(loss.to(dtype), perplexity.to(dtype), m, factor, slope * inverse)


def _exp(mean: Tensor, max_nll: float | None) -> tuple[Tensor, Tensor]:
    """exp(mean) and its derivative. Above max_nll the value goes on along the tangent."""
    if max_nll is None:
        value = mean.exp()
        return value, value
    slope = mean.clamp(max=max_nll).exp()
    return slope * (1 + (mean - max_nll).clamp(min=0)), slope


def upstream_of_sum(upstream: Upstream) -> Tensor:
    """The upstream gradient of S, of the shape of the loss."""
    of_loss = None if upstream.grad_loss is None else upstream.grad_loss * upstream.loss_factor
    if upstream.grad_perplexity is None:
        assert of_loss is not None
        return of_loss
    of_perplexity = upstream.grad_perplexity * upstream.perplexity_factor
    return of_perplexity if of_loss is None else of_loss + of_perplexity


def token_upstream(upstream: TokenUpstream, entropy: Tensor | None, nll: Tensor) -> RowUpstream:
    """The upstream gradients of rows from those of log_prob = -nll, entropy and lse, where each row is its own loss."""

    def rows(g: Tensor | None) -> Tensor | None:
        return None if g is None else g.to(nll.dtype).reshape(-1)

    of_nll = rows(upstream.grad_log_prob)
    grad_s = nll.new_zeros(nll.numel()) if of_nll is None else -of_nll
    grad_entropy = rows(upstream.grad_entropy)
    value = None if grad_entropy is None else rows(entropy)
    return RowUpstream(grad_s, None, rows(upstream.grad_lse), grad_entropy, value)


def row_upstream(upstream: Upstream, spec: LossSpec, target_shape: torch.Size, dtype: torch.dtype) -> RowUpstream:
    """The upstream gradients of S and of Z for every row. Z takes part in the loss and not in the perplexity."""
    grad_loss = upstream.grad_loss
    grad_z = grad_loss * upstream.loss_factor if spec.z_loss and grad_loss is not None else None
    grad_s = upstream_of_sum(upstream)

    def rows(g: Tensor) -> Tensor:
        if spec.reduction in ("mean", "sum"):
            return g
        g = g.to(dtype)
        if spec.reduction == "sequence":
            g = g.unsqueeze(-1).expand(target_shape)
        return g.reshape(-1)

    return RowUpstream(rows(grad_s), None if grad_z is None else rows(grad_z))
