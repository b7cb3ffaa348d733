# SPDX-License-Identifier: Apache-2.0
"""Divergences under torch.compile, export, autocast, threads, counters of FLOPs, and over ranks."""

from __future__ import annotations

import threading
from typing import Any

import distributed_cases as cases
import divergence_rank_cases
import pytest
import torch
from op_cases import checked_op
from pool import Pool
from test_divergence import DIRECTIONS, IDS, heads, how, two_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from fused_ppl import Options, kl_divergence, linear_kl_divergence, linear_kl_divergence_with_stats, plan
from fused_ppl.records import Divergence, Execution, HeadExecution, HeadInputs, LogitsInputs, Teacher, Upstream
from fused_ppl.spec import LossSpec

N, V, D, OTHER = 9, 37, 6, 11
PRODUCT = 2 * N * V * D
TARGET = torch.tensor([[0, -100, 1], [36, 5, 6], [-100, 8, 9]])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", DIRECTIONS[:3], ids=IDS[:3])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_step_is_one_graph_for_any_number_of_tokens(fused, case, reduction, options):
    weight, teacher_weight = (torch.randn(V, D).requires_grad_(), torch.randn(V, OTHER))

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        return step(hidden, weight, teacher, options)

    def step(hidden: Tensor, weight: Tensor, teacher: Tensor, options: Options) -> Tensor:
        keywords = {"softcap": 5.0, "reduction": reduction, "options": options, **how(*case)}
        wide = teacher_weight.to(teacher)
        if fused:
            return linear_kl_divergence(hidden, weight, teacher, wide, **keywords)
        return kl_divergence(hidden @ weight.T, teacher @ wide.T, **keywords)

    for n in (7, 9, 14):
        hidden, teacher = torch.randn(n, D).requires_grad_(), torch.randn(n, OTHER)
        upstream = torch.linspace(-1, 2, n) if reduction == "none" else torch.tensor(-1.7)
        got = compiled(hidden, weight, teacher)
        double = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        want = step(*double, teacher.double(), Options(backend="reference"))
        assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
        gradients = torch.autograd.grad(got, (hidden, weight), upstream)
        for a, b in zip(gradients, torch.autograd.grad(want, double, upstream.double()), strict=True):
            assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", DIRECTIONS[:3], ids=IDS[:3])
def test_opcheck(case, reduction, stats, backend):
    spec = LossSpec.of(reduction=reduction, stats=stats)
    asked = Divergence(*case, 0.7, None)
    z, t = two_logits((3, 3, V))
    logits = LogitsInputs(z, TARGET, None, torch.rand(3, 3), None)
    factor = torch.tensor(0.3, dtype=torch.float64) if reduction == "mean" else torch.ones(3, 3, dtype=torch.float64)
    upstream = Upstream(factor, factor, torch.rand(factor.shape), None)
    execution = Execution(backend, None)
    teacher_logits = Teacher(t)
    checked_op("divergence_forward", logits, teacher_logits, spec, execution, asked=asked)
    checked_op("divergence_backward", logits, teacher_logits, spec, execution, asked=asked, upstream=upstream)
    (hidden, weight, bias), teacher = heads()
    inputs = HeadInputs(*(t.detach() for t in (hidden, weight, bias)), TARGET, None, None, None)
    for grads in ((True, True, True), (True, False, False)):
        execution = HeadExecution(backend, None, torch.float32, grads)
        given = (inputs, Teacher(*teacher), spec, execution)
        how_ = {"asked": asked, "teacher_dtype": torch.float32}
        checked_op("linear_divergence", *given, **how_)
        checked_op("linear_divergence_backward", *given, **how_, upstream=upstream)


