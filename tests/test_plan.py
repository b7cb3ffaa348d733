# SPDX-License-Identifier: Apache-2.0
"""Plans are pure functions of shape, dtype, needs, device and budget: tested as such."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from fused_ppl import plan

CASES = st.builds(
    plan.LinearCase,
    num_tokens=st.integers(0, 2**20),
    num_classes=st.integers(1, 300_000),
    hidden_size=st.integers(1, 16_384),
    itemsize=st.sampled_from([2, 4, 8]),
    device_type=st.sampled_from(["cpu", "cuda"]),
    grads=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    memory_budget=st.none() | st.integers(1, 2**36),
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


@given(CASES, st.integers(1, 2**36), st.integers(1, 2**36))
def test_more_budget_never_means_smaller_chunks_of_the_same_plan(case, a, b):
    less, more = sorted((a, b))
    kind = plan.linear_kind(with_budget(case, less), False)
    assume(kind == plan.linear_kind(with_budget(case, more), False))
    small, large = (plan.linear_plan(with_budget(case, budget), kind) for budget in (less, more))
    assert small.rows <= large.rows and small.columns <= large.columns


def test_explain_says_what_was_chosen_with_its_numbers():
    case = plan.LinearCase(8192, 128256, 4096, 2, "cuda", (True, True, False))
    made = plan.linear_plan(case, plan.linear_kind(case, per_token=False))
    assert made.kind == "rows" and made.rows == 2092
    assert made.saved_bytes == 128256 * 4096 * 4 + 8192 * 4096 * 4
    assert made.flops == 6 * 8192 * 128256 * 4096
    assert made.explain().startswith("plan rows: 2092 rows at a time; one upstream gradient for all tokens")
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
    rows = plan.rows_per_chunk(v, itemsize, "cpu", threads, budget)
    assert rows >= (1 if budget is not None else threads)
    assert budget is None or rows == 1 or rows * v * itemsize <= budget
