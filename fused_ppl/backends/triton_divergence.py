# SPDX-License-Identifier: Apache-2.0
"""The divergence of two predictions on a GPU: `DivergenceBackend` of `fused_ppl.backends`, over its kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl import checks
from fused_ppl.backends.triton_rows import numbers
from fused_ppl.kernels import launch
from fused_ppl.kernels.divergence import launch_divergence
from fused_ppl.records import Divergence, DivergenceStats, TokenInputs
from fused_ppl.spec import LossSpec


def divergence(
    logits: Tensor,  # (B, R, V) or (N, V)
    teacher_logits: Tensor,  # the same shape
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    asked: Divergence,
    upstream: Tensor | None,  # () or (N,)
    out: Tensor | None,  # the shape of logits: a buffer, or the logits themselves
    memory_budget: int | None,
) -> DivergenceStats:
    target, device = tokens.target, logits.device
    if device.type == "cpu" or checks.debug():
        checks.check_target_range(target, logits.shape[-1], spec.ignore_index)
    n, asked_for = target.shape[0], target.shape[0] if spec.stats else 0

    def empty(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    value, entropy, teacher_entropy, difference = (empty(size) for size in (n, asked_for, asked_for, asked_for))
    agrees = empty(asked_for, torch.int32)
    rows = launch.DivergenceRows(value)
    if spec.stats:
        rows = launch.DivergenceRows(value, entropy, teacher_entropy, agrees, difference)
    of_teacher = spec._replace(logit_scale=asked.teacher_logit_scale, softcap=asked.teacher_softcap)
    of_upstream = None
    if upstream is not None:
        weight = None if tokens.token_weight is None else tokens.token_weight.contiguous()
        of_upstream = launch.DivergenceUpstream(upstream.to(torch.float32).expand(n).contiguous(), weight)
    written = (
        out if out is None or out.stride(-1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    launch_divergence(
        _three_dims(logits),
        _three_dims(teacher_logits),
        target.contiguous(),
        rows=rows,
        upstream=of_upstream,
        out=None if written is None else _three_dims(written),
        student=numbers(spec),
        teacher=numbers(of_teacher),
        direction=asked.direction,
        beta=asked.beta,
        ignore_index=spec.ignore_index,
    )
    if out is not None and written is not None and written is not out:
        out.copy_(written)
    return DivergenceStats(value, entropy, teacher_entropy, agrees.bool(), difference)


def _three_dims(logits: Tensor) -> Tensor:
    """(B, R, V) whose classes are neighbours, which may be a copy."""
    rows = logits.unsqueeze(0) if logits.ndim == 2 else logits
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
