# SPDX-License-Identifier: Apache-2.0
"""What is computed (`LossSpec`), how it runs (`Options`), and what comes back (`LossOutput`, `RowStats`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import checks

REDUCTIONS = ("mean", "sum", "none", "sequence")
BACKENDS = ("triton", "torch", "reference")


@dataclass(frozen=True)
class LossSpec:
    """The numbers that define a loss, validated once; tensors travel beside it.

    `stats` asks the row kernels for entropy and argmax as well.
    """

    reduction: str = "mean"
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    max_nll: float | None = None
    stats: bool = False

    def __post_init__(self) -> None:
        checks.check_choice("reduction", self.reduction, REDUCTIONS)
        checks.check_ignore_index(self.ignore_index)
        checks.check_number("label_smoothing", self.label_smoothing, "in [0, 1]", lambda a: 0 <= a <= 1)
        hint = "To scale by a tensor, scale the hidden states."
        checks.check_number("logit_scale", self.logit_scale, "> 0 and finite", _positive, hint)
        if self.softcap is not None:
            checks.check_number("softcap", self.softcap, "> 0 and finite, or None for no cap", _positive)
        checks.check_number("z_loss", self.z_loss, ">= 0 and finite", lambda a: 0 <= a < float("inf"))
        if self.max_nll is not None:
            checks.check_number("max_nll", self.max_nll, "> 0 and finite, or None for no limit", _positive)

    @classmethod
    def of(cls, *args: object, **keywords: bool) -> LossSpec:
        """The same object for the same arguments: to validate them takes as long as an operation of a small loss."""
        if torch.compiler.is_compiling():  # which would trace the cache
            return cls(*args, **keywords)  # type: ignore[arg-type]
        try:
            return _made(*args, **keywords)
        except TypeError:  # something that has no hash, which its own check has better words for
            return cls(*args, **keywords)  # type: ignore[arg-type]

    def op_args(self) -> tuple[str, int | None, float, float, float | None, float, float | None, bool]:
        """The fields in order, as the schema of the opaque ops spells them (`SPEC_SCHEMA`)."""
        return (
            self.reduction,
            self.ignore_index,
            self.label_smoothing,
            self.logit_scale,
            self.softcap,
            self.z_loss,
            self.max_nll,
            self.stats,
        )


_made = functools.lru_cache(typed=True)(LossSpec)  # typed: True is no number here, and equals 1

SPEC_SCHEMA = (
    "str reduction, int? ignore_index, float label_smoothing, float logit_scale, "
    "float? softcap, float z_loss, float? max_nll, bool stats"
)


def _positive(a: float) -> bool:
    return 0 < a < float("inf")


@dataclass(frozen=True)
class Options:
    """How a loss runs; never what it computes.

    Args:
        backend: None picks the best that can run ("triton" on a GPU, else "torch"; `FUSED_PPL_BACKEND` sets
            another default); "triton", "torch" or "reference" is that one, or an error that says why it cannot.
        memory_budget: bytes that the loss may use for its temporary buffers. None lets the plan decide.
        inplace_backward: write the gradient over `input`. Saves one N x V buffer; the values of `input` are gone
            after backward, a second backward raises, and `input` must not be a leaf.
        gradient_tolerance: of the fused head: the gradient of the logits may be replaced by an approximation that is
            at most this wrong, ||G - G'|| <= tolerance * ||G||, for about half of the FLOPs. On a CPU that holds in
            every group of rows. A GPU is not waited for: it keeps what earlier steps would have needed, with a margin,
            the first steps are exact, and a step that misses the tolerance says so in `LossOutput.residual` alone.
            1e-3 is less than what bf16 rounds away. Loss and lse stay exact. The error of a `screen` comes on top.
            docs/compact.md says when to use it.
        gradient_columns: in the place of a tolerance, the number of columns that are kept exactly in each group of
            rows (never less than its rows), or their share of the vocabulary (below 1).
        screen: with either of them: the logits are computed in "int8", "fp8" or "bf16", and again in full where they
            matter ("fp8" on a GPU only). Then the loss is approximate too; `LossOutput.loss_error` says how far.

    Example:
        >>> import torch, fused_ppl
        >>> options = fused_ppl.Options(backend="torch")
        >>> round(fused_ppl.perplexity(torch.zeros(2, 7), torch.tensor([0, 6]), options=options).item(), 4)
        7.0
    """

    backend: str | None = None
    memory_budget: int | None = None
    inplace_backward: bool = False
    gradient_tolerance: float | None = None
    gradient_columns: float | None = None
    screen: str | None = None

    def __post_init__(self) -> None:
        if self.backend is not None:
            checks.check_choice("backend", self.backend, BACKENDS, "None picks the best that can run.")
        checks.check_memory_budget(self.memory_budget)
        checks.check_compact(self.gradient_tolerance, self.gradient_columns, self.screen)


class LossOutput(NamedTuple):
    """A loss with everything that one pass over the logits can tell. Nats throughout.

    `loss` and `perplexity` are differentiable, also together; all others are detached. Of a row that holds NaN or +inf
    `lse`, `entropy` and `predicted` are undefined, and differ between backends.
    """

    loss: Tensor  # shape of the reduction: (), target.shape[:-1] or target.shape
    perplexity: Tensor  # exp(S / M), the shape of `loss`; z_loss and num_items do not enter it
    nll: Tensor  # (*target.shape): lse - z[target], without weights or smoothing; 0 where ignored
    lse: Tensor  # (*target.shape): log sum_v exp(z[v]); 0 where ignored
    entropy: Tensor  # (*target.shape): entropy of softmax(z); 0 where ignored
    predicted: Tensor  # (*target.shape), int64: argmax_v z[v], the lowest index on ties; -1 where ignored
    total_weight: Tensor  # M in float64, the shape of `loss`: sum of token_weight * weight[target] over counted tokens
    residual: Tensor | None = None  # (): bound on ||G - G'|| / ||G|| of the compact plan; None where another plan ran
    loss_error: Tensor | None = None  # (): estimate of the mean error of nll that a screen made; None as `residual`


class RowStats(NamedTuple):
    """What a backend's forward says of each of the N rows; 0 (and predicted = -1) where a row is ignored."""

    loss: Tensor  # (N,): u * ((1-a) * w[y] * nll + a/V * sum_v w[v] * (lse - z[v])): the row's part of S
    weight: Tensor  # (N,): u * w[y], the row's part of M
    nll: Tensor  # (N,)
    lse: Tensor | None  # (N,); None where nobody looks at it
    entropy: Tensor | None  # (N,), or None where not asked for
    predicted: Tensor | None  # (N,) int64, or None where not asked for

    def map(self, function: Callable[[Tensor, int], Tensor]) -> RowStats:
        """`function(values, what an ignored row has there)` of each that is there."""
        ignored = (0, 0, 0, 0, 0, -1)
        return RowStats(*(None if t is None else function(t, i) for t, i in zip(self, ignored, strict=True)))  # type: ignore[arg-type]

    @classmethod
    def concatenate(cls, parts: Sequence[RowStats]) -> RowStats:
        """Of the rows of all parts."""
        return cls(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]


