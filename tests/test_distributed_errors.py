# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not mean the same loss: an error that names the rank under FUSED_PPL_DEBUG=1, never another number."""

from __future__ import annotations

import distributed_cases as cases
import pytest
from pool import Pool

PATIENCE = 10.0  # seconds, of the groups that break


def run(pool: Pool, what: str, vocab: bool, **environment: str) -> list[tuple[str, str, float]]:
    pool.run(4, cases.make_fragile, 3, PATIENCE)
    return pool.run(3, cases.mismatched, what, vocab, **environment)


@pytest.mark.parametrize(
    ("what", "vocab", "sentence"),
    [
        ("V", False, "the same number of classes, 10; rank 2 has 12."),
        ("V", True, "the same number of classes, 30; rank 2 has 36."),
        ("dtype", False, "the same dtype, torch.float32; rank 2 has torch.float64."),
        ("dtype", True, "the same dtype, torch.float32; rank 2 has torch.float64."),
        ("options", False, "rank 2 has LossSpec(reduction='mean', ignore_index=-100, label_smoothing=0.1"),
        ("class weights", True, "the same choice of class weights, left out; rank 2 has given."),
        ("tokens", True, "the same shape of target, (4,); rank 2 has (3,)."),
    ],
)
def test_debug_names_the_rank_and_the_mismatch_before_the_first_collective(
    pool: Pool, what: str, vocab: bool, sentence: str
) -> None:
    for kind, message, seconds in run(pool, what, vocab, FUSED_PPL_DEBUG="1"):
        assert kind == "ValueError" and sentence in message and seconds < PATIENCE


def test_debug_names_the_rank_that_does_not_call(pool: Pool) -> None:
    *there, _ = run(pool, "call", False, FUSED_PPL_DEBUG="1")
    for kind, message, seconds in there:
        assert kind == "RuntimeError" and "got no call of rank 2 of 3" in message
        assert PATIENCE - 1 < seconds < 3 * PATIENCE


def test_without_debug_the_timeout_of_the_group_ends_it(pool: Pool) -> None:
    *there, _ = run(pool, "call", False)
    for kind, message, seconds in there:
        assert kind in ("RuntimeError", "DistBackendError") and message, message
        assert seconds < 3 * PATIENCE


@pytest.mark.parametrize(
    ("what", "sentence"),
    [("V", "must mean the same shards of the vocabulary"), ("targets", "must be given the same targets; they are not")],
)
def test_other_shards_and_other_targets_are_seen_without_debug(pool: Pool, what: str, sentence: str) -> None:
    """By numbers that ride along in the first collective."""
    for kind, message, _ in run(pool, what, True):
        assert kind == "ValueError" and sentence in message


def test_ranks_that_agree_pass(pool: Pool) -> None:
    pool.run(3, cases.agree_in_debug, FUSED_PPL_DEBUG="1")
