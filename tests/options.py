# SPDX-License-Identifier: Apache-2.0
"""The one table of the options of a loss, from which the tests take what they run.

A row is an option: its keyword, its default, and the values that tests give it. Which functions take it, their
signatures say. A value is a number, or a function that makes a tensor for a batch. A new option needs its row here, and
the suites that run every option alone, all together, in pairs and compiled then run it as well.
tests/test_options.py fails while a keyword has no row.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fused_ppl


@dataclass(frozen=True)
class Batch:
    """What a tensor of an option is made for."""

    num_classes: int
    target: Tensor
    generator: torch.Generator  # of this value alone: no order of tests changes its numbers

    def positive(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator, device="cpu") + 0.5

    def quarters(self, shape: tuple[int, ...]) -> Tensor:
        """Of any sign, and exact in every dtype, so that a sum of them is 0 in each or in none."""
        return torch.randint(-4, 5, shape, generator=self.generator, device="cpu") / 4

    @property
    def classes(self) -> tuple[int, ...]:
        return (self.num_classes,)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self.target.shape)

    def repeated(self, *values: float) -> Tensor:
        """These weights of tokens over and over."""
        number = self.target.numel()
        return torch.tensor(values, device="cpu").repeat(-(-number // len(values)))[:number].view(self.tokens)


Make = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Value:
    """One value of an option."""

    name: str
    value: Any  # or a `Make`
    alone: bool = True  # False: sums of it may cancel, and the tolerance of a single loss does not hold then
    pairs: bool = True  # False: test_combinations.py leaves it out, because a pair would show nothing more


@dataclass(frozen=True)
class Option:
    keyword: str
    default: Any
    values: tuple[Value, ...]  # the first one stands for the option where a test has room for one value
    reductions: tuple[str, ...] = ("mean", "sum", "none", "sequence")  # that it can be asked for with


OPTIONS = (
    Option(
        "weight",
        None,
        (
            Value("weight", lambda b: b.positive(b.classes)),
            Value("weight with zeros", lambda b: b.positive(b.classes) * every_third_zero(b), pairs=False),
            Value("weight in bf16", lambda b: b.positive(b.classes).bfloat16(), pairs=False),
            Value("weight signed", lambda b: b.quarters(b.classes), alone=False),
            Value("weight zero", lambda b: torch.zeros(b.classes, device="cpu"), alone=False),
            Value("weight zero at targets", lambda b: zero_at_targets(b), alone=False),
        ),
    ),
    Option(
        "token_weight",
        None,
        (
            Value("token_weight", lambda b: b.positive(b.tokens)),
            Value("token_weight with zeros", lambda b: b.repeated(0.0, 1.0, 0.0, 2.0, 1.0, 0.0)),
            Value("token_weight in fp16", lambda b: b.positive(b.tokens).half(), pairs=False),
            Value("token_weight partly negative", lambda b: b.repeated(-1.0, 0.4, 0.7, 2.0, 1.3), pairs=False),
            Value("token_weight signed", lambda b: b.quarters(b.tokens), alone=False),
            # adds up to 0, also where the second and third of six tokens are ignored
            Value("token_weight that cancels", lambda b: b.repeated(1.0, 1.0, -1.0, -1.0, 0.5, -0.5), alone=False),
            Value("token_weight zero", lambda b: torch.zeros(b.tokens, device="cpu"), alone=False),
        ),
    ),
    Option("label_smoothing", 0.0, (Value("label_smoothing", 0.1), Value("label_smoothing 1", 1))),
    Option("logit_scale", 1.0, (Value("logit_scale", 0.5), Value("logit_scale of an integer", 2, pairs=False))),
    Option("softcap", None, (Value("softcap", 3.0), Value("softcap of an integer", 30, pairs=False))),
    Option("z_loss", 0.0, (Value("z_loss", 0.01),)),
    Option("max_nll", None, (Value("max_nll", 1.0), Value("max_nll not reached", 50.0, pairs=False))),
    Option(
        "num_items",
        None,
        (Value("num_items", 5), Value("num_items as a tensor", lambda b: torch.tensor(5))),
        reductions=("mean",),
    ),
)
ROW = {option.keyword: option for option in OPTIONS}
VALUE = {value.name: (option, value) for option in OPTIONS for value in option.values}


def every_third_zero(batch: Batch) -> Tensor:
    return torch.arange(batch.num_classes, device="cpu") % 3 > 0


def zero_at_targets(batch: Batch) -> Tensor:
    """1 of each class that is no target."""
    targets = batch.target.flatten().long().cpu()
    return torch.ones(batch.classes, device="cpu").index_fill(0, targets[targets >= 0], 0.0)


def takes(loss: Callable[..., object], option: Option) -> bool:
    return option.keyword in inspect.signature(loss).parameters


def alone(loss: Callable[..., object]) -> Iterator[str]:
    """The name of every value that is tested by itself, of the options that this loss takes."""
    yield from (value.name for o in OPTIONS if takes(loss, o) for value in o.values if value.alone)


def one_each(loss: Callable[..., object]) -> list[str]:
    """The name of one value of each option that this loss takes."""
    return [option.values[0].name for option in OPTIONS if takes(loss, option)]


def together(loss: Callable[..., object]) -> list[str]:
    """`one_each` of the options that go with every reduction."""
    return [name for name in one_each(loss) if len(VALUE[name][0].reductions) == 4]


def in_pairs(keyword: str) -> list[str]:
    return [value.name for value in ROW[keyword].values if value.pairs]


def numbers(loss: Callable[..., object]) -> dict[str, Any]:
    """All options together that are numbers: those of a `LossSpec`."""
    return {o.keyword: v.value for o, v in map(VALUE.__getitem__, together(loss)) if not callable(v.value)}


def keywords(names: list[str], num_classes: int, target: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """The keywords that these values are, with their tensors for this batch."""
    return {VALUE[name][0].keyword: value_of(name, num_classes, target, seed) for name in names}


def value_of(name: str, num_classes: int, target: Tensor, seed: int = 0) -> Any:
    """One value; where it is a tensor, its numbers depend on its name, the sizes and the seed alone."""
    value = VALUE[name][1].value
    if not callable(value):
        return value
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return value(Batch(num_classes, target, generator)).to(target.device)


FUNCTIONS = (
    fused_ppl.cross_entropy,
    fused_ppl.perplexity,
    fused_ppl.cross_entropy_with_stats,
    fused_ppl.linear_cross_entropy,
    fused_ppl.linear_perplexity,
    fused_ppl.linear_cross_entropy_with_stats,
)
