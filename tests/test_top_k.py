# SPDX-License-Identifier: Apache-2.0
"""Divergences from teachers that name their K most likely classes, against float64 `F.kl_div`."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import checked_op
from test_divergence import judge, two_logits
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import (
    Options,
    TopK,
    kl_divergence,
    kl_divergence_with_stats,
    linear_kl_divergence,
)
from fused_ppl.records import Divergence, Execution, HeadExecution, HeadInputs, LogitsInputs, Teacher, Upstream
from fused_ppl.spec import LossSpec
from fused_ppl.testing import assert_as_good_as_eager

CASES = [
    (tail, direction, beta)
    for tail in ("drop", "merge", "spread")
    for direction, beta in (("forward", 0.5), ("reverse", 0.5), ("jensen_shannon", 0.1), ("jensen_shannon", 0.9))
    if (tail, direction) != ("drop", "reverse")
]
IDS = [f"{tail} {direction} {beta}" for tail, direction, beta in CASES]
REFERENCE = Options(backend="reference")


def how(direction: str, beta: float) -> dict[str, Any]:
    return {"direction": direction, "beta": beta}


def top_k(t: Tensor, k: int, tail: str) -> TopK:
    """The K most likely classes of teacher logits, in no order."""
    values, ids = t.double().log_softmax(-1).topk(k, sorted=False)
    return TopK(ids, values.to(torch.float64 if t.dtype == torch.float64 else torch.float32), tail)


def whole(z: Tensor, teacher: TopK, direction: str) -> tuple[Tensor, Tensor]:
    """Logits of both over all classes, or over the named ones and the rest, written row by row."""
    of_student, of_teacher = [], []
    shape, v = z.shape[:-1], z.shape[-1]
    least = 1.1920929e-07 if direction == "reverse" else 0.0
    for row, ids, log_probs in zip(
        z.reshape(-1, v), teacher.ids.reshape(-1, teacher.ids.shape[-1]).tolist(),
        teacher.log_probs.double().reshape(-1, teacher.ids.shape[-1]).tolist(), strict=True,
    ):  # fmt: skip
        q = {i: math.exp(a) for i, a in zip(ids, log_probs, strict=True) if a != -math.inf}
        others = [i for i in range(v) if i not in q]
        rest = max(1 - math.fsum(q.values()), least) if others else 0.0
        if teacher.tail == "merge":
            named = [row[i] for i in q] + [row.new_full((), -math.inf)] * (len(ids) - len(q))
            of_rest = row[others].logsumexp(0) if others else row.new_full((), -math.inf)
            of_student.append(torch.stack([*named, of_rest]))
            of_teacher.append(torch.tensor([*q.values(), *[0.0] * (len(ids) - len(q)), rest], dtype=torch.float64))
        else:
            each = rest / max(len(others), 1) if teacher.tail == "spread" else 0.0
            of_student.append(row)
            of_teacher.append(torch.tensor([q.get(i, each) for i in range(v)], dtype=torch.float64))
    student, other = torch.stack(of_student), torch.stack(of_teacher).log()
    return student.view(*shape, -1), other.to(z.dtype).view(*shape, -1)


def divergence(z: Tensor, t: Tensor, direction: str, beta: float) -> Tensor:
    """(n,): by torch's kl_div of probabilities, for which a class of probability 0 has no part."""
    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        out = log_a.detach() == -math.inf
        log_a, log_b = log_a.masked_fill(out, -1e30), log_b.masked_fill(out, 0)
        return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    if direction == "forward":
        return kl(log_q, log_p)
    if direction == "reverse":
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_q.clamp(min=-1e30) + math.log(beta), log_p.clamp(min=-1e30) + math.log(1 - beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def exact(z: Tensor, teacher: TopK, direction: str, beta: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = z.detach().requires_grad_()
    value = divergence(*whole(x, teacher, direction), direction, beta)
    return value.detach(), torch.autograd.grad(value, x, upstream.to(x))[0]


@pytest.mark.parametrize("kind", ["near", "independent", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tail", "direction", "beta"), CASES, ids=IDS)
@pytest.mark.parametrize(("v", "k"), [(2, 1), (129, 7), (4099, 64)])
def test_value_and_gradient_of_each_token(v, k, tail, direction, beta, dtype, kind, options):
    z, t = two_logits((4, v), kind, dtype)
    teacher, upstream = top_k(t, k, tail), torch.tensor([1.0, -2.0, 0.0, 0.3])
    z.requires_grad_()
    value = kl_divergence(z, teacher, reduction="none", options=options, **how(direction, beta))
    (gradient,) = torch.autograd.grad(value, z, upstream)
    eager, wide = exact(z.float(), teacher, direction, beta, upstream)
    want, right = exact(z.double(), teacher, direction, beta, upstream)
    condition = 1 + z.detach().abs().max().item() + t.abs().max().item()
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    judge(value.detach(), eager, want, condition=condition)
    judge(gradient, wide.to(dtype), right, condition=condition)


def test_by_hand(options):
    """p uniform over 4 classes; the teacher names class 2 with 1/2 and class 0 with 1/4."""
    ids, log_probs = torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log()
    want = {
        "merge": 0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5),
        "spread": 0.5 * math.log(2) + 0.25 * math.log(0.125 / 0.25),
        "drop": 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 3),
    }
    gradients = {
        "merge": [0.0, (0.5 - 0.25) / 2, 0.25 - 0.5, (0.5 - 0.25) / 2],
        "spread": [0.0, 0.125, -0.25, 0.125],
        "drop": [0.25 - 1 / 3, 0.25, 0.25 - 2 / 3, 0.25],
    }
    for tail, value in want.items():
        z = torch.zeros(1, 4, requires_grad=True)
        loss = kl_divergence(z, TopK(ids, log_probs, tail), options=options)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=2e-6), tail
        assert_close(z.grad[0], torch.tensor(gradients[tail]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tail", ["drop", "merge", "spread"])
def test_all_classes_named_is_the_divergence_from_the_whole_teacher(tail, options):
    z, t = two_logits((5, 33), "independent")
    for direction in ("forward", "jensen_shannon") if tail == "drop" else ("forward", "reverse", "jensen_shannon"):
        values, gradients = [], []
        for teacher in (t, top_k(t, 33, tail)):
            x = z.clone().requires_grad_()
            values.append(kl_divergence(x, teacher, direction=direction, reduction="none", options=options))
            gradients.append(torch.autograd.grad(values[-1].sum(), x)[0])
        # the mass of the tail is then 1 less a rounded sum
        assert_close(values[1], values[0], rtol=1e-5, atol=3e-6)
        assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


# --- options in pairs, through a head --------------------------------------------------------------------------------

N, V, D, K = 9, 37, 6, 5
CHOICES: dict[str, list[dict[str, Any]]] = {
    "case": [{"tail": tail, **how(direction, beta)} for tail, direction, beta in CASES],
    "reduction": [{"reduction": name} for name in ("mean", "sum", "none", "sequence")] + [{"num_items": 4}],
    "target": [{}, {"target": torch.tensor([[3, -100, 1], [0, 36, -100], [-100, -100, -100]])}],
    "token_weight": [{}, {"token_weight": torch.tensor([[1.0, 0.0, 2.0], [-0.5, 1.0, 0.0], [1.0, 1.0, 3.0]])}],
    "student": [{}, {"logit_scale": 0.6}, {"softcap": 3.0, "logit_scale": 1.5}],
    "bias": [{}, {"linear_bias": True}],
}
PAIRS = [
    {**a, **b}
    for first, second in itertools.combinations(CHOICES, 2)
    for a, b in itertools.product(CHOICES[first], CHOICES[second])
]


def student_and_teacher(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((3, 3, D), (V, D), (V,), (3, 3, V))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in tensors[:3]], 2 * tensors[3]


def through_head(
    student: list[Tensor],
    teacher: Tensor,
    options: Options,
    tail: str = "merge",
    linear_bias: bool = False,
    **keywords: Any,
) -> list[Tensor]:
    """The loss, and gradients for an upstream gradient that is not 1."""
    bias = student[2] if linear_bias else None
    given = top_k(teacher, K, tail)
    if "target" in keywords:  # ignored tokens may have anything
        ignored = keywords["target"] == -100
        given.ids[ignored], given.log_probs[ignored] = 5000, math.nan
    loss = linear_kl_divergence(*student[:2], given, linear_bias=bias, options=options, **keywords)
    upstream = torch.linspace(-1.7, 2.0, loss.numel() or 1)[: loss.numel()].view(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, student if linear_bias else student[:2], upstream)]


@pytest.mark.parametrize("start", range(8))
def test_every_pair_of_options(start, options):
    for keywords in PAIRS[start::8]:
        student, teacher = student_and_teacher()
        got = through_head(student, teacher, options, **keywords)
        eager = through_head(student, teacher, REFERENCE, **keywords)
        double = [t.detach().double().requires_grad_() for t in student]
        right = through_head(double, teacher.double(), REFERENCE, **keywords)
        for mine, other, want in zip(got, eager, right, strict=True):
            assert_as_good_as_eager(mine, other, want, str(keywords), condition=12.0)


@pytest.mark.parametrize(("tail", "direction", "beta"), CASES, ids=IDS)
def test_the_reference_has_the_formulas(tail, direction, beta):
    """The reference by itself against predictions that are written row by row."""
    z, t = two_logits((6, 31), "independent", torch.float64)
    teacher, upstream = top_k(t, 4, tail), torch.linspace(-1, 2, 6)
    z.requires_grad_()
    value = kl_divergence(z, teacher, reduction="none", options=REFERENCE, **how(direction, beta))
    want, right = exact(z, teacher, direction, beta, upstream)
    assert_close(value.detach(), want, rtol=1e-9, atol=1e-12)
    assert_close(torch.autograd.grad(value, z, upstream.double())[0], right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("tail", "direction", "beta"), CASES, ids=IDS)
def test_gradcheck(tail, direction, beta):
    (hidden, weight, bias), teacher = student_and_teacher(torch.float64)
    given = top_k(teacher, K, tail)
    more = {"softcap": 4.0, "reduction": "none", "options": Options(backend="torch"), **how(direction, beta)}
    assert torch.autograd.gradcheck(
        lambda *student: linear_kl_divergence(*student[:2], given, linear_bias=student[2], **more),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("tail", ["drop", "spread"])
def test_statistics(tail, options):
    z, t = two_logits((6, 500), "independent")
    teacher, target = top_k(t, 20, tail), torch.arange(6) * 80
    out = kl_divergence_with_stats(z, teacher, target, options=options)
    _, q = whole(z.double(), teacher, "forward")
    log_q = q.log_softmax(-1)
    assert_close(out.teacher_entropy.double(), -(log_q.exp() * log_q.clamp(min=-1e9)).sum(-1), rtol=1e-5, atol=0)
    assert out.agrees.tolist() == (z.argmax(-1) == t.argmax(-1)).tolist()
    want = z.double().log_softmax(-1).gather(-1, target[:, None])[:, 0] - log_q.gather(-1, target[:, None])[:, 0]
    assert_close(out.log_prob_difference.double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("tail", ["drop", "merge", "spread"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_step_is_one_graph_for_any_number_of_tokens(reduction, tail, options):
    weight = torch.randn(V, D).requires_grad_()

    def step(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor, options: Options) -> Tensor:
        teacher = TopK(ids, log_probs, tail)
        return linear_kl_divergence(hidden, weight, teacher, softcap=5.0, reduction=reduction, options=options)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        return step(hidden, weight, ids, log_probs, options)

    for n in (7, 9, 14):
        hidden, given = torch.randn(n, D).requires_grad_(), top_k(torch.randn(n, V), K, tail)
        got, want = compiled(hidden, weight, *given[:2]), step(hidden, weight, *given[:2], REFERENCE)
        assert_close(got, want, rtol=2e-6, atol=1e-6)
        gradients = [torch.autograd.grad(v.sum(), (hidden, weight)) for v in (got, want)]
        assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tail", ["drop", "merge", "spread"])
def test_opcheck(tail, reduction, backend):
    spec, asked = LossSpec.of(reduction=reduction, stats=tail != "merge"), Divergence("forward", 0.5, 1.0, None, tail)
    target = torch.tensor([[0, -100, 1], [36, 5, 6], [-100, 8, 9]])
    (hidden, weight, bias), t = student_and_teacher()
    teacher = Teacher(None, None, None, *top_k(t, K, tail)[:2])
    logits = LogitsInputs(torch.randn(3, 3, V), target, None, torch.rand(3, 3), None)
    factor = torch.tensor(0.3, dtype=torch.float64) if reduction == "mean" else torch.ones(3, 3, dtype=torch.float64)
    upstream = Upstream(factor, factor, torch.rand(factor.shape), None)
    checked_op("divergence_forward", logits, teacher, spec, Execution(backend, None), asked=asked)
    checked_op("divergence_backward", logits, teacher, spec, Execution(backend, None), asked=asked, upstream=upstream)
    inputs = HeadInputs(*(x.detach() for x in (hidden, weight, bias)), target, None, None, None)
    execution = HeadExecution(backend, None, torch.float32, (True, True, True))
    given, more = (inputs, teacher, spec, execution), {"asked": asked, "teacher_dtype": torch.float32}
    checked_op("linear_divergence", *given, **more)
    checked_op("linear_divergence_backward", *given, **more, upstream=upstream)
