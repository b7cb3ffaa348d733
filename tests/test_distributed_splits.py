# SPDX-License-Identifier: Apache-2.0
"""Any split of the same tokens into micro-batches, ranks and shards of the vocabulary gives the same loss and gradient.

Most ranks are played by one process, op by op; some splits go through real ones.
"""

from __future__ import annotations

import itertools

import distributed_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import Pool
from torch.testing import assert_close

import fused_ppl
from fused_ppl.backends import shards as of_ranks
from fused_ppl.engines.finish import finish
from fused_ppl.engines.logits import Saved
from fused_ppl.engines.vocab_shards import shard_logits, shard_logits_backward, shard_merge, shard_sums
from fused_ppl.records import Execution, LogitsInputs, Shard, TokenInputs, Upstream
from fused_ppl.spec import LossSpec
from fused_ppl.testing import KINDS, make_logits, make_target

N, V = 10, 23


def cuts(total: int, most: int = 4, *, empty: bool = True) -> st.SearchStrategy[list[int]]:
    """Bounds of parts; some hold nothing, unless every rank must have a class."""
    inside = st.lists(st.integers(0 if empty else 1, total if empty else total - 1), max_size=most, unique=not empty)
    return inside.map(lambda c: [0, *sorted(c), total])


def played(x, y, rows, columns, spec, backend, **tensors):
    """(loss, perplexity, predicted, gradient of x) of ranks that hold `columns` of `rows` each."""
    weight, token_weight = tensors.get("weight"), tensors.get("token_weight")
    execution, layout = Execution(backend, None), 77
    sums, kept = 0, []
    for a, b in itertools.pairwise(rows):
        u = None if token_weight is None else token_weight[a:b]
        tokens = TokenInputs(y[a:b], weight, u)
        parts = [
            shard_logits(LogitsInputs(x[a:b, c:d], *tokens, None), spec, execution, shard=Shard(c, V), layout=layout)
            for c, d in itertools.pairwise(columns)
        ]
        maxima = torch.stack([part.maxima for part in parts]).amax(0)
        added = sum(shard_sums(part._replace(maxima=maxima), spec) for part in parts)
        merged = shard_merge(maxima, added, tokens, spec, num_classes=V, dtype=torch.float32)
        sums = sums + merged.sums
        kept.append((a, b, tokens, merged))
    loss, ppl, _, *factors = finish(sums, None, spec, dtype=torch.float32, ranks=1)
    gradient, upstream = torch.full_like(x, torch.nan), Upstream(*factors, torch.ones(()), torch.ones(()))
    for a, b, tokens, merged in kept:
        for c, d in itertools.pairwise(columns):
            saved = Saved(x[a:b, c:d].contiguous(), *tokens, merged.lse, merged.nll)
            gradient[a:b, c:d] = shard_logits_backward(saved, upstream, spec, execution, shard=Shard(c, V))
    return loss, ppl, torch.cat([merged.predicted for *_, merged in kept]), gradient


@settings(max_examples=60)
@given(cuts(N), cuts(V, empty=False), st.integers(0, 2**16), st.sampled_from(KINDS), st.booleans(), st.data())
def test_any_rows_and_any_columns(backend, rows, columns, seed, kind, options, data):
    x = make_logits((N, V), kind=kind, seed=seed)
    y = make_target((N,), V, ignored=data.draw(st.sampled_from([0.0, 0.3, 1.0])), seed=seed)
    tensors, keywords = {}, {}
    if kind == "wild" and options:
        x[x == -torch.inf] = -1e4  # a target of no mass is an infinite loss, and smoothing is infinite with any
    if options:
        tensors = {"weight": torch.linspace(0.5, 2, V), "token_weight": torch.linspace(2, 0.5, N)}
        keywords = {"label_smoothing": 0.1, "softcap": 9.0, "z_loss": 1e-3}
    spec = LossSpec(max_nll=5.0, stats=True, **keywords)
    loss, ppl, predicted, gradient = played(x, y, rows, columns, spec, backend, **tensors)
    leaf = x.clone().requires_grad_()
    want = fused_ppl.cross_entropy_with_stats(
        leaf, y, max_nll=5.0, options=fused_ppl.Options("torch"), **tensors, **keywords
    )
    assert_close(loss, want.loss.detach(), rtol=2e-6, atol=1e-6, equal_nan=True)
    assert_close(ppl, want.perplexity.detach(), rtol=1e-5, atol=0, equal_nan=True)
    assert torch.equal(predicted, want.predicted)
    (want.loss + want.perplexity).backward()
    assert_close(gradient, leaf.grad, rtol=1e-4, atol=2e-6 * float(leaf.grad.nan_to_num().norm()), equal_nan=True)


@settings(max_examples=12)
@given(st.integers(1, 4), st.data())
def test_real_ranks_with_any_micro_batches(pool: Pool, size: int, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 24), min_size=size - 1, max_size=size - 1).map(sorted))
    windows = [data.draw(st.lists(st.integers(0, 24), max_size=3)) for _ in range(size)]
    pool.run(size, cases.any_split, [0, *tokens, 24], windows, data.draw(st.booleans()))


@pytest.mark.parametrize("values", [[3.0, -2.5], [-0.0, 0.0], [-1e30, -torch.inf], [7.0, torch.inf], [-1e-3, 1e-30]])
def test_a_value_and_its_column_in_one_number_keep_their_order(values):
    """The larger value wins, and among equal ones the lower column."""
    columns = torch.tensor([0, 1, 5, 200_000, 2**29 - 1])
    packed = [of_ranks._pack(torch.full((5,), v, dtype=torch.float64), columns) for v in values]
    for p in packed:
        assert (p.diff() < 0).all() and torch.equal(of_ranks._unpack(p), columns)
    if values[0] < values[1] and values[1] - values[0] > 1e-9:
        assert packed[0].max() < packed[1].min()
    if values == [-0.0, 0.0]:
        assert torch.equal(*packed)
