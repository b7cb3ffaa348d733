# SPDX-License-Identifier: Apache-2.0
"""What goes over the network is what docs/distributed.md promises, to the byte."""

from __future__ import annotations

from typing import Any

import count_cases as cases
import pytest
from count_cases import D, N
from pool import Pool

NAMES = ["cross_entropy", "perplexity", "cross_entropy_with_stats"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_group_sums_s_and_m_once(pool: Pool, name: str, fused: bool, grad: bool) -> None:
    for forward, backward in pool.run(2, cases.losses, "group", {}, name, fused, grad):
        assert forward == [("all_reduce", "sum", 16)]
        assert backward == []


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
def test_z_loss_adds_one_number(pool: Pool, fused: bool) -> None:
    for forward, backward in pool.run(2, cases.losses, "group", {"z_loss": 0.1}, "cross_entropy", fused, True):
        assert forward == [("all_reduce", "sum", 24)]
        assert backward == []


CHECKS = 4  # numbers that say whether ranks mean the same


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize(
    ("name", "keywords", "maxima", "sums"),
    [
        ("perplexity", {}, 1, 2),
        ("cross_entropy", {"z_loss": 0.1}, 1, 2),
        ("cross_entropy", {"label_smoothing": 0.1}, 1, 3),
        ("cross_entropy", {"reduction": "none"}, 1, 2),
        ("cross_entropy_with_stats", {}, 2, 3),
        ("cross_entropy_with_stats", {"label_smoothing": 0.1}, 2, 4),
    ],
)
def test_shards_of_the_vocabulary_take_two_collectives_forward_and_one_backward(
    pool: Pool, name: str, keywords: dict[str, Any], maxima: int, sums: int, fused: bool, grad: bool
) -> None:
    if keywords.get("reduction"):
        grad = False
    for forward, backward in pool.run(2, cases.losses, "vocab_group", keywords, name, fused, grad):
        assert forward == [("all_reduce", "max", 8 * maxima * (N + CHECKS)), ("all_reduce", "sum", 8 * sums * N)]
        # logits have their gradient to themselves; hidden states are shared
        assert backward == ([("all_reduce", "sum", 4 * N * D)] if fused and grad else [])


def test_hidden_states_sharded_over_tokens_are_gathered_and_their_gradient_scattered(pool: Pool) -> None:
    for forward, backward in pool.run(2, cases.sharded_tokens):
        assert forward == {"all_gather_into_tensor": 1, "all_reduce": 2}
        assert backward == {"reduce_scatter_tensor": 1}


def test_an_accumulator_sends_nothing_before_its_end(pool: Pool) -> None:
    for before, at_the_end in pool.run(2, cases.accumulator):
        assert before == [] and at_the_end == [("all_reduce", "sum", 16)]
