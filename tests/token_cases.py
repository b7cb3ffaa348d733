# SPDX-License-Identifier: Apache-2.0
"""What the tests of log_probs and linear_log_probs compare: values and gradients, by the tolerance policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import LogProbs, Options, linear_log_probs, log_probs
from fused_ppl.testing import assert_as_good_as_eager

REFERENCE = Options(backend="reference")
FIELDS = LogProbs._fields
SUBSETS = [("log_prob",), ("entropy",), ("lse",), ("log_prob", "entropy"), ("entropy", "lse"), FIELDS]

Upstream = Mapping[str, Tensor]


def mixture(shape: Sequence[int], names: Sequence[str] = FIELDS, seed: int = 5) -> dict[str, Tensor]:
    """Random upstream gradients of some of the outputs. The others have none."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for name in names}


def values_and_gradients(
    function: Callable[..., LogProbs], tensors: Sequence[Tensor], upstream: Upstream
) -> tuple[LogProbs, tuple[Tensor, ...]]:
    """The detached outputs, and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    outputs = [getattr(out, name) for name in upstream]
    grads = torch.autograd.grad(outputs, leaves, [g.to(o) for o, g in zip(outputs, upstream.values(), strict=True)])
    return LogProbs(*(t.detach() for t in out)), grads


def judge_logits(
    logits: Tensor, target: Tensor, options: Options, upstream: Upstream | None = None, **keywords: object
) -> None:
    """Hold values and the gradient of `log_probs` to the policy. Truth and eager are the reference."""
    upstream = mixture(target.shape) if upstream is None else upstream

    def of(x: Tensor, how: Options) -> tuple[LogProbs, tuple[Tensor, ...]]:
        return values_and_gradients(lambda x: log_probs(x, target, options=how, **keywords), [x], upstream)

    mine, eager, truth = of(logits, options), of(logits, REFERENCE), of(logits.double(), REFERENCE)
    wide = torch.promote_types(logits.dtype, torch.float32)
    condition = condition_of(truth[0], wide)
    judge_values(mine[0], eager[0], truth[0], wide, condition)
    dim = keywords.get("class_dim", 1 if logits.ndim > 1 else 0)
    grads = [g.movedim(dim, -1) for _, (g,) in (mine, eager, truth)]
    assert grads[0].dtype == logits.dtype
    assert_as_good_as_eager(*grads, f"gradient of {sorted(upstream)}", condition=condition)
    # as the fixture `judge`: in half precision every entry is rounded once, by itself, from what fp32 arithmetic gives
    lost = of(logits.to(wide), REFERENCE)[1][0].movedim(dim, -1) - grads[2]
    largest = grads[2].abs().amax().item() if grads[2].numel() else 0.0
    kind = torch.finfo(logits.dtype)
    atol = 4 * condition * torch.finfo(wide).eps * largest + kind.smallest_normal * kind.eps
    atol += 2 * lost.abs().amax().item() if lost.numel() else 0.0
    assert_close(grads[0].double(), grads[2], rtol=kind.eps, atol=atol)


def judge_values(mine: LogProbs, eager: LogProbs, truth: LogProbs, dtype: torch.dtype, condition: float) -> None:
    for name in FIELDS:
        value = getattr(mine, name)
        assert value.dtype == dtype, name
        assert_as_good_as_eager(value, getattr(eager, name), getattr(truth, name), name, condition=condition)


def condition_of(truth: LogProbs, dtype: torch.dtype) -> float:
    """1, or in float64 1 + the largest |log p| of a target.

    In float64 eager is the truth, and so its own rounding of log p, which the gradient of the entropy has as a factor,
    allows nothing.
    """
    finite = truth.log_prob[truth.log_prob.isfinite()]
    return 1 + finite.abs().amax().item() if dtype == torch.float64 and finite.numel() else 1.0


def judge_head(
    tensors: Sequence[Tensor],  # hidden, weight, and perhaps bias
    target: Tensor,
    options: Options,
    upstream: Upstream | None = None,
    **keywords: object,
) -> None:
    """Hold values and all gradients of `linear_log_probs` to the policy."""
    upstream = mixture(target.shape) if upstream is None else upstream

    def of(tensors: Sequence[Tensor], how: Options) -> tuple[LogProbs, tuple[Tensor, ...]]:
        def call(h: Tensor, w: Tensor, b: Tensor | None = None) -> LogProbs:
            return linear_log_probs(h, w, target, linear_bias=b, options=how, **keywords)

        return values_and_gradients(call, tensors, upstream)

    mine, eager = of(tensors, options), of(tensors, REFERENCE)
    truth = of([t.double() for t in tensors], REFERENCE)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    condition = condition_of(truth[0], wide)
    judge_values(mine[0], eager[0], truth[0], wide, condition)
    for name, given, *grads in zip(("hidden", "weight", "bias"), tensors, mine[1], eager[1], truth[1], strict=False):
        assert grads[0].dtype == given.dtype
        assert_as_good_as_eager(*grads, f"gradient of {name} from {sorted(upstream)}", condition=condition)