class Totals(NamedTuple):
    """What one loss value per group of rows says: one group for "mean" and "sum", one per sequence, one per token."""

    loss: Tensor  # (*groups,)
    perplexity: Tensor  # (*groups,)
    total_weight: Tensor  # (*groups,) float64: M
    loss_factor: Tensor  # (*groups,) float64: d loss / d S
    perplexity_factor: Tensor  # (*groups,) float64: d perplexity / d S


class Columns(NamedTuple):
    """Of the softmax part of a gradient, dz[i,v] + C[i] * w[v] * scale (C of the label smoothing), without the
    targets' entries. Float64 where the device has it: squares leave float32 soon."""

    size: Tensor  # (V,): sum over the rows of |entry|
    square: Tensor  # (V,): sum of squares
    total: Tensor  # (V,): sum, where it may differ from `size` and was asked for, else 0 elements


class Factors(NamedTuple):
    """Of each row of that gradient: dz[i,v] = (a * p[v] - (a - rest) * [v = y]) * dz/dx - pull * w[v]."""

    a: Tensor  # (N,)
    rest: Tensor  # (N,)
    pull: Tensor  # (N,), or 0 elements without label smoothing
    row_sum: Tensor  # (N,): sum over v, without the pull
    at_target: Tensor  # (N,): the target's entry, without the pull
    of_backend: tuple[Tensor, ...] = ()  # what its other functions want to know
