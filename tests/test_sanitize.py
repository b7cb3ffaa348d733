# SPDX-License-Identifier: Apache-2.0
"""bench/sanitize.py catches what is planted, in toy kernels and in our own, and lets through what is in order."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the sanitizer watches Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import sanitize  # noqa: E402
from kernel_cases import check, config_of, make  # noqa: E402

from fused_ppl.kernels import grid_reduction, row_tiles  # noqa: E402


@pytest.fixture(autouse=True)
def _sanitized():
    with sanitize.installed():
        yield


@triton.jit
def copy_kernel(out_ptr, in_ptr, n, last, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(in_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x, mask=offs < last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_in_order_passes(dtype):
    x, out = torch.arange(37.0, dtype=dtype), torch.zeros(37, dtype=dtype)
    copy_kernel[(3,)](out, x, 37, 37, 16)
    assert torch.equal(out, x)


def test_a_store_out_of_bounds_is_caught():
    with pytest.raises(Exception, match=r"copy_kernel, program \(2, 0, 0\): store byte 148 .* out_ptr, outside"):
        copy_kernel[(3,)](torch.zeros(37), torch.zeros(37), 37, 38, 16)


def test_a_load_out_of_bounds_is_caught():
    for x in (torch.zeros(37), torch.zeros(48)[:37]):
        with pytest.raises(Exception, match=r"load byte 148 .* in_ptr, outside"):
            copy_kernel[(3,)](torch.zeros(37), x, 38, 37, 16)


def test_a_store_between_the_rows_of_a_view_is_caught():
    """Within the allocation, where a sanitizer of allocations sees nothing."""
    with pytest.raises(Exception, match=r"store byte 20 .* outside of the elements"):
        copy_kernel[(1,)](torch.zeros(4, 8)[:, :5], torch.zeros(16), 16, 16, 16)


@triton.jit
def same_place_kernel(out_ptr, STRIDE: tl.constexpr, LANE: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * STRIDE + tl.arange(0, 4) * LANE, 1.0)


def test_two_programs_that_write_the_same_element_are_caught():
    same_place_kernel[(4,)](torch.zeros(16), 4, 1)
    with pytest.raises(Exception, match=r"program \(1, 0, 0\): stores .* which another program writes"):
        same_place_kernel[(4,)](torch.zeros(16), 3, 1)


def test_two_lanes_that_write_the_same_element_are_caught():
    with pytest.raises(Exception, match="two lanes"):
        same_place_kernel[(1,)](torch.zeros(16), 4, 0)


@triton.jit
def neighbour_kernel(out_ptr, SHIFT: tl.constexpr, WRITES_FIRST: tl.constexpr):
    row, rows = tl.program_id(0), tl.num_programs(0)
    if WRITES_FIRST:
        tl.store(out_ptr + row, 1.0)
    x = tl.load(out_ptr + (row + rows - SHIFT) % rows)
    tl.store(out_ptr + rows + row, x)
    if not WRITES_FIRST:
        tl.store(out_ptr + row, 1.0)


@pytest.mark.parametrize(
    ("shift", "first", "why"),
    [(1, True, "loads .* which another program writes"), (1, False, "loads .* which another program writes"),
     (-1, False, "stores .* which another program loads")],
    ids=["after the write", "after the write of another", "before the write"],
)  # fmt: skip
def test_a_read_of_what_another_program_writes_is_caught(shift, first, why):
    with pytest.raises(Exception, match=why):
        neighbour_kernel[(4,)](torch.zeros(8), shift, first)


def test_a_read_of_what_the_program_has_stored_needs_a_barrier():
    """Another thread may have stored it."""
    with pytest.raises(Exception, match="no barrier in between"):
        neighbour_kernel[(4,)](torch.zeros(8), 0, True)
    neighbour_kernel[(4,)](torch.zeros(8), 0, False)


@triton.jit
def last_arriver_kernel(
    out_ptr, parts_ptr, counter_ptr, BARRIER: tl.constexpr, SEM: tl.constexpr, OWN: tl.constexpr = True
):
    row, rows = tl.program_id(0), tl.num_programs(0)
    tl.store(parts_ptr + row, row)
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem=SEM) == rows - 1:
        offs = tl.arange(0, 4)
        tl.store(out_ptr, tl.sum(tl.load(parts_ptr + offs, mask=OWN | (offs != row), other=0), 0))


def arrive_last(**keywords):
    parts, out = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    last_arriver_kernel[(4,)](out, parts, torch.zeros(1, dtype=torch.int32), **keywords)
    return out.item()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_last_to_arrive_may_read_what_all_have_stored(order):
    with sanitize.installed(order):
        assert arrive_last(BARRIER=True, SEM="acq_rel") == 6


@pytest.mark.parametrize(
    ("barrier", "sem"), [(False, "acq_rel"), (True, "relaxed"), (True, "release"), (True, "acquire")]
)
def test_an_arrival_without_its_barrier_or_its_order_is_caught(barrier, sem):
    with pytest.raises(Exception, match="which another program writes"):
        arrive_last(BARRIER=barrier, SEM=sem)


def test_the_barrier_is_there_for_what_the_other_threads_have_stored():
    """The thread that releases has not stored all of it, and waits for the others."""
    assert arrive_last(BARRIER=True, SEM="acq_rel", OWN=False) == 3
    with pytest.raises(Exception, match="which another program writes"):
        arrive_last(BARRIER=False, SEM="acq_rel", OWN=False)


@triton.jit
def arrive_without_a_barrier(counter_ptr, expected):
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1


@triton.jit
def arrive_without_an_order(counter_ptr, expected):
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="relaxed") == expected - 1


@pytest.mark.parametrize("broken", [arrive_without_a_barrier, arrive_without_an_order])
@pytest.mark.parametrize("slices", [1, 2])
def test_our_own_arrival_without_its_barrier_or_its_order_is_caught(monkeypatch, broken, slices):
    case = make(3, 700, torch.bfloat16)
    check(case, config_of(case, slices))
    monkeypatch.setattr(grid_reduction, "arrive", broken)
    with pytest.raises(Exception, match=r"which another program writes|no barrier in between"):
        check(case, config_of(case, slices))


@triton.jit
def edge_columns_one_too_many(head, body, V, first_tile, T: tl.constexpr):
    lane = tl.arange(0, T)[None, :, None]
    columns = tl.where(lane < 8, lane, head + body + lane - 8)
    before, after = tl.where(first_tile == 0, head, 0), tl.where(first_tile == 0, V + 1, 0)
    return columns, tl.where(lane < 8, lane < before, (lane < 16) & (columns < after))


def test_our_own_edge_of_one_column_too_many_is_caught(monkeypatch):
    monkeypatch.setattr(row_tiles, "edge_columns", edge_columns_one_too_many)
    case = make(3, 301, torch.bfloat16, offset=3, pad=1)
    with pytest.raises(Exception, match=r"load .* logits_ptr, outside"):
        check(case)
