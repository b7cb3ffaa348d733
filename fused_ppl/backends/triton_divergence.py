# SPDX-License-Identifier: Apache-2.0
"""The divergence of two predictions on a GPU: `DivergenceBackend` of `fused_ppl.backends`, over its kernel."""

from __future__ import annotations

import dataclasses

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
    written = out
    if out is not None and out.stride(-1) != 1:
        written = torch.empty_like(out, memory_format=torch.contiguous_format)
    student, other = _three_dims(logits), _three_dims(teacher_logits)
    own = None if written is None else _three_dims(written)
    given = [t for t in (other, own) if t is not None]
    contiguous = all(t.dtype == student.dtype and launch.same_alignment(student, t) for t in given)
    launch_divergence(
        student,
        other,
        target.contiguous(),
        rows=rows,
        upstream=of_upstream,
        out=own,
        student=numbers(spec),
        teacher=numbers(of_teacher),
        direction=asked.direction,
        beta=asked.beta,
        config=divergence_config(student, asked.direction),
        contiguous=contiguous,
        ignore_index=spec.ignore_index,
    )
    if out is not None and written is not None and written is not out:
        out.copy_(written)
    return DivergenceStats(value, entropy, teacher_entropy, agrees.bool(), difference)


def divergence_config(logits: Tensor, direction: str) -> launch.LaunchConfig:
    """Two rows for each program, so that half as many programs fit into L2.

    A mixture keeps about a dozen values of each of a thread's logits: fewer threads get more registers.
    """
    size = launch.device_size(logits.device)
    config = launch.choose_two_pass_config(2 * logits.shape[2], logits.itemsize, size, register_pressure=2)
    if direction != "jensen_shannon":
        return config
    num_warps = min(config.num_warps, 8)
    return dataclasses.replace(config, num_warps=num_warps, threads=num_warps * size.warp_size, registers=255)


def _three_dims(logits: Tensor) -> Tensor:
    """(B, R, V) whose classes are neighbours, which may be a copy."""
    rows = logits.unsqueeze(0) if logits.ndim == 2 else logits
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
