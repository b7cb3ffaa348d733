# SPDX-License-Identifier: Apache-2.0
"""What the layers hand to each other: typed records, made once in a call and passed by name.

They are NamedTuples of tensors, numbers and strings, because every torch version carries these through Dynamo, through
an autograd.Function and, field by field, through an op of torch.library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_ppl.spec import LossSpec

DIFFERENTIABLE = ("hidden", "linear_weight", "linear_bias")  # of the fields of HeadInputs
Needed: TypeAlias = tuple[bool, bool, bool]  # whether hidden states, weight and bias need a gradient


class TokenInputs(NamedTuple):
    """What a loss knows of its N rows beside their logits."""

    target: Tensor  # (N,)
    weight: Tensor | None  # (V,): of the classes of all shards
    token_weight: Tensor | None  # (N,), or () for all

    def of_rows(self, rows: slice | Tensor) -> TokenInputs:
        weight = self.token_weight
        if weight is not None and weight.ndim:
            weight = weight[rows]
        return TokenInputs(self.target[rows], self.weight, weight)


class LogitsInputs(NamedTuple):
    """The tensors of a loss from logits."""

    logits: Tensor  # (..., V)
    target: Tensor  # (...)
    weight: Tensor | None  # (V,)
    token_weight: Tensor | None  # (...)
    num_items: Tensor | None  # ()


class HeadInputs(NamedTuple):
    """The tensors of a loss from hidden states. V is the size of this rank's shard."""

    hidden: Tensor  # (..., D)
    linear_weight: Tensor  # (V, D)
    linear_bias: Tensor | None  # (V,)
    target: Tensor  # (...)
    weight: Tensor | None  # (number of all classes,)
    token_weight: Tensor | None  # (...)
    num_items: Tensor | None  # ()


class Execution(NamedTuple):
    """How a loss from logits runs."""

    backend: str
    memory_budget: int | None


class HeadExecution(NamedTuple):
    """How a loss from hidden states runs."""

    backend: str
    memory_budget: int | None
    dtype: torch.dtype  # of the matrix products, as the caller or autocast says
    grads: Needed


class Compact(NamedTuple):
    """What is asked of the compact plan; at most one of the first two is given."""

    gradient_tolerance: float | None  # largest relative error of the gradient of the logits
    gradient_columns: float | None  # columns kept in each group of rows: a count, or a share of V
    screen: str | None  # dtype of the first product


class Shard(NamedTuple):
    """The part of the vocabulary that some logits are."""

    first: int  # the first class of the part
    num_classes: int  # of all parts


class Groups(NamedTuple):
    """Ranks that hold parts of a batch (`tokens`), and ranks that hold shards of the vocabulary; "" for none."""

    tokens: str = ""
    ranks: int = 1  # in the token group: the gradient is multiplied by it
    vocab: str = ""
    first: int = 0  # the first class of this rank's shard
    num_classes: int = 0  # of all shards
    layout: int = 0  # a number that differs where ranks mean different shards
    sum_hidden: bool = False  # whether backward adds up the gradient of the hidden states


class LogitsRequest(NamedTuple):
    """One call of a loss from logits, without its tensors."""

    spec: LossSpec
    execution: Execution
    inplace_backward: bool
    groups: Groups | None


class HeadRequest(NamedTuple):
    """One call of a loss from hidden states, without its tensors."""

    spec: LossSpec
    execution: HeadExecution
    plan: str  # "forward", "rows", "compact" or "vocab"
    compact: Compact
    groups: Groups | None


