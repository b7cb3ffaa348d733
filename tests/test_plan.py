# SPDX-License-Identifier: Apache-2.0
"""Plans are pure functions of shape, dtype, needs, device and budget; and the bytes that a loss takes are measured."""

from __future__ import annotations

import re

import options as option_table
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from fused_ppl import Options, cross_entropy, cross_entropy_with_stats, linear_cross_entropy, perplexity, plan
from fused_ppl.engines import head
from fused_ppl.testing import make_logits, make_target

MIB = 2**20

CASES = st.builds(
    plan.LinearCase,
    num_tokens=st.integers(0, 2**20),
    num_classes=st.integers(1, 300_000),
    hidden_size=st.integers(1, 16_384),
    itemsize=st.sampled_from([2, 4, 8]),
    device_type=st.sampled_from(["cpu", "cuda"]),
    grads=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    memory_budget=st.none() | st.integers(1, 2**36),
    converts=st.booleans(),
)


def with_budget(case: plan.LinearCase, budget: int | None) -> plan.LinearCase:
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
    return plan.LinearCase(**{**fields, "memory_budget": budget})


@given(CASES, st.booleans())
def test_every_plan_is_legal_and_over_the_budget_only_where_it_says_so(case, per_token):
    kind = plan.linear_kind(case, per_token)
    made = plan.linear_plan(case, kind)
    assert 1 <= made.rows <= max(1, case.num_tokens)
    assert 0 <= made.columns <= case.num_classes
    assert (made.columns > 0) == (kind == "vocab")
    assert (kind == "forward") == (not any(case.grads))
    over = case.memory_budget is not None and made.temporary_bytes + made.saved_bytes > case.memory_budget
    assert over == ("over the budget" in made.reason)
    assert made.kind in made.explain()


@given(CASES)
def test_the_kind_does_not_depend_on_the_number_of_tokens(case):
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
    other = plan.LinearCase(**{**fields, "num_tokens": case.num_tokens + 12345})
    assert plan.linear_kind(case, False) == plan.linear_kind(other, False)


@given(CASES)
def test_a_gpu_works_on_1024_rows_or_more_while_the_budget_allows(case):
    assume(case.device_type == "cuda" and case.num_tokens >= 1024)
    kind = plan.linear_kind(case, False)
    made = plan.linear_plan(case, kind)
    chunk = 1024 * case.num_classes * case.itemsize
    assert made.rows >= 1024 or (case.memory_budget is not None and made.saved_bytes + chunk > case.memory_budget)


@given(CASES, st.integers(2**34, 2**44), st.integers(2**34, 2**44))
def test_more_budget_never_means_smaller_chunks_of_the_same_plan(case, a, b):
    less, more = sorted((a, b))
    kind = plan.linear_kind(with_budget(case, less), False)
    assume(kind == plan.linear_kind(with_budget(case, more), False))
    small, large = (plan.linear_plan(with_budget(case, budget), kind) for budget in (less, more))
    assume("over the budget" not in small.reason)  # a budget that is lost anyway does not make the walk slow
    assert small.rows <= large.rows and small.columns <= large.columns


def test_explain_says_what_was_chosen_with_its_numbers():
    case = plan.LinearCase(8192, 128256, 4096, 2, "cuda", (True, True, False))
    made = plan.linear_plan(case, plan.linear_kind(case, per_token=False))
    assert made.kind == "rows" and made.rows == 4096
    assert made.saved_bytes == 128256 * 4096 * 4 + 8192 * 4096 * 4
    assert made.flops == 6 * 8192 * 128256 * 4096
    assert made.explain().startswith("plan rows: 4096 rows at a time; one upstream gradient for all tokens")
    assert plan.linear_kind(case, per_token=True) == "vocab"


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_row_chunks_cover_every_row_once_in_order(outer, inner, rows):
    seen = []
    for b, r, flat in plan.row_chunks(outer, inner, rows):
        mine = [i * inner + j for i in range(b.start, b.stop) for j in range(r.start, r.stop)]
        assert mine == list(range(flat.start, flat.stop)) and len(mine) <= rows
        seen += mine
    assert seen == list(range(outer * inner))


