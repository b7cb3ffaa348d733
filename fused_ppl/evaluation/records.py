# SPDX-License-Identifier: Apache-2.0
"""What the parts of an evaluation hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BOS = ("auto", "yes", "no")
BLOCK = 64  # tokens of a block of the bootstrap


class EvaluationError(ValueError):
    """An evaluation cannot go on. The message says what is wrong, and what to do."""


class Document(NamedTuple):
    """A text that is scored by itself: no window crosses its end."""

    name: str
    text: str
    domain: str
    replaced: int = 0  # invalid bytes that became U+FFFD


class Tokens(NamedTuple):
    """The tokens of a text, and which of its bytes each one stands for."""

    ids: NDArray[np.int64]  # (T,)
    num_bytes: NDArray[np.int32]  # (T,), whose sum is the number of bytes of the text; 0 of a special token
    starts: NDArray[np.int64]  # (T,): the first character of each token
    warning: str = ""  # what the tokenizer loses of the text

    def first(self, count: int) -> Tokens:
        return Tokens(self.ids[:count], self.num_bytes[:count], self.starts[:count], self.warning)

    def after(self, bos: int) -> Tokens:
        """These tokens after a BOS, which stands for no byte."""
        zero = np.zeros(1, dtype=np.int64)
        return Tokens(
            np.concatenate((zero + bos, self.ids)),
            np.concatenate((zero.astype(np.int32), self.num_bytes)),
            np.concatenate((zero, self.starts)),
            self.warning,
        )


class Window(NamedTuple):
    """One forward of the model over tokens[start:stop]; the last of them is only a target.

    Tokens [first, stop) are scored.
    """

    start: int
    stop: int
    first: int
    bos: str = ""  # "before": one more input at the beginning; "over": in the place of the first input


@dataclass(frozen=True)
class Settings:
    """Everything of an evaluation that can change its number."""

    convention: str = "strided"
    ctx: int = 512  # the most tokens that the model is given at once
    stride: int = 256  # tokens scored in a window, where windows overlap
    bos: bool = False  # whether the model is given a BOS
    max_tokens: int | None = None  # of each document

    @property
    def bos_word(self) -> str:
        return "BOS" if self.bos else "no BOS"


@dataclass
class Score:
    """Sums over scored tokens."""

    nll: float = 0.0  # nats
    tokens: int = 0  # scored
    num_bytes: int = 0  # of the scored tokens
    mean_nll: float = 0.0  # nats, what the convention averages; as `nll` unless it weighs windows
    mean_tokens: int = 0
    total_tokens: int = 0  # of the texts, scored or not
    total_bytes: int = 0
    words: int = 0
    characters: int = 0
    documents: int = 0

    def add(self, other: Score) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Blocks:
    """Sums over blocks of consecutive scored tokens, for intervals that know that neighbours are alike."""

    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)

    def add(self, nll: NDArray[np.float64], num_bytes: NDArray[np.int32]) -> None:
        """Add the tokens of one document, in order. Its last block may be short."""
        for i in range(0, len(nll), BLOCK):
            part = slice(i, i + BLOCK)
            self.nll.append(float(nll[part].sum()))
            self.tokens.append(len(nll[part]))
            self.num_bytes.append(int(num_bytes[part].sum()))


@dataclass
class Group:
    """The sums of one domain, or of all."""

    score: Score = field(default_factory=Score)
    blocks: Blocks = field(default_factory=Blocks)

    def add(self, other: Group) -> None:
        self.score.add(other.score)
        for name, values in vars(other.blocks).items():
            getattr(self.blocks, name).extend(values)


class TokenRow(NamedTuple):
    """One scored token, as it is handed to `per_token`."""

    document: str
    position: int  # in the document
    start: int  # its first character
    id: int
    num_bytes: int
    nll: float  # nats
    entropy: float  # nats, of the prediction
    predicted: int  # the most likely token
    rank: int | None = None  # of the token in the prediction, from 1; None unless alternatives were asked for
    alternatives: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their probabilities
