# SPDX-License-Identifier: Apache-2.0
"""The last op of a loss whose sums were reduced over ranks: (S, M, Z) -> value and factors."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl import reduction
from fused_ppl.engines.ops import op
from fused_ppl.records import Totals
from fused_ppl.spec import LossSpec


def _fake(sums: Tensor, num_items: Tensor | None, spec: LossSpec, *, dtype: torch.dtype, ranks: int) -> Totals:
    return reduction.empty_totals(sums, sums.shape[1:], dtype)


@op(_fake)
def finish(sums: Tensor, num_items: Tensor | None, spec: LossSpec, *, dtype: torch.dtype, ranks: int) -> Totals:
    """`ranks` multiplies the gradient, because data parallelism averages it over them."""
    s, m, *z = (part.clone() for part in sums.unbind())
    parts = reduction.Sums(s, m, z[0] if z else None)
    totals = reduction.finish(parts, spec, num_items=num_items, dtype=dtype)
    if ranks == 1:
        return totals
    return totals._replace(loss_factor=totals.loss_factor * ranks, perplexity_factor=totals.perplexity_factor * ranks)
