# SPDX-License-Identifier: Apache-2.0
"""Which code runs the row formula: strict by name, best effort for None, with the reasons collected.

A backend is three modules of functions over rows of logits, `RowBackend`, `CompactBackend` and `DivergenceBackend`. It
knows the row formula and no loop over the caller's memory. The engines know the loop and no formula.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Protocol

import torch
from torch import Tensor

from fused_ppl import checks
from fused_ppl.backends import presence
from fused_ppl.records import (
    ColumnSums,
    Divergence,
    DivergenceStats,
    KeptColumns,
    Normalizers,
    RowFactors,
    RowFunction,
    RowStats,
    RowUpstream,
    Shard,
    TokenInputs,
    Totals,
)
from fused_ppl.spec import BACKENDS, LossSpec


class RowBackend(Protocol):
    """The row formula. `logits` is (N, V), or (B, R, V) with row n = b * R + r and N = B * R, of any strides."""

    def nll_forward(
        self,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        *,
        num_items: Tensor | None,
        memory_budget: int | None,
        keep_lse: bool,
    ) -> tuple[RowStats, Totals | None]:
        """The statistics of every row, and Totals if the same launch has summed and finished them, else None."""

    def nll_backward(
        self,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        *,
        normalizers: Normalizers,
        upstream: RowUpstream,
        out: Tensor,
        memory_budget: int | None,
        shard: Shard | None = None,
    ) -> None:
        """The gradient of every row into `out`, a buffer of the shape of the logits, or the logits themselves.

        With `shard` the logits are that part of the vocabulary, and the normalizers are those of all classes.
        """

    def nll_forward_backward(
        self,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        *,
        target_logit: Tensor,
        upstream: float | RowFunction | None,
        memory_budget: int | None,
    ) -> RowStats:
        """The statistics of a chunk (R, V), which becomes `upstream` times the gradient of l, or stays for None.

        A function is called for parts of the chunk, and returns their upstream gradients; the spec has `stats` then.
        `target_logit` (R,) takes the place of logits[i, y_i], which the products may have rounded.
        """

    def nll_forward_shard(
        self,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        *,
        target_logit: Tensor | None,
        memory_budget: int | None,
        shard: Shard,
    ) -> Tensor:
        """(N, 6) float64 of a part of the vocabulary, 0 where a row is ignored. `shards` merges the parts.

        The fields: the largest z; sum e^(z - largest), the target left out; the target's z, or 0; sum w z; sum
        e^(z - largest) (z - largest), the target left out; the column of the largest.
        """


class CompactBackend(Protocol):
    """The row formula for the compact fused head, over logits (R, V), or (R, K) in the kept columns."""

    def nll_columns(
        self,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        *,
        target_logit: Tensor,
        signed: bool,
        memory_budget: int | None,
    ) -> tuple[RowStats, ColumnSums, RowFactors]:
        """The statistics of `nll_forward_backward`, bit for bit, and sums over the columns of the softmax part.

        `signed` says that rows may differ in sign, and that the sums with their signs are wanted as well.
        """

    def nll_columns_shard(
        self,
        logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        *,
        target_logit: Tensor,
        normalizers: Normalizers,
        signed: bool,
        memory_budget: int | None,
        shard: Shard,
    ) -> tuple[ColumnSums, RowFactors]:
        """`nll_columns` over a part of the vocabulary, where lse and nll over all classes are known."""

    def nll_kept(
        self,
        logits: Tensor,
        kept: KeptColumns,
        spec: LossSpec,
        *,
        stats: RowStats,
        factors: RowFactors,
        out: Tensor,
        memory_budget: int | None,
    ) -> Tensor:
        """Write the softmax part of the gradient in the kept columns; return the row sums of the rest, (R,)."""

    def nll_rescreen(
        self,
        logits: Tensor,
        kept: KeptColumns,
        spec: LossSpec,
        *,
        screened: Tensor,
        stats: RowStats,
        factors: RowFactors,
        weight_sum: float | Tensor,
        memory_budget: int | None,
    ) -> tuple[RowStats, Tensor, Tensor]:
        """`nll_kept` where statistics and factors come from a screen (R, V), which the exact `logits` (R, K) correct.

        The logits become their gradient. Returns the statistics, the row sums of the rest, and an estimate of the error
        of nll, (R,).
        """


class DivergenceBackend(Protocol):
    """The divergence of two predictions of each row, of logits (N, V) or (B, R, V)."""

    def divergence(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        tokens: TokenInputs,
        spec: LossSpec,
        *,
        asked: Divergence,
        upstream: Tensor | None,
        out: Tensor | None,
        memory_budget: int | None,
    ) -> DivergenceStats:
        """The divergence of every row, and with `upstream`, () or (N,), the gradient of the logits into `out`.

        `out` may be the logits themselves. The gradient is multiplied by `upstream` and by the token weight.
        """


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for this call. A name gives that backend or an error; None gives the best that can run.

    Raises:
        NotImplementedError: a named backend cannot run here; the message says why and which can.
    """
    asked = f"backend={name!r}"
    if name is None:
        name = os.environ.get("FUSED_PPL_BACKEND") or None
        asked = f"FUSED_PPL_BACKEND={name}"
        if name is not None:
            checks.check_choice("FUSED_PPL_BACKEND", name, BACKENDS, "Unset it to let each call choose.")
    if name is None:
        return "torch" if device.type not in presence.TRITON_DEVICES else _best(device, dtype)
    reason = refusal(name, device, dtype)
    if reason is not None:
        able = [b for b in BACKENDS if refusal(b, device, dtype) is None]
        raise NotImplementedError(
            f"{asked} cannot run on {device.type} with {dtype}: {reason}. Use one of "
            f"{', '.join(repr(b) for b in able)}, or backend=None without FUSED_PPL_BACKEND for the best that can."
        )
    return name


