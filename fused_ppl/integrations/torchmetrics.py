# SPDX-License-Identifier: Apache-2.0
"""Perplexity as a metric of torchmetrics, for MetricCollection, Lightning and their reductions over ranks.

Its states are the sums S and M in float64, which add up over batches and ranks exactly. The metric of torchmetrics
takes softmax first, so that a token with a probability below 1e-38 makes it inf, and it needs all logits.

    PPL = exp(S / M),    S = sum of nll in nats,    M = number of counted tokens, or the sum of their weights

`Perplexity(ignore_index, class_dim, logit_scale, softcap, options, **keywords)` has the arguments of
`fused_ppl.perplexity` and those of `torchmetrics.Metric`. `class_dim` is -1, as torchmetrics has it for (batch, tokens,
classes). Example::

    metrics = torchmetrics.MetricCollection({"perplexity": Perplexity()})
    metrics.update(logits, target)                                 # (B, T, V), (B, T)
    metrics["perplexity"].update(hidden, target, linear_weight=head.weight)     # (B, T, D): no logits
    metrics["perplexity"].update_nll(out.loss, out.total_weight)   # sums that are known
    metrics.compute()
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import torch
from torch import Tensor

import fused_ppl
from fused_ppl import Options


@functools.cache
def _metric_class() -> Any:
    """torchmetrics is imported where the class is first asked for."""
    import torchmetrics

    class Perplexity(torchmetrics.Metric):
        """`fused_ppl.Perplexity` for torchmetrics; the docstring of this module has its arguments."""

        is_differentiable = False
        higher_is_better = False
        full_state_update = False
        nll_sum: Tensor
        total_weight: Tensor
        settings: Tensor

        def __init__(
            self,
            *,
            ignore_index: int | None = -100,
            class_dim: int = -1,
            logit_scale: float = 1.0,
            softcap: float | None = None,
            options: Options | None = None,
            **keywords: Any,
        ) -> None:
            super().__init__(**keywords)
            self._how: dict[str, Any] = {
                "ignore_index": ignore_index,
                "class_dim": class_dim,
                "logit_scale": logit_scale,
                "softcap": softcap,
                "options": options,
            }
            for name in ("nll_sum", "total_weight"):
                self.add_state(name, torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
            # MetricCollection lets metrics with equal states share them: two settings must never be equal
            settings = torch.tensor(zlib.crc32(repr(self._how).encode()), dtype=torch.float64, device="cpu")
            self.add_state("settings", settings, dist_reduce_fx="max")

        def update(
            self,
            preds: Tensor,
            target: Tensor,
            *,
            linear_weight: Tensor | None = None,
            linear_bias: Tensor | None = None,
            token_weight: Tensor | None = None,
        ) -> None:
            """Add a batch of logits, or of hidden states with the weight of the head."""
            part = fused_ppl.Perplexity(**self._how)
            part.update(preds, target, linear_weight=linear_weight, linear_bias=linear_bias, token_weight=token_weight)
            self._add(part)

        def update_nll(self, nll: Tensor, total_weight: Tensor | float) -> None:
            """Add a batch whose S and M are known."""
            part = fused_ppl.Perplexity()
            part.update_nll(nll, total_weight)
            self._add(part)
            self._update_count += 1  # what torchmetrics counts for `update`
            self._computed = None

        def _add(self, part: fused_ppl.Perplexity) -> None:
            self.nll_sum = self.nll_sum + part.nll_sum.to(self.nll_sum.device)
            self.total_weight = self.total_weight + part.total_weight.to(self.total_weight.device)

        def compute(self) -> Tensor:
            """The perplexity of all batches, float64; NaN before the first counted token."""
            whole = fused_ppl.Perplexity()
            whole.update_nll(self.nll_sum, self.total_weight)
            return whole.compute()

    Perplexity.__qualname__ = "Perplexity"  # so that it can be pickled
    return Perplexity


def __getattr__(name: str) -> Any:
    if name == "Perplexity":
        return _metric_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
