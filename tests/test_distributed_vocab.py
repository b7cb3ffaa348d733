# SPDX-License-Identifier: Apache-2.0
"""Losses over shards of the vocabulary: the result and every gradient of one process that holds all classes."""

from __future__ import annotations

import pytest
import torch
import vocab_cases as cases
from pool import Pool


@pytest.mark.parametrize("name", cases.NAMES)
@pytest.mark.parametrize("how", ["sizes", "even", "dtensor", "tokens", "replicated"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_head_is_that_of_one_process(pool: Pool, size: int, how: str, name: str) -> None:
    for which in ("plain", "all"):
        pool.run(size, cases.head, how, name, which)


@pytest.mark.parametrize("name", cases.NAMES)
@pytest.mark.parametrize("how", ["sizes", "dtensor"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_logits_are_those_of_one_process(pool: Pool, size: int, how: str, name: str) -> None:
    for which in ("plain", "all"):
        pool.run(size, cases.logits, how, name, which)


@pytest.mark.parametrize("which", ["weight", "token_weight", "label_smoothing", "logit_scale", "softcap", "z_loss"])
def test_each_option_alone(pool: Pool, which: str) -> None:
    pool.run(3, cases.head, "sizes", "cross_entropy", which)
    pool.run(3, cases.logits, "sizes", "cross_entropy", which)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(pool: Pool, dtype: torch.dtype) -> None:
    for name in ("cross_entropy", "perplexity"):
        pool.run(3, cases.head, "sizes", name, "all", "mean", dtype)
        pool.run(3, cases.logits, "sizes", name, "all", "mean", dtype)


@pytest.mark.parametrize("reduction", ["sum", "none", "sequence"])
def test_other_reductions(pool: Pool, reduction: str) -> None:
    for name in ("cross_entropy", "cross_entropy_with_stats"):
        pool.run(2, cases.head, "sizes", name, "all", reduction)
        pool.run(2, cases.logits, "sizes", name, "all", reduction)


def test_the_gradient_may_take_the_place_of_the_logits(pool: Pool) -> None:
    pool.run(3, cases.logits, "sizes", "perplexity", "all", "mean", torch.float32, "torch", True)


TOKEN_VALUES = ("log_prob", "entropy", "lse")
TOKEN_KEYWORDS = [{}, {"softcap": 5.0, "logit_scale": 0.7}]


@pytest.mark.parametrize("how", ["logits", "head", "dtensor"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_token_values_are_those_of_one_process(pool: Pool, size: int, how: str) -> None:
    for keywords in TOKEN_KEYWORDS:
        pool.run(size, cases.token_values, how, keywords)


@pytest.mark.parametrize("name", TOKEN_VALUES)
@pytest.mark.parametrize("how", ["logits", "head"])
def test_each_token_value_alone_has_its_gradient(pool: Pool, how: str, name: str) -> None:
    for size in (2, 3):
        pool.run(size, cases.token_values, how, {}, (name,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_token_values_of_other_dtypes(pool: Pool, dtype: torch.dtype) -> None:
    for how in ("logits", "head"):
        pool.run(3, cases.token_values, how, {"softcap": 5.0}, TOKEN_VALUES, dtype)
