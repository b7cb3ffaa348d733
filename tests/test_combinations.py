# SPDX-License-Identifier: Apache-2.0
"""Options in pairs and triples, with weights of any sign, against the float64 reference.

Every case takes one value of each dimension; the options and their values come from tests/options.py. The tables have
every pair of values, and every triple of those that say what a row weighs and what divides it. They are the same on
each machine. `-m slow` has every triple.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import options as option_table
import pytest
import torch
from torch.testing import assert_close

from fused_ppl import Options, cross_entropy_with_stats, linear_cross_entropy_with_stats

N, V, D = 6, 19, 5

# every option of the table but num_items, which is the denominator "items": the names of values; None is the default
KEYWORDS = [keyword for keyword in option_table.ROW if keyword != "num_items"]
DIMENSIONS: dict[str, tuple[object, ...]] = {
    "plan": ("logits", "head", "vocab", "none", "compact", "screen"),
    "denominator": ("mean", "items", "sum", "sequence", "tokens"),
    **{keyword: (None, *option_table.in_pairs(keyword)) for keyword in KEYWORDS},
    "ignored": ("no token", "some", "all"),
    "bias": (False, True),
    "upstream": ("loss", "perplexity", "both"),
    "target": (torch.int64, torch.int32),
}
# whose values decide together what a row counts and what divides it
CORE = ("plan", "denominator", "token_weight", "weight", "ignored", "label_smoothing")


def covering(strength: int, names: tuple[str, ...] = tuple(DIMENSIONS)) -> list[dict[str, object]]:
    """Cases that have every combination of `strength` values of these dimensions, found greedily."""
    names = tuple(names)
    missing = {
        (dims, values)
        for dims in itertools.combinations(names, strength)
        for values in itertools.product(*(range(len(DIMENSIONS[d])) for d in dims))
    }
    generator = torch.Generator().manual_seed(strength)
    cases = []
    while missing:
        dims, values = min(missing)
        best: dict[str, int] = {}
        most = -1
        for _ in range(12):
            case = {d: int(torch.randint(len(v), (), generator=generator)) for d, v in DIMENSIONS.items()}
            case |= dict(zip(dims, values, strict=True))
            found = sum((c, tuple(case[d] for d in c)) in missing for c in itertools.combinations(names, strength))
            if found > most:
                best, most = case, found
        missing -= {(c, tuple(best[d] for d in c)) for c in itertools.combinations(names, strength)}
        cases.append({d: DIMENSIONS[d][i] for d, i in best.items()})
    return cases


@dataclass
class Problem:
    """The tensors of a case in float32; in float64 for the reference."""

    hidden: torch.Tensor
    head: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    keywords: dict[str, object]

    def run(self, case: dict[str, object], dtype: torch.dtype, options: Options) -> list[torch.Tensor]:
        """loss, perplexity, nll, lse, M and the gradients of hidden states, weight and bias, or of the logits."""
        leaves = [t.to(dtype).requires_grad_() for t in (self.hidden, self.head, self.bias) if t is not None]
        keywords = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in self.keywords.items()}
        if case["plan"] == "logits":
            leaves = [torch.nn.functional.linear(*leaves).detach().requires_grad_()]
            out = cross_entropy_with_stats(leaves[0], self.target, class_dim=-1, options=options, **keywords)
        else:
            bias = leaves[2] if self.bias is not None else None
            out = linear_cross_entropy_with_stats(
                *leaves[:2], self.target, linear_bias=bias, options=options, **keywords
            )
        generator = torch.Generator().manual_seed(5)
        total = torch.zeros((), dtype=torch.float64)
        for name in ("loss", "perplexity"):
            if case["upstream"] in (name, "both"):
                of = torch.rand(out.loss.shape, generator=generator, dtype=torch.float64) - 0.3
                total = total + (getattr(out, name).double() * of).sum()
        grads = torch.autograd.grad(total, leaves)
        return [*(t.detach().double() for t in (*out[:4], out.total_weight)), *(g.double() for g in grads)]


def make(case: dict[str, object], seed: int) -> Problem:
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(2, N // 2, D, generator=g), torch.randn(V, D, generator=g)
    bias = torch.randn(V, generator=g) if case["bias"] else None
    target = torch.randint(V, (2, N // 2), generator=g)
    # weights that cancel, and those that are zero at targets, are of all tokens
    names = [str(case[keyword]) for keyword in KEYWORDS if case[keyword] is not None]
    keywords = option_table.keywords(names, V, target, seed=seed)
    if case["ignored"] == "some":
        target.view(-1)[[1, 2]] = -100  # a 1 and a -1 of the weights that cancel: what is left cancels as well
    elif case["ignored"] == "all":
        target.fill_(-100)
    keywords["reduction"] = {"items": "mean", "tokens": "none"}.get(str(case["denominator"]), case["denominator"])
    if case["denominator"] == "items":
        keywords["num_items"] = 10.0
    return Problem(hidden, head, bias, target.to(case["target"]), keywords)


OPTIONS = {
    "vocab": {"memory_budget": 1},
    "compact": {"gradient_columns": V},
    "screen": {"gradient_columns": V, "screen": "bf16"},
}


def check(case: dict[str, object], backend: str, seed: int = 0) -> None:
    if case["plan"] == "none":  # no gradient is asked for: the plan "forward"
        return check_values(case, backend, seed)
    problem = make(case, seed)
    got = problem.run(case, torch.float32, Options(backend=backend, **OPTIONS.get(str(case["plan"]), {})))
    truth = problem.run(case, torch.float64, Options(backend="reference"))
    names = ["loss", "perplexity", "nll", "lse", "total_weight", "first gradient", "second", "third"]
    screened = case["plan"] == "screen"
    for name, a, b in zip(names, got, truth, strict=False):
        size = b.nan_to_num(0, 0, 0).abs().amax().item() if b.numel() else 0.0
        tolerance = 0.2 if screened else 2e-5
        assert_close(a, b, rtol=tolerance, atol=tolerance * max(size, 1e-3), equal_nan=True, msg=_named(name, case))
    ignored = problem.target == -100
    assert not got[5][ignored].any(), f"ignored rows of {case}"


def check_values(case: dict[str, object], backend: str, seed: int) -> None:
    problem = make(case, seed)
    tensors = [problem.hidden, problem.head, problem.bias]
    out, truth = (
        linear_cross_entropy_with_stats(
            *(None if t is None else t.to(dtype) for t in tensors[:2]),
            problem.target,
            linear_bias=None if tensors[2] is None else tensors[2].to(dtype),
            options=Options(backend=name),
            **{k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in problem.keywords.items()},
        )
        for dtype, name in ((torch.float32, backend), (torch.float64, "reference"))
    )
    for name in ("loss", "perplexity", "nll", "lse", "entropy", "predicted", "total_weight"):
        a, b = getattr(out, name).double(), getattr(truth, name).double()
        assert_close(a, b, rtol=2e-5, atol=2e-5, equal_nan=True, msg=_named(name, case))


def _named(name: str, case: dict[str, object]) -> Callable[[str], str]:
    return lambda message: f"{name} of {case}: {message}"


PAIRS = covering(2)
TRIPLES_OF_CORE = covering(3, CORE)


def test_the_tables_have_every_pair_and_triple():
    for strength, names, table in ((2, tuple(DIMENSIONS), PAIRS), (3, CORE, TRIPLES_OF_CORE)):
        for dims in itertools.combinations(names, strength):
            wanted = math.prod(len(DIMENSIONS[d]) for d in dims)
            assert len({tuple(case[d] for d in dims) for case in table}) == wanted


@pytest.mark.parametrize("part", range(8))
def test_every_pair(part, backend):
    for case in PAIRS[part::8]:
        check(case, backend)


@pytest.mark.parametrize("part", range(8))
def test_every_triple_of_weights_denominators_and_plans(part, backend):
    for case in TRIPLES_OF_CORE[part::8]:
        check(case, backend)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_triple(seed, backend):
    for case in covering(3):
        check(case, backend, seed)