class RowStats(NamedTuple):
    """What a backend's forward says of each of the N rows; 0 (and predicted = -1) where a row is ignored."""

    loss: Tensor  # (N,): u * ((1-a) * w[y] * nll + a/V * sum_v w[v] * (lse - z[v])): the row's part of S
    weight: Tensor  # (N,): u * w[y], the row's part of M
    nll: Tensor  # (N,)
    lse: Tensor | None  # (N,); None where nobody looks at it
    entropy: Tensor | None  # (N,), or None where not asked for
    predicted: Tensor | None  # (N,) int64, or None where not asked for

    def map(self, function: Callable[[Tensor, int], Tensor]) -> RowStats:
        """`function(values, value of an ignored row)` of each field that is there."""
        ignored = (0, 0, 0, 0, 0, -1)
        return RowStats(*(None if t is None else function(t, i) for t, i in zip(self, ignored, strict=True)))  # type: ignore[arg-type]  # the first three are there

    @classmethod
    def concatenate(cls, parts: Sequence[RowStats]) -> RowStats:
        """The rows of all parts, one part after another."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]  # as above


class Normalizers(NamedTuple):
    """What forward keeps of every row for backward, over all classes."""

    lse: Tensor  # (N,)
    nll: Tensor  # (N,)


class TokenStats(NamedTuple):
    """What forward keeps of every token for the gradients of its log-probability, entropy and lse."""

    nll: Tensor  # (...)
    lse: Tensor  # (...)
    entropy: Tensor  # (...)


class Totals(NamedTuple):
    """What one loss value per group of rows says: one group for "mean" and "sum", one per sequence, one per token."""

    loss: Tensor  # (*groups,)
    perplexity: Tensor  # (*groups,)
    total_weight: Tensor  # (*groups,) float64: M
    loss_factor: Tensor  # (*groups,) float64: d loss / d S
    perplexity_factor: Tensor  # (*groups,) float64: d perplexity / d S


class LossResults(NamedTuple):
    """`Totals`, then what is known of every token."""

    loss: Tensor
    perplexity: Tensor
    total_weight: Tensor
    loss_factor: Tensor
    perplexity_factor: Tensor
    nll: Tensor  # (...)
    lse: Tensor | None  # (...); None where neither the result nor the gradient needs it
    entropy: Tensor | None  # (...), or 0 elements or None where not asked for
    predicted: Tensor | None  # (...) int64, as `entropy`


class TokenSums(NamedTuple):
    """What a loss from logits is before the sums of all ranks are added."""

    sums: Tensor  # (2 or 3, *groups): S, M and, with z_loss, Z
    nll: Tensor
    lse: Tensor
    entropy: Tensor
    predicted: Tensor


class Unscaled(NamedTuple):
    """The gradients of S + z_loss * Z, in float32 or wider; 0 elements where none is needed."""

    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


class HeadSums(NamedTuple):
    """What a loss from hidden states is before the sums of all ranks are added."""

    tokens: TokenSums
    unscaled: Unscaled


class CompactSums(NamedTuple):
    """`HeadSums`, and how far the compact plan is from the exact gradient and loss."""

    tokens: TokenSums
    unscaled: Unscaled
    residual: Tensor  # ()
    loss_error: Tensor  # ()


class CompactGradient(NamedTuple):
    """The gradients by the compact plan where the statistics are known, and how far they are from the exact ones."""

    unscaled: Unscaled
    residual: Tensor  # ()


class ShardStats(NamedTuple):
    """What a shard of the vocabulary says of every row."""

    fields: Tensor  # (N, 6) float64, see `backends.RowBackend.nll_forward_shard`
    maxima: Tensor  # (N + 4, 1 or 2) float64, see `backends.shards.maxima`


class HeadResults(NamedTuple):
    """What a loss from hidden states returns; the last two are None, or without elements, but for the compact plan."""

    losses: LossResults
    unscaled: Unscaled
    residual: Tensor | None  # ()
    loss_error: Tensor | None  # ()


class Upstream(NamedTuple):
    """What the gradients of S and Z are multiplied by: d(loss) and d(perplexity) are not both None."""

    loss_factor: Tensor
    perplexity_factor: Tensor
    grad_loss: Tensor | None
    grad_perplexity: Tensor | None


class TokenUpstream(NamedTuple):
    """The upstream gradients of what is known of every token, of the shape of the target; None where there is none."""

    grad_log_prob: Tensor | None
    grad_entropy: Tensor | None
    grad_lse: Tensor | None


class RowUpstream(NamedTuple):
    """The upstream gradients of S and of Z, for every row (N,), or () where all rows share one.

    The other fields are (N,): those of the row's lse and entropy, and the entropy itself, which its gradient needs.
    """

    grad_s: Tensor
    grad_z: Tensor | None  # None where no Z takes part
    grad_lse: Tensor | None = None
    grad_entropy: Tensor | None = None
    entropy: Tensor | None = None  # None without grad_entropy

    def map(self, function: Callable[[Tensor], Tensor]) -> RowUpstream:
        """`function` of each field that is there."""
        return RowUpstream(*(None if g is None else function(g) for g in self))  # type: ignore[arg-type]  # the first is there


# (nll, entropy, place of the rows in their chunk) of some rows to their upstream gradients
RowFunction: TypeAlias = Callable[[Tensor, Tensor | None, slice], RowUpstream]


class ColumnSums(NamedTuple):
    """Of the softmax part of a gradient, dz[i,v] + C[i] * w[v] * scale (C of the label smoothing), without the
    targets' entries. Float64 where the device has it: squares leave float32 soon."""

    size: Tensor  # (V,): sum over the rows of |entry|
    square: Tensor  # (V,): sum of squares
    total: Tensor  # (V,): sum, where it may differ from `size` and was asked for, else 0 elements


