# SPDX-License-Identifier: Apache-2.0
"""What is computed (`LossSpec`), how it runs (`Options`), and what comes back (`LossOutput`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ppl import checks, transform_checks

TAILS = ("drop", "merge", "spread")
DIRECTIONS = ("forward", "reverse", "jensen_shannon")
REDUCTIONS = ("mean", "sum", "none", "sequence")
BACKENDS = ("triton", "torch", "reference")
MAY_BE_TENSORS = ("logit_scale", "softcap", "z_loss", "max_nll")  # in the order of the fields of LossSpec
IN_SCALARS = math.inf  # a number that is not known while torch.compile traces. It is no value of a field


class LossSpec(NamedTuple):
    """The numbers that define a loss; its other tensors travel beside it. `LossSpec.of` validates them.

    `stats` asks the row kernels for entropy and argmax as well. `scalars` holds, in order, the numbers of the fields
    that are IN_SCALARS. Only torch.compile and torch.export make such a spec, and an op reads it with `known`.
    """

    reduction: str = "mean"
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    max_nll: float | None = None
    stats: bool = False
    scalars: Tensor | None = None  # (n + 1,) float64 on the CPU, the last one unused

    @staticmethod
    def of(**fields: Any) -> LossSpec:
        """A validated spec, the same object for the same numbers: to validate takes as long as a small operation.

        Raises:
            ValueError, TypeError: a number breaks its rule; the message says which.
        """
        if torch.compiler.is_compiling():  # which would trace the cache
            return _traced(fields)
        try:
            return _cached(**fields)
        except TypeError:  # a tensor, or something that has no hash, for which its own check has better words
            numbers = {name: tensor.item() for name, tensor in _tensors(fields).items()}
            return _validated(**{**fields, **numbers})


def known(spec: LossSpec) -> LossSpec:
    """The spec with the numbers of `scalars`, validated. It keeps `scalars`, and so the number of its sums."""
    if spec.scalars is None:
        return spec
    transform_checks.check_no_capture()
    return _validated(**_filled(spec, spec.scalars.tolist()))


def with_tensors(spec: LossSpec, device: torch.device) -> LossSpec:
    """The spec with 0-d tensors as numbers, not validated. This is for formulas that torch.compile looks into."""
    return spec if spec.scalars is None else LossSpec(**_filled(spec, spec.scalars.to(device)))


def _filled(spec: LossSpec, numbers: Iterable[Any]) -> dict[str, Any]:
    fields: dict[str, Any] = dict(zip(LossSpec._fields, spec, strict=True))
    names = [name for name in MAY_BE_TENSORS if fields[name] == IN_SCALARS]
    return {**fields, **dict(zip(names, numbers, strict=False))}


def _tensors(fields: dict[str, Any]) -> dict[str, Tensor]:
    """The fields that are tensors and may be."""
    tensors = {name: fields[name] for name in MAY_BE_TENSORS if isinstance(fields.get(name), Tensor)}
    for name, tensor in tensors.items():
        checks.check_constant(name, tensor, (), "one number for all tokens", input=None)
    return tensors


def _traced(fields: dict[str, Any]) -> LossSpec:
    tensors = _tensors(fields)
    if not tensors:
        return _validated(**fields)
    _validated(**{**fields, **dict.fromkeys(tensors, 1.0)})  # the other fields
    numbers = [t.detach().to("cpu", torch.float64) for t in tensors.values()]
    # the caller may change a tensor before backward. Inductor makes a view of one tensor, and a copy of two
    scalars = torch.stack([*numbers, torch.zeros((), dtype=torch.float64, device="cpu")])
    return LossSpec(**{**fields, **dict.fromkeys(tensors, IN_SCALARS)}, scalars=scalars)


def _validated(**fields: Any) -> LossSpec:
    spec = LossSpec(**fields)
    checks.check_choice("reduction", spec.reduction, REDUCTIONS)
    checks.check_ignore_index(spec.ignore_index)
    checks.check_number("label_smoothing", spec.label_smoothing, "in [0, 1]", lambda a: 0 <= a <= 1)
    checks.check_number("logit_scale", spec.logit_scale, "> 0 and finite", _positive)
    if spec.softcap is not None:
        checks.check_number("softcap", spec.softcap, "> 0 and finite, or None for no cap", _positive)
    checks.check_number("z_loss", spec.z_loss, ">= 0 and finite", lambda a: 0 <= a < float("inf"))
    if spec.max_nll is not None:
        checks.check_number("max_nll", spec.max_nll, "> 0 and finite, or None for no limit", _positive)
    return spec


_cached = functools.lru_cache(typed=True)(_validated)  # typed: True is no number here, and equals 1


def _positive(a: float) -> bool:
    return 0 < a < float("inf")


@dataclass(frozen=True)
class Options:
    """How a loss runs; never what it computes.

    `gradient_tolerance`, `gradient_columns` and `screen` are experimental: they may change in any release.

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


class LogProbs(NamedTuple):
    """What one pass says of every token, in nats and in the shape of the target. Each field is differentiable.

    Example:
        >>> import torch, fused_ppl
        >>> values = fused_ppl.log_probs(torch.zeros(1, 4), torch.tensor([2]))
        >>> values.log_prob, values.entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """

    log_prob: Tensor  # z[target] - lse: log of the probability of the target; 0 where ignored
    entropy: Tensor  # -sum_v p[v] log p[v], p = softmax(z); 0 where ignored
    lse: Tensor  # log sum_v exp(z[v]); 0 where ignored


class TopK(NamedTuple):
    """A teacher that names its K most likely classes of each token, in the place of its logits or of its head.

    Q = sum_k exp(log_probs[k]) is the probability of the named classes. `tail` says what becomes of the other 1 - Q:

        "drop"    the named classes have exp(log_probs[k]) / Q, and all others have 0
        "merge"   all other classes are one class, of the teacher and of the student as well
        "spread"  each of the V - K other classes has (1 - Q) / (V - K)

    An entry whose log-probability is -inf names no class, whatever its id is. So rows with fewer classes are padded.

    Example:
        >>> import torch, fused_ppl
        >>> teacher = fused_ppl.TopK(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log(), tail="merge")
        >>> round(fused_ppl.kl_divergence(torch.zeros(1, 4), teacher).item(), 4)
        0.1733
    """

    ids: Tensor  # (*target.shape, K), int64 or int32, different from each other within a token
    log_probs: Tensor  # (*target.shape, K), in nats
    tail: str


class DivergenceOutput(NamedTuple):
    """A divergence with what one pass over both predictions can tell, in nats. Only `loss` is differentiable.

    Example:
        >>> import torch, fused_ppl
        >>> out = fused_ppl.kl_divergence_with_stats(torch.zeros(1, 4), torch.tensor([[2.0, 0, 0, 0]]))
        >>> round(out.divergence.item(), 4), round(out.teacher_entropy.item(), 4)
        (0.468, 0.9183)
    """

    loss: Tensor  # shape of the reduction: (), target.shape[:-1] or target.shape
    divergence: Tensor  # (*target.shape), without weights; 0 where ignored
    entropy: Tensor  # (*target.shape): of the student's prediction
    teacher_entropy: Tensor  # (*target.shape): of the teacher's
    agrees: Tensor  # (*target.shape), bool: both predict the same class; False where ignored
    log_prob_difference: Tensor  # (*target.shape): log p[target] - log q[target], student less teacher
    total_weight: Tensor  # M in float64: sum of token_weight over counted tokens


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
