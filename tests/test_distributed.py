# SPDX-License-Identifier: Apache-2.0
"""Losses over token groups: any ranks that share a batch get its loss and its gradient. Real processes over gloo."""

from __future__ import annotations

import dataclasses
from typing import Any

import distributed_cases as cases
import pytest
import torch
from pool import FSDP, Pool

from fused_ppl import Options, plan

SIZES = [1, 2, 3, 4]


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize("name", ["cross_entropy", "perplexity"])
@pytest.mark.parametrize("how", ["ddp", FSDP])
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_loss_and_the_gradient_of_the_batch(
    pool: Pool, size: int, how: str, name: str, fused: bool
) -> None:
    for kind in cases.BATCHES:
        for keywords in cases.OPTIONS.values():
            pool.run(size, cases.data_parallel, how, kind, name, fused, keywords)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("cross_entropy", {"z_loss": 0.01}),
        ("cross_entropy", {"num_items": 40}),
        ("cross_entropy", {"num_items": torch.tensor(40), "z_loss": 0.01, "label_smoothing": 0.1}),
        # M = 0 on every rank, and S is not
        (
            "cross_entropy",
            {"num_items": 40, "weight": cases.weight_of_other_classes("empty", 3), "label_smoothing": 0.1},
        ),
        ("perplexity", {"max_nll": 2.0}),
    ],
)
def test_other_options_are_those_of_the_batch(pool: Pool, name: str, keywords: dict[str, Any]) -> None:
    for fused in (False, True):
        pool.run(3, cases.data_parallel, "none", "empty", name, fused, keywords)


@pytest.mark.parametrize("name", ["cross_entropy", "perplexity"])
def test_the_plan_that_recomputes_gives_the_same(pool: Pool, name: str) -> None:
    """A budget of one byte leaves none but "vocab"; without one the plan is "rows"."""
    case = plan.LinearCase(23, cases.V, cases.D, 4, "cpu", (True, True, True))
    assert plan.linear_kind(case, False) == "rows"
    assert plan.linear_kind(dataclasses.replace(case, memory_budget=1), False) == "vocab"
    for kind in cases.BATCHES:
        pool.run(4, cases.data_parallel, "ddp", kind, name, True, {"options": Options(memory_budget=1)})


@pytest.mark.parametrize("kind", cases.BATCHES)
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
def test_statistics_beside_the_loss_of_the_batch(pool: Pool, fused: bool, kind: str) -> None:
    pool.run(3, cases.with_stats, kind, fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["none", "ddp", FSDP])
@pytest.mark.parametrize("size", SIZES)
def test_accumulated_micro_batches_have_the_gradient_of_the_window(
    pool: Pool, size: int, how: str, dtype: torch.dtype
) -> None:
    for fused, kind, items in ((False, "unequal", 1.0), (True, "empty", 20.0), (True, "all ignored", 1e4)):
        pool.run(size, cases.accumulated, how, kind, fused, dtype, items)


@pytest.mark.parametrize("size", SIZES)
def test_a_metric_is_summed_over_ranks(pool: Pool, size: int) -> None:
    pool.run(size, cases.metric)


def test_perplexity_without_a_group_warns_once_and_of_the_line_that_called(pool: Pool) -> None:
    for messages, files in pool.run(2, cases.warned):
        assert len(messages) == 1 and "each of which takes that of its own tokens" in messages[0]
        assert files == [cases.__file__]


def test_a_group_that_cannot_be_meant_is_refused_in_a_sentence(pool: Pool) -> None:
    pool.run(4, cases.refused)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
def test_one_graph_with_its_collective(pool: Pool, fused: bool) -> None:
    pool.run(2, cases.compiled, fused)
