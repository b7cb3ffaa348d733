# SPDX-License-Identifier: Apache-2.0
"""What bench/same_bits.py computes in each checkout: every option alone and in pairs, over dtypes, plans and backends.

This file uses public names only, so that checkouts whose private names differ can run it. It is a program of its own:
the parent starts it with one checkout on PYTHONPATH, and it saves every result to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_ppl
from fused_ppl import LossOutput, Options

B, T, V, D = 3, 4, 53, 8  # sequences, tokens of each, classes, width: small enough for Triton's interpreter
LARGE = (3, 700, 400, 16)  # several chunks and several groups of rows

# the values of each option beside its default; a value names the tensor that `keyword` makes
VALUES: dict[str, tuple[object, ...]] = {
    "reduction": ("sum", "none", "sequence"),
    "ignore_index": (None, 3),
    "label_smoothing": (0.1, 1.0),
    "logit_scale": (0.3,),
    "softcap": (4.0,),
    "z_loss": (0.01,),
    "max_nll": (1.5,),
    "num_items": (5, "tensor"),
    "weight": ("positive", "bf16", "signed", "some zero"),
    "token_weight": ("positive", "signed", "cancel", "zero"),
    "linear_bias": ("normal",),
    "class_dim": (1,),
    # what is no keyword
    "inputs": ("none ignored", "all ignored", "far", "extreme", "empty"),
    "function": ("cross_entropy", "perplexity"),
    "requires_grad": ("first", "second"),
    "target": ("int32",),
    "size": ("large",),
}
NO_KEYWORD = {"inputs", "function", "requires_grad", "target", "size"}
ALONE = {"size"}  # not in pairs
OF_LOGITS, OF_HEAD = {"class_dim"}, {"linear_bias", "requires_grad"}

# a plan: the options that lead to it. "forward": nothing requires a gradient
PLANS: dict[str, dict[str, Any]] = {
    "logits": {},
    "logits, in place": {"inplace_backward": True},
    "logits, forward": {},
    "head, rows": {},
    "head, budget": {"memory_budget": 4000},
    "head, vocab": {"memory_budget": 1},
    "head, forward": {},
    "head, columns": {"gradient_columns": 0.4},
    "head, tolerance": {"gradient_tolerance": 0.3},
    "head, bf16 screen": {"gradient_columns": 0.4, "screen": "bf16"},
    "head, int8 screen": {"gradient_columns": 0.4, "screen": "int8"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
AUTOCAST = {"fp32 under bf16": torch.bfloat16, "fp32 under fp16": torch.float16}  # options alone


@dataclass(frozen=True)
class Case:
    backend: str
    dtype: str
    plan: str
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return " | ".join((self.backend, self.dtype, self.plan, ", ".join(f"{k}={v}" for k, v in self.options)))

    def get(self, name: str) -> Any:
        return dict(self.options).get(name)


def fits(plan: str, options: tuple[tuple[str, object], ...]) -> bool:
    """True if this way to call takes all of these options."""
    names = {name for name, _ in options}
    head = plan.startswith("head")
    if names & (OF_LOGITS if head else OF_HEAD) or ("requires_grad" in names and plan == "head, forward"):
        return False
    function = getattr(fused_ppl, function_name(plan, dict(options).get("function")))
    return names - NO_KEYWORD <= set(inspect.signature(function).parameters)


def function_name(plan: str, function: object) -> str:
    return ("linear_" if plan.startswith("head") else "") + str(function or "cross_entropy_with_stats")


def cases(backend: str, thorough: bool = False) -> Iterator[Case]:
    """Options alone in every dtype and plan. Pairs too on torch; on triton each pair in one dtype and one plan."""
    alone = [(), *(((name, value),) for name, values in VALUES.items() for value in values)]
    singles = [option for option in alone[1:] if option[0][0] not in ALONE]
    pairs = [(*a, *b) for a, b in itertools.combinations(singles, 2) if a[0][0] != b[0][0]]
    everywhere = list(itertools.product(DTYPES, PLANS))
    for dtype, plan in [*everywhere, *itertools.product(AUTOCAST, PLANS)]:
        for options in alone:
            if fits(plan, options) and not (backend == "triton" and dict(options).get("size")):
                yield Case(backend, dtype, plan, options)
    turn = itertools.cycle(p for p in everywhere if p[0] != "fp64")  # which the kernels refuse
    for options in pairs:
        of_turn = next((p for p in itertools.islice(turn, len(PLANS)) if fits(p[1], options)), None)
        chosen = everywhere if thorough or backend != "triton" else [of_turn] if of_turn else []
        yield from (Case(backend, dtype, plan, options) for dtype, plan in chosen if fits(plan, options))


@dataclass
class Problem:
    """The tensors of a case."""

    leaves: list[Tensor]  # logits; or hidden states, weight and perhaps bias
    target: Tensor
    keywords: dict[str, Any] = field(default_factory=dict)


def make(case: Case) -> Problem:
    """Inputs that depend on the case alone, from torch's generator of a CPU."""
    g = torch.Generator().manual_seed(1)
    b, t, v, d = LARGE if case.get("size") else (B, T, V, D)
    hidden, head = torch.randn(b, t, d, generator=g), torch.randn(v, d, generator=g)
    bias, target = torch.randn(v, generator=g), torch.randint(v, (b, t), generator=g)
    kind = case.get("inputs")
    if kind == "far":
        hidden *= 100  # logits of hundreds: the perplexity is inf
    elif kind == "extreme":
        bias.fill_(-1e10)
        bias[target[0, 0]] = 1e10
    if kind != "none ignored":
        target[0, 1:3] = -100
    if kind == "all ignored":
        target.fill_(-100)
    if kind == "empty":
        hidden, target = hidden[:0], target[:0]
    if "ignore_index" in dict(case.options):
        ignored = case.get("ignore_index")
        target = target.where(target != -100, torch.tensor(0 if ignored is None else ignored))
    keywords = {name: keyword(name, value, target, v, g) for name, value in case.options if name not in NO_KEYWORD}
    with_bias = keywords.pop("linear_bias", None) is not None or kind == "extreme"
    dtype = DTYPES.get(case.dtype, torch.float32)
    leaves = [hidden, head, bias] if with_bias else [hidden, head]
    if case.plan.startswith("logits"):
        leaves = [torch.nn.functional.linear(*leaves)]
        keywords["class_dim"] = case.get("class_dim") or -1
        if case.get("class_dim"):
            leaves = [leaves[0].movedim(-1, 1)]
    leaves = [leaf.clamp(min=-6e4, max=6e4) if dtype == torch.float16 else leaf for leaf in leaves]
    return Problem([leaf.to(dtype) for leaf in leaves], target.int() if case.get("target") else target, keywords)


