# SPDX-License-Identifier: Apache-2.0
"""What the compact fused head asks of its rows, on a GPU. Interface: `fused_ppl.backends`."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl.backends import triton_rows
from fused_ppl.kernels import compact_columns, compact_kept, launch
from fused_ppl.reduction import sum_dtype
from fused_ppl.spec import Columns, Factors, LossSpec, RowStats


def nll_columns(
    logits: Tensor,  # (R, V): left as they are
    target_logit: Tensor,  # (R,) fp32: takes the place of logits[i, y_i]
    target: Tensor,  # (R,)
    spec: LossSpec,
    weight: Tensor | None,
    token_weight: Tensor | None,
    signed: bool,
    memory_budget: int | None,
) -> tuple[RowStats, Columns, Factors]:
    """The statistics of `nll_forward_backward`, bit for bit, and sums over the columns of the softmax part.

    `signed`: rows may differ in sign, and the sums with their signs are wanted as well.
    """
    rows = (target_logit, target, spec, weight, token_weight)
    stats = triton_rows.nll_forward_backward(logits, *rows, None, memory_budget)
    assert stats.lse is not None
    return stats, *_sums(logits, *rows, stats.lse, stats.nll, signed, None)


def nll_columns_shard(
    logits: Tensor,  # (R, V of this shard): left as they are
    target_logit: Tensor,  # (R,) fp32: of the targets that are in the shard
    target: Tensor,  # (R,)
    lse: Tensor,  # (R,) fp64: of all classes
    nll: Tensor,  # (R,)
    spec: LossSpec,
    weight: Tensor | None,  # (num_classes,)
    token_weight: Tensor | None,
    signed: bool,
    memory_budget: int | None,
    shard: tuple[int, int],  # the first of the classes, and the number of all
) -> tuple[Columns, Factors]:
    """`nll_columns` where the statistics are known: of the columns of a shard of the vocabulary."""
    return _sums(logits, target_logit, target, spec, weight, token_weight, lse, nll, signed, shard)


def _sums(
    logits: Tensor,
    target_logit: Tensor,
    target: Tensor,
    spec: LossSpec,
    weight: Tensor | None,
    token_weight: Tensor | None,
    lse: Tensor,
    nll: Tensor,
    signed: bool,
    shard: tuple[int, int] | None,
) -> tuple[Columns, Factors]:
    (n, v), numbers = logits.shape, triton_rows.numbers(spec)
    target = target.contiguous()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    pull = empty(n) if spec.label_smoothing else None
    made = compact_columns.RowFactors(empty(n), empty(n), empty(n), empty(n), empty(n), empty(n), pull)
    compact_columns.launch_row_factors(
        target,
        triton_rows.weights(weight, token_weight, spec),
        numbers,
        target_logit=target_logit.contiguous(),
        lse=lse.contiguous(),
        nll=nll.contiguous(),
        factors=made,
        num_classes=v if shard is None else shard[1],
        ignore_index=spec.ignore_index,
    )
    if shard is not None:
        target = target - shard[0]  # outside of the shard it is no column
        made.at_target.masked_fill_((target < 0) | (target >= v), 0)
    tiling = compact_columns.choose_tiling(n, v, logits.itemsize, launch.device_size(logits.device))
    parts = -(-n // tiling.rows_per_part) if n else 0
    # all of a row, without a cap and not a shard, sums to what is known
    summed = spec.softcap is not None or shard is not None
    partials = compact_columns.ColumnSums(
        empty(parts, v),
        empty(parts, v),
        empty(parts, v) if signed else None,
        empty(-(-v // tiling.block), n) if summed else None,
    )
    # in units of the largest factor, whose square may be no float32
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
    columns = Columns(
        sizes, square, sizes[:0] if partials.signed_sum is None else partials.signed_sum.sum(0).to(wide) * back
    )
    of_backend = (made.softmax_factor, made.lse2, made.scale_log2)
    return columns, Factors(made.A, made.A_minus_B, pull, row_sum, at_target, of_backend)


def nll_kept(
    logits: Tensor,  # (R, V): left as they are
    index: Tensor,  # (K,): the kept columns
    place: Tensor,  # (R,): the target's column among them, K where it is in another shard of the vocabulary
    stats: RowStats,
    factors: Factors,
    spec: LossSpec,
    out: Tensor,  # (R, K)
    memory_budget: int | None,
) -> Tensor:
    """The softmax part of the gradient in the kept columns; returns what is left of the row sums, (R,)."""
    row_sum = torch.empty_like(factors.a)
    compact_kept.launch_kept_gradient(
        logits,
        index,
        _row_factors(factors, spec),
        triton_rows.numbers(spec),
        target_position=place,
        out=out,
        row_sum=row_sum,
    )
    return factors.row_sum - row_sum


def nll_rescreen(
    logits: Tensor,  # (R, K): those of the kept columns, made into their gradient
    screened: Tensor,  # (R, V): what the screen says of all
    index: Tensor,  # (K,): the kept columns
    place: Tensor,  # (R,): the target's column among them
    stats: RowStats,  # of the screened logits
    factors: Factors,  # of the screened logits
    spec: LossSpec,
    weight_sum: float | Tensor,  # over all classes
    memory_budget: int | None,
) -> tuple[RowStats, Tensor, Tensor]:
    """`nll_kept` where the statistics come from a screen, which the kept columns correct; see `torch_compact`."""
    assert stats.lse is not None
    found = compact_kept.CorrectedRows(
        torch.empty_like(stats.nll), torch.empty_like(stats.lse), *(torch.empty_like(stats.nll) for _ in range(3))
    )
    compact_kept.launch_rescreen(
        screened,
        index,
        _row_factors(factors, spec),
        triton_rows.numbers(spec),
        target_position=place,
        nll=stats.nll,
        lse=stats.lse,
        out=logits,
        corrected=found,
    )
    counted = factors.a != 0
    same = ~counted | (found.nll == stats.nll)  # as inf is, where the target is masked
    change = torch.where(same, 0, found.nll - stats.nll)
    loss = stats.loss + (factors.a - factors.rest) * change
    if factors.pull.numel():
        loss = loss + factors.pull * (change * weight_sum / spec.logit_scale)
    left = factors.row_sum - factors.at_target - factors.a * (found.p_slope_sum * spec.logit_scale)
    left = torch.where(counted, left * found.p_ratio, 0)
    nll, lse = torch.where(counted, found.nll, stats.nll), torch.where(counted, found.lse, stats.lse)
    return stats._replace(nll=nll, lse=lse, loss=loss), left, torch.where(counted, found.nll_error, 0)


def _row_factors(factors: Factors, spec: LossSpec) -> compact_columns.RowFactors:
    """As the kernels take them, without `scale`."""
    scaled, lse2, multiplier = factors.of_backend
    at_target = factors.at_target / spec.logit_scale
    return compact_columns.RowFactors(factors.a, factors.rest, at_target, scaled, lse2, multiplier)
