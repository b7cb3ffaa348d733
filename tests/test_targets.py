# SPDX-License-Identifier: Apache-2.0
"""Targets for next-token prediction, against a loop over documents."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fused_ppl import next_token_targets, perplexity
from fused_ppl.testing import make_logits


def by_loop(tokens: list[int], steps: int, boundaries: list[int], ignore: int) -> list[int]:
    targets = []
    for begin, end in itertools.pairwise(boundaries):
        targets += [tokens[t + steps] if t + steps < end else ignore for t in range(begin, end)]
    return targets


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 11])
@pytest.mark.parametrize("boundaries", [[0, 10], [0, 3, 10], [0, 1, 2, 9, 10], [0, 0, 4, 4, 10, 10]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_each_position_predicts_inside_its_document(dtype, boundaries, steps):
    tokens = torch.arange(100, 110, dtype=dtype)
    for cu_dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor(boundaries, dtype=cu_dtype)
        got = next_token_targets(tokens, steps=steps, cu_seqlens=cu_seqlens)
        assert got.tolist() == by_loop(tokens.tolist(), steps, boundaries, -100)
        assert got.dtype == dtype
    assert next_token_targets(tokens[None], steps=steps, cu_seqlens=cu_seqlens).tolist() == [got.tolist()]


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (3, 1), (3, 0), (0, 7)], ids=str)
def test_every_row_is_shifted_by_itself(shape):
    tokens = torch.arange(torch.Size(shape).numel()).view(shape)
    got = next_token_targets(tokens, ignore_index=-1)
    assert got.shape == tokens.shape
    rows = math.prod(shape[:-1])
    for row, expected in zip(got.reshape(rows, shape[-1]), tokens.reshape(rows, shape[-1]), strict=True):
        assert row.tolist() == by_loop(expected.tolist(), 1, [0, shape[-1]], -1)


def test_tokens_are_not_changed():
    tokens = torch.arange(6)
    got = next_token_targets(tokens, cu_seqlens=torch.tensor([0, 3, 6]))
    assert tokens.tolist() == list(range(6))
    assert got.untyped_storage().data_ptr() != tokens.untyped_storage().data_ptr()


def test_padding_stays_ignored():
    tokens = torch.tensor([5, 6, -100, -100])
    assert next_token_targets(tokens).tolist() == [6, -100, -100, -100]


def test_views_of_tokens():
    tokens = torch.arange(24).view(6, 4).T
    assert torch.equal(next_token_targets(tokens), next_token_targets(tokens.contiguous()))


def test_shifted_targets_give_the_loss_of_sliced_logits():
    tokens, logits = torch.randint(11, (2, 6)), make_logits((2, 6, 11))
    sliced = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp()
    torch.testing.assert_close(perplexity(logits, next_token_targets(tokens), class_dim=-1), sliced)
