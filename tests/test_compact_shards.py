# SPDX-License-Identifier: Apache-2.0
"""The compact fused head over shards of the vocabulary: each rank keeps columns of its own, and the whole is held to a
dense float64 construction of that."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compact_cases import (  # noqa: F401
    OPTIONS,
    ROWS,
    N,
    V,
    dense,
    expand,
    gradients,
    make,
    named,
    of_a_compiled_shard,
    of_a_shard,
    of_an_idle_shard,
    of_mixed_plans,
    small_groups,
)
from pool import Pool, WorkerError
from torch.testing import assert_close

from fused_ppl import Options, linear_cross_entropy, plan
from fused_ppl.engines.linear_compact import linear_compact_shard
from fused_ppl.engines.ops import flatten
from fused_ppl.records import Compact, HeadExecution, HeadInputs, Normalizers, Shard
from fused_ppl.spec import LossSpec

SIZES = {2: (150, 60), 3: (90, 1, 119)}


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("ranks", SIZES)
def test_each_rank_approximates_its_own_columns(pool: Pool, ranks: int, which: str) -> None:
    sizes, count = SIZES[ranks], 40
    tensors, target = make()
    truth, residuals = dense(tensors, target, expand(OPTIONS[which]), N, count, sizes)
    parts = pool.run(ranks, of_a_shard, sizes, which, Options(backend="torch", gradient_columns=count))
    exact, _ = gradients(linear_cross_entropy, tensors, target, reduction="sum", **expand(OPTIONS[which]))
    made = [parts[0][1][0], *(torch.cat([grads[i] for _, grads, _ in parts]) for i in (1, 2))]
    for mine, true in zip(made, truth, strict=True):
        assert_close(mine.double(), true, rtol=1e-4, atol=2e-6 * true.abs().max().item() + 1e-6)
    for (loss, grads, said), true in zip(parts, residuals, strict=True):
        assert_close(loss, exact, rtol=1e-6, atol=0)
        assert torch.equal(grads[0], made[0])  # the same sum on all ranks
        if "z_loss" not in OPTIONS[which]:  # of which `of_a_shard` takes no statistics
            assert true * (1 - 1e-4) <= said.item() <= 1.5 * true + 1e-6


def test_a_tolerance_that_no_columns_meet_runs_exact(pool: Pool) -> None:
    tensors, target = make()
    _, true = gradients(linear_cross_entropy, tensors, target, reduction="sum")
    for _, grads, said in (parts := pool.run(2, of_a_shard, SIZES[2], "plain", Options(gradient_tolerance=1e-7))):
        assert_close(grads[0], true[0], rtol=1e-5, atol=1e-5)
        assert said.item() == 0
    assert_close(torch.cat([grads[1] for _, grads, _ in parts]), true[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["budget", "options"])
def test_ranks_may_come_to_different_plans(pool: Pool, which: str) -> None:
    """A budget is more for a small shard than for a large one."""
    sizes, compact = (180, 30), Options(backend="torch", gradient_columns=0.999)
    small = dataclasses.replace(compact, memory_budget=50_000)
    per_rank = (small, small) if which == "budget" else (compact, Options(backend="torch"))
    asked = plan.Compact(None, 0.999, None)
    cases = (plan.LinearCase(N, v, 12, 4, "cpu", (True,) * 3, small.memory_budget, asked) for v in sizes)
    kinds = {plan.linear_kind(case, False) for case in cases}
    assert kinds == {"compact", "vocab"}
    tensors, target = make()
    _, true = gradients(linear_cross_entropy, tensors, target)
    for grads in pool.run(2, of_mixed_plans, sizes, per_rank):
        assert_close(grads[0], true[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("why", ["masked", "confident", "nan", "weightless"])
def test_a_shard_may_have_nothing_to_keep(pool: Pool, why: str) -> None:
    for loss, grads in pool.run(2, of_an_idle_shard, (150, 60), why):
        assert grads[0].shape == (N, 12)
        assert loss.isfinite() == (why in ("masked", "confident"))
        assert why == "nan" or bool(grads[0].isfinite().all())


def test_it_compiles(pool: Pool) -> None:
    pool.run(2, of_a_compiled_shard, SIZES[2])


def test_a_screen_is_refused(pool: Pool) -> None:
    with pytest.raises(WorkerError, match=r"in full precision; .* Leave it out"):
        pool.run(2, of_a_shard, SIZES[2], "plain", Options(gradient_columns=40, screen="int8"))


@named
@pytest.mark.parametrize("count", [5, 40])
def test_a_shard_of_each_backend(keywords, count, backend, fits, monkeypatch):
    """The op of a rank by itself, told what all ranks know."""
    fits(N, V)
    monkeypatch.setattr(plan, "whole_chunks", lambda group, *shape: ROWS)  # they depend on the size of the shard
    sizes, keywords = (90, 1, 119), expand(keywords)
    (hidden, weight, bias), target = make()
    truth, residuals = dense([hidden, weight, bias], target, keywords, ROWS, count, sizes)
    numbers = {k: v for k, v in keywords.items() if not isinstance(v, torch.Tensor)}
    spec = LossSpec(**numbers)
    z = hidden.double() @ weight.double().T + bias
    z = z * spec.logit_scale if spec.softcap is None else spec.softcap * torch.tanh(z * spec.logit_scale / spec.softcap)
    lse = z.logsumexp(1)
    nll = (lse - z.gather(1, target.clamp(0).unsqueeze(1)).squeeze(1)).float()
    made, first = [], 0
    for size in sizes:
        shard = slice(first, first + size)
        tokens = (target, keywords.get("weight"), keywords.get("token_weight"))
        inputs = HeadInputs(hidden, weight[shard], bias[shard], *tokens, None)
        how = (HeadExecution(backend, None, torch.float32, (True,) * 3), Compact(None, float(count), None))
        known = {"normalizers": Normalizers(lse, nll), "shard": Shard(first, V)}
        made.append(flatten(linear_compact_shard(inputs, spec, *how, **known)))
        first += size
    dh, *others = zip(*made, strict=True)
    for mine, true in zip((sum(dh), *(torch.cat(o) for o in others[:2])), truth, strict=True):
        assert_close(mine.double(), true, rtol=1e-4, atol=2e-6 * true.abs().max().item() + 1e-6)
    for said, true in zip(others[2], residuals, strict=True):
        assert true * (1 - 1e-4) <= said.item() <= 1.5 * true + 1e-6
