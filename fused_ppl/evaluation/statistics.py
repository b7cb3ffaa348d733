# SPDX-License-Identifier: Apache-2.0
"""What the sums of an evaluation say: perplexity, bits, and intervals.

Intervals are 95 % percentiles of a bootstrap over blocks of 64 neighbouring tokens, because the nll of neighbours is
correlated: an error bar that takes tokens as independent is too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fused_ppl.evaluation.records import Blocks, Group

RESAMPLES, MOST_BLOCKS = 1000, 2000
LN2 = math.log(2)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """The numbers of one domain, or of all texts together."""

    name: str
    perplexity: float  # 2^(bits per token)
    perplexity_interval: Interval | None  # None where there are less than two blocks
    nll: float  # nats a token
    bits_per_token: float
    bits_per_byte: float
    bits_per_byte_interval: Interval | None
    byte_perplexity: float
    word_perplexity: float | None  # None unless every token is scored, or all but the first
    tokens: int  # scored
    total_tokens: int
    num_bytes: int  # of the scored tokens
    total_bytes: int
    words: int
    characters: int
    documents: int


def row(name: str, group: Group, *, intervals: bool = True) -> Row:
    """The numbers of a group. NaN where no token is scored."""
    s = group.score
    mean = s.mean_nll / s.mean_tokens if s.mean_tokens else math.nan
    per_byte = s.nll / LN2 / s.num_bytes if s.num_bytes else math.nan
    of_tokens = bootstrap(group.blocks, group.blocks.tokens) if intervals else None
    of_bytes = bootstrap(group.blocks, group.blocks.num_bytes) if intervals else None
    all_scored = s.tokens >= s.total_tokens - s.documents
    return Row(
        name=name,
        perplexity=power_of_2(mean / LN2),
        perplexity_interval=of_tokens and (power_of_2(of_tokens[0]), power_of_2(of_tokens[1])),
        nll=mean,
        bits_per_token=mean / LN2,
        bits_per_byte=per_byte,
        bits_per_byte_interval=of_bytes,
        byte_perplexity=power_of_2(per_byte),
        word_perplexity=power_of_2(s.nll / LN2 / s.words) if all_scored and s.words else None,
        tokens=s.tokens,
        total_tokens=s.total_tokens,
        num_bytes=s.num_bytes,
        total_bytes=s.total_bytes,
        words=s.words,
        characters=s.characters,
        documents=s.documents,
    )


def power_of_2(bits: float) -> float:
    """2^bits, and inf where float64 has no such number."""
    return math.inf if bits >= 1024 else 2.0**bits


def bootstrap(blocks: Blocks, of: Sequence[int]) -> Interval | None:
    """The 95 % interval of sum(nll) / sum(of), in bits."""
    return bootstrap_ratio(np.asarray(blocks.nll) / LN2, np.asarray(of, dtype=np.float64))


def bootstrap_ratio(values: NDArray[np.float64], sizes: NDArray[np.float64]) -> Interval | None:
    """The 95 % interval of sum(values) / sum(sizes) over blocks that are drawn again; None if there is only one."""
    drawn = drawn_again([values, sizes]) if sizes.sum() else None
    return None if drawn is None else interval_of(ratio(*drawn))


def drawn_again(columns: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]] | None:
    """(RESAMPLES,) of each column: its sum over blocks drawn with replacement, the same ones for all columns.

    So an interval of a difference of two columns is paired. None if there is only one block.
    """
    count = len(columns[0])
    if count < 2:
        return None
    if count > MOST_BLOCKS:  # longer blocks
        starts = np.linspace(0, count, MOST_BLOCKS, endpoint=False).astype(np.int64)
        columns, count = [np.add.reduceat(column, starts) for column in columns], MOST_BLOCKS
    generator = np.random.default_rng(0)
    chosen = np.stack([generator.integers(count, size=count) for _ in range(RESAMPLES)])
    return [column[chosen].sum(1) for column in columns]


def ratio(values: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where the size is 0."""
    found: NDArray[np.float64] = np.divide(values, sizes, out=np.full(values.shape, math.nan), where=sizes != 0)
    return found


def interval_of(values: NDArray[np.float64]) -> Interval:
    """The middle 95 %."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