def keyword(name: str, value: object, target: Tensor, num_classes: int, g: torch.Generator) -> object:
    """The value of a keyword: itself, or the tensor that it names."""
    if name == "num_items":
        return torch.tensor(5) if value == "tensor" else value
    if name not in ("weight", "token_weight"):
        return value
    shape = (num_classes,) if name == "weight" else tuple(target.shape)
    positive = torch.randint(1, 9, shape, generator=g) / 4
    sign = torch.ones(shape).flatten()
    sign[1::2] = -1
    return {
        "positive": positive,
        "bf16": positive.bfloat16(),
        "signed": positive * (torch.randint(0, 2, shape, generator=g) * 2 - 1),
        "some zero": positive * (torch.randint(0, 3, shape, generator=g) > 0),
        "cancel": sign.view(shape),
        "zero": torch.zeros(shape),
    }[str(value)]


def run(case: Case) -> dict[str, Tensor]:
    """Every result and gradient of a case by name, or the type of the error that it raised."""
    problem = make(case)
    which = {None: (0, 1, 2), "first": (0,), "second": (1,)}[case.get("requires_grad")]
    wanted = [i for i in which if i < len(problem.leaves)] if "forward" not in case.plan else []
    leaves = [leaf.requires_grad_(i in wanted) for i, leaf in enumerate(problem.leaves)]
    # what is overwritten in place is no leaf, and belongs to the loss
    inputs = [leaves[0] * 1] if PLANS[case.plan].get("inplace_backward") else list(leaves)
    keywords = dict(problem.keywords)
    if len(inputs) == 3:
        keywords["linear_bias"] = inputs.pop()
    function = getattr(fused_ppl, function_name(case.plan, case.get("function")))
    options = Options(backend=case.backend, **PLANS[case.plan])
    low = AUTOCAST.get(case.dtype)
    try:
        with torch.autocast("cpu", low) if low is not None else contextlib.nullcontext():
            out = function(*inputs, problem.target, options=options, **keywords)
    except (ValueError, TypeError, IndexError, NotImplementedError, RuntimeError) as error:
        return {type(error).__name__: torch.zeros(0)}
    results = out._asdict() if isinstance(out, LossOutput) else {"loss": out}
    if wanted:
        g = torch.Generator().manual_seed(2)
        values = [results[name] for name in ("loss", "perplexity") if name in results]
        of = [torch.rand(v.shape, generator=g, dtype=v.dtype) - 0.3 for v in values]
        grads = torch.autograd.grad(values, [leaves[i] for i in wanted], of)
        results |= {f"gradient {i}": grad for i, grad in zip(wanted, grads, strict=True)}
    return {name: t.detach().clone() for name, t in results.items() if t is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=("torch", "triton"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--thorough", action="store_true")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    args = parser.parse_args()
    if args.backend == "triton":
        import interpreter

        interpreter.round_once()
        interpreter.skip_its_checks()
    torch.set_num_threads(1)  # sums of other threads may come in another order
    warnings.simplefilter("ignore")
    found = {str(case): run(case) for case in cases(args.backend, args.thorough) if args.only in str(case)}
    torch.save({"package": fused_ppl.__file__, "results": found}, args.out)


if __name__ == "__main__":
    main()
