# SPDX-License-Identifier: Apache-2.0
"""The last op of a loss whose sums were reduced over ranks: (S, M, Z) -> value and factors."""

from __future__ import annotations

import torch

from fused_ppl import reduction
from fused_ppl.engines import LIBRARY
from fused_ppl.spec import SPEC_SCHEMA, LossSpec

LIBRARY.define(
    f"finish(Tensor sums, Tensor? num_items, {SPEC_SCHEMA}, ScalarType dtype, int ranks) "
    "-> (Tensor loss, Tensor perplexity, Tensor total_weight, Tensor loss_factor, Tensor perplexity_factor)"
)


def _finish(sums, num_items, *rest):  # type: ignore[no-untyped-def]
    """`ranks` multiplies the gradient, because data parallelism averages it over them."""
    *spec_args, dtype, ranks = rest
    spec = LossSpec.of(*spec_args)
    s, m, *z = (part.clone() for part in sums.unbind())
    totals = reduction.finish(s, m, z[0] if z else None, spec, num_items, dtype)
    if ranks > 1:
        factors = (totals.loss_factor * ranks, totals.perplexity_factor * ranks)
        totals = totals._replace(loss_factor=factors[0], perplexity_factor=factors[1])
    return tuple(totals)


def _fake(sums, num_items, *rest):  # type: ignore[no-untyped-def]
    dtypes = (rest[-2],) * 2 + (sums.dtype,) * 3
    return tuple(sums.new_empty(sums.shape[1:], dtype=dtype) for dtype in dtypes)


LIBRARY.impl("finish", _finish, "CompositeExplicitAutograd")
torch.library.register_fake("fused_ppl::finish", _fake, lib=LIBRARY)
