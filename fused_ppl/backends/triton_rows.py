# SPDX-License-Identifier: Apache-2.0
"""The row formula on a GPU: allocates what the kernels write, and launches them. Interface: `fused_ppl.backends`.

With `triton_compact`, the only files that import fused_ppl.kernels for a loss. No call waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl import checks
from fused_ppl.backends.torch_chunks import transform
from fused_ppl.kernels import launch
from fused_ppl.kernels.nll_backward import launch_nll_backward
from fused_ppl.kernels.nll_forward import launch_nll_forward
from fused_ppl.kernels.nll_forward_backward import launch_nll_forward_backward
from fused_ppl.records import Normalizers, RowFunction, RowStats, RowUpstream, Shard, TokenInputs, Totals
from fused_ppl.spec import LossSpec


def nll_forward(
    logits: Tensor,  # (B, R, V) or (N, V)
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    num_items: Tensor | None,
    memory_budget: int | None,
    keep_lse: bool = True,  # always kept, because backward reads it
) -> tuple[RowStats, Totals | None]:
    """The statistics of every row and, for "mean" and "sum", the finished loss from the same launch."""
    n, device = tokens.target.shape[0], logits.device
    logits = _three_dims(logits)
    stats = _check_and_allocate(logits, tokens.target, spec)
    if n == 0:
        return stats, None
    config = _config(logits, heavy=launch.register_pressure(numbers(spec), spec.stats))
    totals = None
    if spec.reduction in ("mean", "sum"):
        dtypes = (torch.float32,) * 2 + (torch.float64,) * 3
        totals = Totals(*(torch.empty((), dtype=dtype, device=device) for dtype in dtypes))
    launch_nll_forward(
        logits,
        tokens.target.contiguous(),
        weights(tokens, spec),
        numbers(spec),
        rows=launch.Rows(*stats),  # type: ignore[arg-type]  # lse is there
        totals=None if totals is None else launch.Totals(*totals, num_items),
        workspace=_workspace(n, config, totals is not None, device),
        config=config,
        ignore_index=spec.ignore_index,
        mean=spec.reduction == "mean",
    )
    return stats, totals


def nll_backward(
    logits: Tensor,  # (B, R, V) or (N, V)
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    normalizers: Normalizers,
    upstream: RowUpstream,
    out: Tensor,  # the shape of logits: a buffer, or the logits themselves
    memory_budget: int | None,
    shard: Shard | None = None,
) -> None:
    """The gradient of every row into `out`."""
    first, num_classes = shard or (0, logits.shape[-1])
    target, weighted = tokens.target, spec.label_smoothing > 0 and tokens.weight is not None
    logits, out = _three_dims(logits), _three_dims(out)
    launch_nll_backward(
        logits,
        target.contiguous(),
        weights(tokens, spec),
        numbers(spec) if upstream.grad_z is not None else numbers(spec)._replace(z_loss=None),
        lse=normalizers.lse.to(torch.float64).contiguous(),
        nll=normalizers.nll.contiguous(),
        upstream=_upstream(upstream, target.shape),
        out=out,
        config=_config(logits, heavy=spec.softcap is not None or weighted or upstream.grad_entropy is not None),
        ignore_index=spec.ignore_index,
        first_class=first,
        num_classes=num_classes,
    )


def nll_forward_backward(
    logits: Tensor,  # (R, V): a buffer, which becomes the gradient
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor,  # (R,) fp32
    upstream: float | RowFunction | None,
    memory_budget: int | None,
) -> RowStats:
    """The statistics of a chunk of the fused LM head; its logits become their gradient, see `fused_ppl.backends`.

    A function of the statistics needs a second launch for the gradient, because it is not part of a kernel.
    """
    stats = _check_and_allocate(logits, tokens.target, spec)
    size, scalars = launch.device_size(logits.device), numbers(spec)
    pressure = launch.register_pressure(scalars, spec.stats)
    launch_nll_forward_backward(
        logits,
        tokens.target.contiguous(),
        weights(tokens, spec),
        scalars,
        target_logit=target_logit.contiguous(),
        rows=launch.Rows(*stats),  # type: ignore[arg-type]  # lse is there
        upstream=None if callable(upstream) else upstream,
        config=launch.choose_two_pass_config(logits.shape[1], logits.itemsize, size, register_pressure=pressure),
        ignore_index=spec.ignore_index,
    )
    if callable(upstream):
        assert stats.lse is not None
        nll_backward(
            logits,
            tokens,
            spec,
            normalizers=Normalizers(stats.lse, stats.nll),
            upstream=upstream(stats.nll, stats.entropy, slice(None)),
            out=logits,
            memory_budget=memory_budget,
        )
    return stats


def _check_and_allocate(logits: Tensor, target: Tensor, spec: LossSpec) -> RowStats:
    n, device = target.shape[0], logits.device
    if device.type == "cpu" or checks.debug():
        checks.check_target_range(target, logits.shape[-1], spec.ignore_index)

    def rows(dtype: torch.dtype) -> Tensor:
        return torch.empty(n, dtype=dtype, device=device)

    return RowStats(
        loss=rows(torch.float32),
        weight=rows(torch.float32),
        nll=rows(torch.float32),
        lse=rows(torch.float64),
        entropy=rows(torch.float32) if spec.stats else None,
        predicted=rows(torch.int64) if spec.stats else None,
    )


def _upstream(upstream: RowUpstream, shape: torch.Size) -> launch.Upstream:
    """The first two may be one number for all rows, with stride 0; the kernel takes the others contiguous."""
    floats = upstream.map(lambda g: g.to(torch.float32).expand(shape))
    dlse, dentropy, entropy = (
        None if g is None else g.contiguous() for g in (floats.grad_lse, floats.grad_entropy, floats.entropy)
    )
    return launch.Upstream(floats.grad_s, floats.grad_z, dlse, dentropy, entropy)


def _three_dims(logits: Tensor) -> Tensor:
    return logits.unsqueeze(0) if logits.ndim == 2 else logits


def _config(logits: Tensor, *, heavy: int) -> launch.LaunchConfig:
    b, r, v = logits.shape
    return launch.choose_config(b * r, v, logits.itemsize, launch.device_size(logits.device), register_pressure=heavy)


def numbers(spec: LossSpec) -> launch.LossScalars:
    return launch.loss_scalars(
        logit_scale=spec.logit_scale,
        softcap=spec.softcap,
        label_smoothing=spec.label_smoothing,
        z_loss=spec.z_loss,
        max_nll=spec.max_nll,
    )


def weights(tokens: TokenInputs, spec: LossSpec) -> launch.Weights:
    _, weight, token_weight = tokens
    total = weight.sum(dtype=torch.float32) if weight is not None and spec.label_smoothing else None
    weight, token_weight = (None if w is None else w.contiguous() for w in (weight, token_weight))
    return launch.Weights(weight, total, token_weight)


def _workspace(n: int, config: launch.LaunchConfig, sums: bool, device: torch.device) -> launch.Workspace:
    """Counters and partial results of one call. Kept counters would be shared by streams, and wrong after an abort."""
    split = config.slices > 1
    counters = torch.zeros(1 + n if split else 1, dtype=torch.int32, device=device) if split or sums else None
    partials = None
    if split:
        partials = torch.empty((launch.SLICE_FIELDS, n, config.slices), dtype=torch.float32, device=device)
    return launch.Workspace(counters, partials)


def nll_forward_shard(
    logits: Tensor,  # (B, R, V of this shard) or (N, V of this shard)
    tokens: TokenInputs,
    spec: LossSpec,
    *,
    target_logit: Tensor | None,  # (N,): where the target is in the shard
    memory_budget: int | None,
    shard: Shard,
) -> Tensor:
    """(N, SHARD_FIELDS) float64, the fields that `RowBackend` names; 0 in ignored rows."""
    logits, (first, num_classes), target = _three_dims(logits), shard, tokens.target
    n, device = target.shape[0], logits.device
    if device.type == "cpu" or checks.debug():
        checks.check_target_range(target, num_classes, spec.ignore_index)
    shards = torch.empty((n, launch.SHARD_FIELDS), dtype=torch.float64, device=device)
    scalars = numbers(spec)
    config = _config(logits, heavy=launch.register_pressure(scalars, True))
    launch_nll_forward(
        logits,
        target.contiguous(),
        weights(tokens._replace(token_weight=None), spec),
        scalars,
        rows=launch.Rows(*(None,) * 6),  # type: ignore[arg-type]  # a shard writes none
        totals=None,
        workspace=_workspace(n, config, False, device),
        config=config,
        ignore_index=spec.ignore_index,
        first_class=first,
        num_classes=num_classes,
        shards=shards,
    )
    if target_logit is not None:
        z = transform(target_logit.clone(), spec)
        owned = (target >= first) & (target < first + logits.shape[-1])
        if spec.ignore_index is not None:
            owned &= target != spec.ignore_index
        shards[:, 2] = torch.where(owned, z, 0)
    return shards