class RowFactors(NamedTuple):
    """Of each row of that gradient: dz[i,v] = (a * p[v] - (a - rest) * [v = y]) * dz/dx - smoothing * w[v]."""

    a: Tensor  # (N,)
    rest: Tensor  # (N,)
    smoothing: Tensor  # (N,), or 0 elements without label smoothing
    row_sum: Tensor  # (N,): sum over v, without the smoothing
    at_target: Tensor  # (N,): the target's entry, without the smoothing
    of_backend: tuple[Tensor, ...] = ()  # what the backend's other functions need


class KeptColumns(NamedTuple):
    """The K columns that a group of rows keeps exactly."""

    columns: Tensor  # (K,) int64, rising
    place: Tensor  # (R,) int64: of each row's target among them, K where it is in another shard of the vocabulary


class Divergence(NamedTuple):
    """What is compared: p = softmax(z) of the student with q = softmax(t) of the teacher."""

    direction: str  # "forward", "reverse" or "jensen_shannon"
    beta: float  # the share of q in the mixture of "jensen_shannon"
    teacher_logit_scale: float
    teacher_softcap: float | None
    tail: str | None = None  # "drop", "merge" or "spread": the classes that a top-k teacher does not name


class Teacher(NamedTuple):
    """What a student is compared with, which is constant: logits, a head, or the K most likely classes of each token.

    The classes are those of the student. The hidden size may differ.
    """

    teacher_input: Tensor | None  # logits (..., V), or hidden states (..., D of the teacher); None of a top-k teacher
    teacher_weight: Tensor | None = None  # (V, D of the teacher)
    teacher_bias: Tensor | None = None  # (V,)
    teacher_ids: Tensor | None = None  # (..., K)
    teacher_log_probs: Tensor | None = None  # (..., K)


class DivergenceStats(NamedTuple):
    """What is known of every token, or of every row, 0 where ignored; the last four have 0 elements if nobody asks."""

    divergence: Tensor
    entropy: Tensor  # of p
    teacher_entropy: Tensor  # of q
    agrees: Tensor  # bool: argmax p = argmax q
    log_prob_difference: Tensor  # log p[y] - log q[y]


class DivergenceSums(NamedTuple):
    """A divergence from logits before the sums of all ranks are added."""

    sums: Tensor  # (2, *groups): S, M
    stats: DivergenceStats


class HeadDivergenceSums(NamedTuple):
    """`DivergenceSums` from hidden states, with the gradients that forward makes."""

    of_tokens: DivergenceSums
    unscaled: Unscaled


class DivergenceResults(NamedTuple):
    """A divergence over the batch of all ranks."""

    totals: Totals
    stats: DivergenceStats


class HeadDivergenceResults(NamedTuple):
    """`DivergenceResults` from hidden states, with the gradients that forward makes."""

    of_tokens: DivergenceResults
    unscaled: Unscaled