def _best(device: torch.device, dtype: torch.dtype) -> str:
    """Triton if it can run on this GPU, else torch, with one warning if the installation is the reason."""
    if refusal("triton", device, dtype) is None:
        return "triton"
    problem = presence.TRITON_PROBLEM or presence.compiler_problem(device)
    if problem is not None and not torch.compiler.is_compiling():
        _warn_once(device.type, problem)
    return "torch"


@functools.cache
def _warn_once(kind: str, problem: str) -> None:
    warnings.warn(
        f"fused_ppl computes with PyTorch's operators instead of its kernels on {kind}, which is slower: {problem}. "
        'Options(backend="torch") chooses this without a warning.',
        stacklevel=6,
    )


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    if name != "triton":
        return None
    if presence.TRITON_PROBLEM is not None:
        return presence.TRITON_PROBLEM
    if dtype == torch.float64:
        return "the kernels compute in float32, and float64 would be rounded"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "there is no GPU behind it, and the interpreter runs only under TRITON_INTERPRET=1"
    if device.type == "cpu":
        return None
    if device.type not in presence.TRITON_DEVICES:
        return f"Triton generates no code for {device.type}"
    return presence.compiler_problem(device)


@functools.cache
def load(name: str) -> RowBackend:
    if name == "torch":
        from fused_ppl.backends import torch_rows

        return torch_rows
    from fused_ppl.backends import triton_rows

    return triton_rows


@functools.cache
def load_compact(name: str) -> CompactBackend:
    if name == "torch":
        from fused_ppl.backends import torch_compact

        return torch_compact
    from fused_ppl.backends import triton_compact

    return triton_compact


@functools.cache
def load_divergence(name: str) -> DivergenceBackend:
    if name == "torch":
        from fused_ppl.backends import torch_divergence

        return torch_divergence
    from fused_ppl.backends import triton_divergence

    return triton_divergence
