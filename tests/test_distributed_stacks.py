# SPDX-License-Identifier: Apache-2.0
"""The losses in the stacks that people train with: FSDP2, data times tensor parallel, context parallel, compile."""

from __future__ import annotations

import pytest
import stack_cases as cases
from pool import FSDP_OVER_SHARDS, NEEDS_FSDP2, NEEDS_UNEVEN_FSDP, Pool


@NEEDS_FSDP2
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [2, 4])
def test_a_loss_inside_forward_is_right_in_every_layout_of_fsdp(pool: Pool, size: int, layout: object) -> None:
    pool.run(size, cases.fsdp, layout)


@NEEDS_FSDP2
@pytest.mark.parametrize("how", ["method", "unshard"])
def test_a_loss_outside_of_forward(pool: Pool, how: str) -> None:
    pool.run(2, cases.fsdp_outside_forward, how)


def test_a_weight_that_fsdp_has_sharded_is_not_taken_for_a_shard_of_the_vocabulary(pool: Pool) -> None:
    pool.run(2, cases.fsdp_weight_read_outside)


@pytest.mark.parametrize("kind", ["unequal", "all ignored", "empty"])
@pytest.mark.parametrize("wrapper", ["none", FSDP_OVER_SHARDS])
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize("name", ["cross_entropy", "perplexity"])
def test_data_times_tensor_parallel(pool: Pool, name: str, fused: bool, wrapper: str, kind: str) -> None:
    pool.run(4, cases.two_dimensions, name, fused, wrapper, kind)


def test_other_placements_are_refused_in_a_sentence(pool: Pool) -> None:
    pool.run(2, cases.refused_placements)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed documents"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_token_is_lost_between_context_shards(pool: Pool, size: int, packed: bool) -> None:
    pool.run(size, cases.context_parallel, packed)


@pytest.mark.parametrize("how", ["logits", "head", "dtensor"])
def test_one_graph_with_shards_of_the_vocabulary(pool: Pool, how: str) -> None:
    pool.run(2, cases.compiled, how)


def test_a_copy_of_a_module_trains_in_the_same_group(pool: Pool) -> None:
    pool.run(2, cases.copied)


@NEEDS_FSDP2
@NEEDS_UNEVEN_FSDP
def test_micro_batches_over_data_ranks_and_shards(pool: Pool) -> None:
    pool.run(4, cases.accumulated_over_shards)