@pytest.mark.parametrize("strict", [False, True])
def test_export_raises_a_sentence_or_exports_values(strict, options):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(D, V)

        def forward(self, hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
            return linear_kl_divergence(hidden, self.head.weight, teacher, weight, options=options)

    model, given = Model(), (torch.randn(N, D), torch.randn(N, OTHER), torch.randn(V, OTHER))
    with pytest.raises(Exception, match=r"no gradient in torch\.export"):
        torch.export.export(model, given, strict=strict)
    with torch.no_grad():
        exported = torch.export.export(model, given, strict=strict).module()
        assert torch.equal(exported(*given), model(*given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_products_of_both_heads_and_not_the_values(dtype, options):
    student, teacher = heads()
    with torch.autocast("cpu", dtype):
        loss = linear_kl_divergence(*student[:2], *teacher[:2], options=options)
    gradients = torch.autograd.grad(loss, student[:2])
    rounded = [t.detach().to(dtype).requires_grad_() for t in student[:2]]
    want = linear_kl_divergence(*rounded, *(t.to(dtype) for t in teacher[:2]), options=options)
    assert loss.dtype == torch.float32
    assert_close(loss, want, rtol=1e-4 if dtype == torch.float16 else 0, atol=0)
    for mine, other in zip(gradients, torch.autograd.grad(want, rounded), strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, other.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("none", 4)])
def test_the_counter_of_flops_sees_both_heads(reduction, products, options):
    from torch.utils.flop_counter import FlopCounterMode

    student, teacher = heads()
    of_teacher = 2 * N * V * OTHER * (1 if reduction == "mean" else 2)

    def step() -> int:
        with FlopCounterMode(display=False) as counter:
            linear_kl_divergence(*student[:2], *teacher[:2], reduction=reduction, options=options).sum().backward()
        return counter.get_total_flops()

    assert step() == products * PRODUCT + of_teacher
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step() == products * PRODUCT + of_teacher
    case = plan.LinearCase(N, V, D, 4, "cpu", (True, True, False), teacher_size=OTHER, teacher_itemsize=4)
    assert plan.linear_plan(case, "rows").flops == 3 * PRODUCT + 2 * N * V * OTHER


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_takes_the_memory_that_its_plan_says(reduction, options, peak_bytes, fits):
    n, v, d, other = 512, 8000, 48, 64
    fits(n, v)
    hidden, weight, teacher, teacher_weight = (torch.randn(shape) for shape in ((n, d), (v, d), (n, other), (v, other)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def step() -> Any:
        loss = linear_kl_divergence(*leaves, teacher, teacher_weight, reduction=reduction, options=options)
        return torch.autograd.grad(loss.sum(), leaves)

    case = plan.LinearCase(n, v, d, 4, "cpu", (True, True, False), teacher_size=other, teacher_itemsize=4)
    allowed = plan.linear_plan(case, "rows").peak_bytes
    if reduction == "none":  # the gradient is made beside its accumulator
        allowed += 4 * d * (n + v)
    backend = 16 * 2**20 if options.backend == "torch" else 0  # what it computes with in cache
    assert peak_bytes(step) <= 1.1 * allowed + backend


@pytest.mark.parametrize("case", DIRECTIONS[:3], ids=IDS[:3])
def test_a_budget_bounds_what_is_computed_in_cache(case, options, peak_bytes, fits):
    fits(64, 2000)
    z, t = two_logits((64, 2000), dtype=torch.bfloat16)
    tight = Options(backend=options.backend, memory_budget=2**18)

    def value() -> Tensor:
        return kl_divergence(z, t, softcap=20.0, teacher_softcap=20.0, options=tight, **how(*case))

    assert peak_bytes(value) < 2**18 + 2**16


def test_threads_that_share_a_teacher(options):
    student, teacher = heads()
    want = linear_kl_divergence_with_stats(*student[:2], *teacher[:2], options=options)
    found: dict[int, Any] = {}

    def run(i: int) -> None:
        for _ in range(5):
            found[i] = linear_kl_divergence_with_stats(*student[:2], *teacher[:2], options=options)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in found.values():
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


@pytest.mark.parametrize("kind", cases.BATCHES)
def test_ranks_have_the_loss_and_the_gradient_of_one_process(pool: Pool, kind: str) -> None:
    for keywords in ({}, {"direction": "reverse"}, {"num_items": 40}):
        pool.run(2, divergence_rank_cases.rank_of_a_batch, kind, keywords)


def test_a_head_that_ranks_share_is_refused(pool: Pool) -> None:
    pool.run(2, divergence_rank_cases.rank_of_a_sharded_head)