@given(st.integers(1, 10**6), st.sampled_from([4, 8]), st.integers(1, 64), st.none() | st.integers(1, 10**9))
def test_a_chunk_of_rows_feeds_every_thread_and_keeps_to_the_budget(v, itemsize, threads, budget):
    rows = plan.rows_per_chunk(v, itemsize, "cpu", threads=threads, memory_budget=budget)
    assert rows >= (1 if budget is not None else threads)
    assert budget is None or rows == 1 or rows * v * itemsize <= budget


def test_chunks_are_as_few_as_rectangles_allow():
    assert len(list(plan.row_chunks(1, 100, 10))) == 10
    assert len(list(plan.row_chunks(10, 10, 30))) == 4  # 3 + 3 + 3 + 1 whole outer indices
    assert len(list(plan.row_chunks(1, 2**40, 2**39))) == 2


def run(loss, x, target, **keywords):
    value = loss(x, target, **keywords)
    if isinstance(value, tuple):
        value = value.loss + value.perplexity
    return torch.autograd.grad(value, x)


LOSSES = {
    "cross-entropy": (cross_entropy, {}),
    "perplexity": (perplexity, {}),
    "all options": (
        cross_entropy_with_stats,
        option_table.numbers(cross_entropy_with_stats),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_size_of_the_logits_but_their_gradient(dtype, name, backend, fits, peak_bytes):
    fits(2048, 8192)
    loss, keywords = LOSSES[name]
    x = make_logits((2048, 8192), dtype).requires_grad_()  # 64 MiB in fp32
    target = make_target((2048,), 8192, ignored=0.1)
    gradient = x.numel() * x.element_size()
    peak = peak_bytes(lambda: run(loss, x, target, options=Options(backend), **keywords))
    assert gradient <= peak <= gradient + 16 * MIB


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_even_that_in_place(dtype, name, backend, fits, peak_bytes):
    fits(2048, 8192)
    loss, keywords = LOSSES[name]
    x = make_logits((2048, 8192), dtype).requires_grad_() * 1
    target = make_target((2048,), 8192, ignored=0.1)
    options = Options(backend, inplace_backward=True)
    assert peak_bytes(lambda: run(loss, x, target, options=options, **keywords)) <= 16 * MIB


@pytest.mark.parametrize("name", LOSSES)
def test_memory_budget_is_kept(name, backend, fits, peak_bytes):
    fits(512, 8192)
    loss, keywords = LOSSES[name]
    x = make_logits((512, 8192)).requires_grad_()
    target = make_target((512,), 8192)
    per_row = 512 * 256  # 256 bytes for the statistics of each row
    for budget in (MIB // 2, 2 * MIB, 4 * MIB):
        options = Options(backend, memory_budget=budget)
        peak = peak_bytes(lambda o=options: run(loss, x, target, options=o, **keywords))
        assert peak - x.numel() * 4 <= budget + per_row


def test_forward_alone_takes_no_gradient(backend, fits, peak_bytes):
    fits(2048, 8192)
    x, target = make_logits((2048, 8192), torch.bfloat16), make_target((2048,), 8192)
    assert peak_bytes(lambda: cross_entropy_with_stats(x, target, options=Options(backend))) <= 16 * MIB


@pytest.mark.parametrize("layout", [lambda x: x.view(2, 1024, 2048).transpose(0, 1), lambda x: x[:, :2000]])
def test_views_are_not_copied(layout, backend, fits, peak_bytes):
    fits(2048, 2048)
    x = layout(make_logits((2048, 2048), torch.bfloat16))
    target = make_target(x.shape[:-1], x.shape[-1])
    assert (
        peak_bytes(lambda: perplexity(x, target, class_dim=-1, options=Options(backend))) <= 10 * MIB
    )  # the buffer is 8, a copy another 8


def test_the_measure_of_memory_sees_a_copy(peak_bytes):
    x, target = make_logits((2048, 2048)), make_target((2048,), 2048)
    assert peak_bytes(lambda: torch.nn.functional.cross_entropy(x.double(), target)) >= 2 * x.numel() * 8


def test_a_budget_that_cannot_be_kept_does_not_mean_single_rows_or_columns():
    for case in (
        plan.LinearCase(65536, 32000, 4096, 2, "cuda", (True, True, False), 600 * 2**20),
        plan.LinearCase(65536, 128256, 4096, 2, "cuda", (True, True, False), 512 * 2**20),
    ):
        made = plan.linear_plan(case, plan.linear_kind(case, False))
        assert made.rows >= 1024 or made.columns >= 256
        assert "over the budget" in made.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [(False, False), (True, False), (True, True)], ids=str)
def test_a_weight_that_autocast_converts_is_in_the_budget(trained, dtype, peak_bytes):
    hidden, weight = torch.randn(256, 512), torch.randn(8192, 512) / 20
    target = torch.randint(8192, (256,))
    leaves = [t for t, needed in zip((hidden, weight), trained, strict=True) if needed]
    for leaf in leaves:
        leaf.requires_grad_()

    def step(budget):
        with torch.autocast("cpu", dtype):
            loss = linear_cross_entropy(hidden, weight, target, options=Options(memory_budget=budget))
        return [loss.detach(), *(torch.autograd.grad(loss, leaves) if leaves else ())]

    gradients = sum(4 * leaf.numel() for leaf in leaves)
    for budget in (2 * MIB, 4 * MIB):  # all of the weight takes 8 MiB in bf16
        of_rows = min(budget, plan.CPU_BUFFER_PER_THREAD * torch.get_num_threads())  # in cache
        assert peak_bytes(lambda budget=budget: step(budget)) <= gradients + budget + of_rows + 0.2 * MIB
    # what is converted by slices is the same number
    for a, b in zip(step(2 * MIB), step(None), strict=True):
        assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().amax().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward", "rows"])
@pytest.mark.parametrize("shape", [(512, 16384, 256), (512, 4096, 64), (256, 16384, 1024)], ids=str)
def test_measured_memory_is_in_the_range_that_explain_names(shape, kind, dtype, peak_bytes):
    n, v, d = shape
    hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
    leaves = [t.requires_grad_(kind == "rows") for t in (hidden, weight)]
    target = torch.randint(v, (n,))

    def step():
        loss = linear_cross_entropy(*leaves, target)
        return torch.autograd.grad(loss, leaves) if kind == "rows" else loss

    grads = (kind == "rows",) * 2 + (False,)
    case = plan.LinearCase(n, v, d, head.product_dtype(dtype, hidden.device).itemsize, "cpu", grads)
    made = plan.linear_plan(case, kind)
    low, high = (float(x) for x in re.search(r"(\d+)(?: to (\d+))? MiB with the gradients", made.explain()).groups(0))
    measured = peak_bytes(step) / MIB
    assert 0.85 * low <= measured <= 1.15 * max(low, high) + 1, made.explain()


def test_the_kind_is_chosen_with_the_element_size_of_the_products():
    """fp16 multiplies in fp32 on every device: more bytes a logit, and fewer rows are enough."""
    hidden, weight = torch.randn(600, 8, dtype=torch.float16), torch.randn(1000, 8, dtype=torch.float16)
    hidden.requires_grad_()
    target = torch.randint(1000, (600,))
    loss = linear_cross_entropy(hidden, weight, target, options=Options(memory_budget=800_000))
    assert loss.grad_fn.request.plan == "rows"
    loss = linear_cross_entropy(hidden, weight, target, options=Options(memory_budget=400_000))
    assert loss.grad_fn.request.plan == "vocab"
    case = plan.LinearCase(600, 1000, 8, 4, "cpu", (True, False, False), 800_000, converts=True)
    assert plan.linear_kind(case, False) == "rows"
    assert case.converted_bytes == 1000 * 8 * 4
