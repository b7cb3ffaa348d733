# SPDX-License-Identifier: Apache-2.0
"""How rows of logits are compared with a teacher's."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_ppl import backends
from fused_ppl.records import Divergence, DivergenceStats, TokenInputs
from fused_ppl.spec import LossSpec


class Comparison(NamedTuple):
    """A divergence, its numbers and its backend, without tensors."""

    spec: LossSpec
    asked: Divergence
    backend: str
    memory_budget: int | None

    def of_logits(
        self,
        logits: Tensor,  # (B, R, V) or (N, V)
        teacher_logits: Tensor,  # the same shape
        tokens: TokenInputs,
        *,
        upstream: Tensor | None,  # () or (N,)
        out: Tensor | None,  # the shape of logits: a buffer, or the logits themselves
    ) -> DivergenceStats:
        """By the backend, see `backends.DivergenceBackend`."""
        return backends.load_divergence(self.backend).divergence(
            logits,
            teacher_logits,
            tokens,
            self.spec,
            asked=self.asked,
            upstream=upstream,
            out=out,
            memory_budget=self.memory_budget,
        )
