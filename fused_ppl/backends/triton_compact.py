# SPDX-License-Identifier: Apache-2.0
"""The row formula for the compact fused head, on a GPU: `CompactBackend` of `fused_ppl.backends`."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl.backends import triton_rows
from fused_ppl.kernels import compact_columns, compact_kept, launch
from fused_ppl.records import ColumnSums, KeptColumns, Normalizers, RowFactors, RowStats, Shard, TokenInputs
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import LossSpec


def nll_columns(
    logits: Tensor,  # (R, V): they are not changed
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor,  # (R,) fp32
    signed: bool,
    memory_budget: int | None,
) -> tuple[RowStats, ColumnSums, RowFactors]:
    stats = triton_rows.nll_forward_backward(
        logits, tokens, spec, target_logit=target_logit, upstream=None, memory_budget=memory_budget
    )
    assert stats.lse is not None
    known = Normalizers(stats.lse, stats.nll)
    return stats, *_sums(logits, tokens, spec, target_logit=target_logit, normalizers=known, signed=signed, shard=None)


def nll_columns_shard(
    logits: Tensor,  # (R, V of this shard): they are not changed
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor,  # (R,) fp32: of the targets that are in the shard
    normalizers: Normalizers,
    signed: bool,
    memory_budget: int | None,
    shard: Shard,
) -> tuple[ColumnSums, RowFactors]:
    return _sums(logits, tokens, spec, target_logit=target_logit, normalizers=normalizers, signed=signed, shard=shard)


def _sums(
    logits: Tensor,
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor,
    normalizers: Normalizers,
    signed: bool,
    shard: Shard | None,
) -> tuple[ColumnSums, RowFactors]:
    (n, v), numbers = logits.shape, triton_rows.numbers(spec)
    target = tokens.target.contiguous()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    pull = empty(n) if spec.label_smoothing else None
    made = compact_columns.RowFactors(empty(n), empty(n), empty(n), empty(n), empty(n), empty(n), pull)
    compact_columns.launch_row_factors(
        target,
        triton_rows.weights(tokens, spec),
        numbers,
        target_logit=target_logit.contiguous(),
        lse=normalizers.lse.contiguous(),
        nll=normalizers.nll.contiguous(),
        factors=made,
        num_classes=v if shard is None else shard.num_classes,
        ignore_index=spec.ignore_index,
    )
    if shard is not None:
        target = target - shard.first  # a target in another shard is no column of this one
        made.at_target.masked_fill_((target < 0) | (target >= v), 0)
    tiling = compact_columns.choose_tiling(n, v, logits.itemsize, launch.device_size(logits.device))
    parts = -(-n // tiling.rows_per_part) if n else 0
    # without a softcap, the sum over a whole row is known already
    summed = spec.softcap is not None or shard is not None
    partials = compact_columns.ColumnSums(
        empty(parts, v),
        empty(parts, v),
        empty(parts, v) if signed else None,
        empty(-(-v // tiling.block), n) if summed else None,
    )
    # in units of the largest factor, because its square may leave float32
    unit = made.softmax_factor.abs().amax() if n else made.softmax_factor.new_ones(())
    unit = torch.where((unit > 0) & (unit < torch.inf), unit, 1)
    in_units = made._replace(softmax_factor=made.softmax_factor / unit)
    compact_columns.launch_column_sums(logits, target, in_units, numbers, sums=partials, tiling=tiling)
    scale, wide = spec.logit_scale, sum_dtype(logits.device)
    back = unit.to(wide) * scale
    at_target = made.at_target * scale
    row_sum = made.A_minus_B * scale
    if partials.row_sum is not None:
        row_sum = (partials.row_sum.sum(0).to(wide) * back).to(at_target.dtype) + at_target
    pull = made.A_minus_B[:0] if pull is None else pull * scale
    sizes, square = partials.abs_sum.sum(0).to(wide) * back, partials.square_sum.sum(0).to(wide) * back**2
    columns = ColumnSums(
        sizes, square, sizes[:0] if partials.signed_sum is None else partials.signed_sum.sum(0).to(wide) * back
    )
    of_backend = (made.softmax_factor, made.lse2, made.scale_log2)
    return columns, RowFactors(made.A, made.A_minus_B, pull, row_sum, at_target, of_backend)


def nll_kept(
    logits: Tensor,  # (R, V): they are not changed
    kept: KeptColumns,
    spec: LossSpec,
    *,
    stats: RowStats,
    factors: RowFactors,
    out: Tensor,  # (R, K)
    memory_budget: int | None,
) -> Tensor:
    row_sum = torch.empty_like(factors.a)
    compact_kept.launch_kept_gradient(
        logits,
        kept.columns,
        _row_factors(factors, spec),
        triton_rows.numbers(spec),
        target_position=kept.place,
        out=out,
        row_sum=row_sum,
    )
    return factors.row_sum - row_sum


def nll_rescreen(
    logits: Tensor,  # (R, K): of the kept columns; they become their gradient
    kept: KeptColumns,
    spec: LossSpec,
    *,
    screened: Tensor,  # (R, V): the logits of the screen
    stats: RowStats,  # of the screened logits
    factors: RowFactors,  # of the screened logits
    weight_sum: float | Tensor,  # over all classes
    memory_budget: int | None,
) -> tuple[RowStats, Tensor, Tensor]:
    """`nll_kept` with statistics from a screen, which the kept columns correct; `torch_compact` has the formulas."""
    assert stats.lse is not None
    found = compact_kept.CorrectedRows(
        torch.empty_like(stats.nll), torch.empty_like(stats.lse), *(torch.empty_like(stats.nll) for _ in range(3))
    )
    compact_kept.launch_rescreen(
        screened,
        kept.columns,
        _row_factors(factors, spec),
        triton_rows.numbers(spec),
        target_position=kept.place,
        nll=stats.nll,
        lse=stats.lse,
        out=logits,
        corrected=found,
    )
    counted = factors.a != 0
    same = ~counted | (found.nll == stats.nll)  # both are inf if the target is masked
    change = torch.where(same, 0, found.nll - stats.nll)
    loss = stats.loss + (factors.a - factors.rest) * change
    if factors.smoothing.numel():
        loss = loss + factors.smoothing * (change * weight_sum / spec.logit_scale)
    left = factors.row_sum - factors.at_target - factors.a * (found.p_slope_sum * spec.logit_scale)
    left = torch.where(counted, left * found.p_ratio, 0)
    nll, lse = torch.where(counted, found.nll, stats.nll), torch.where(counted, found.lse, stats.lse)
    return stats._replace(nll=nll, lse=lse, loss=loss), left, torch.where(counted, found.nll_error, 0)


def _row_factors(factors: RowFactors, spec: LossSpec) -> compact_columns.RowFactors:
    """The factors as the kernels take them, without the logit scale."""
    scaled, lse2, multiplier = factors.of_backend
    at_target = factors.at_target / spec.logit_scale
    return compact_columns.RowFactors(factors.a, factors.rest, at_target, scaled, lse2, multiplier)
