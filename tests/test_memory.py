# SPDX-License-Identifier: Apache-2.0
"""Large buffers on a CPU come from the system itself, and are tensors like any other."""

from __future__ import annotations

import copy
import io
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_ppl
from fused_ppl.engines import memory
from fused_ppl.testing import make_logits, make_target

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1)
    monkeypatch.setattr(memory, "_idle", [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4), (2, 3, 4)], ids=str)
def test_shape_dtype_layout_and_alignment(shape, dtype):
    buffer = memory.empty(shape, dtype, CPU)
    assert buffer.shape == shape and buffer.dtype == dtype and buffer.is_contiguous() and buffer.storage_offset() == 0
    if buffer.numel():
        assert buffer.data_ptr() % 64 == 0
    buffer.fill_(2)
    assert buffer.sum() == 2 * buffer.numel()


def test_two_buffers_share_nothing_and_outlive_their_makers():
    a, b = (memory.empty((1000,), torch.float32, CPU).fill_(i) for i in (1, 2))
    assert a.sum() == 1000 and b.sum() == 2000


def test_a_buffer_waits_for_the_next_step_and_is_lent_to_one_tensor_at_a_time():
    first = memory.empty((1000,), torch.float32, CPU)
    place, view = first.data_ptr(), first[10:20]
    del first
    other = memory.empty((1000,), torch.float32, CPU)
    assert other.data_ptr() != place  # a view of the first is alive
    del view
    again = memory.empty((400,), torch.float64, CPU)  # a little smaller, and of another type
    assert again.data_ptr() == place and again.shape == (400,)
    assert memory.empty((1000,), torch.float32, CPU).data_ptr() != place


def test_what_lives_for_a_call_may_lie_in_a_much_larger_buffer():
    first = memory.empty((2000,), torch.uint8, CPU)
    place = first.data_ptr()
    del first
    assert memory.empty((100,), torch.uint8, CPU, brief=True).data_ptr() == place
    assert memory.empty((2000,), torch.uint8, CPU).data_ptr() == place  # whole again


def test_a_limit_of_its_own(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1000)
    for least, waits in ((None, 0), (100, 1), (101, 1)):
        tensor = memory.empty((100,), torch.uint8, CPU, least=least)
        del tensor
        assert len(memory._idle) == waits


def test_a_tensor_keeps_no_buffer_much_larger_than_itself():
    del_me = memory.empty((2000,), torch.uint8, CPU)
    del del_me
    assert memory.empty((1000,), torch.uint8, CPU).untyped_storage().nbytes() < 1100


def test_what_fits_nothing_is_given_back():
    del_me = memory.empty((9000,), torch.uint8, CPU)
    del del_me
    for _ in range(memory.IDLE_REQUESTS + 1):
        memory.empty((10,), torch.uint8, CPU)
    assert [b.nbytes for _, b in memory._idle] == [10]


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(memory, "IDLE_LIMIT", 2500)
    del_me = [memory.empty((n,), torch.uint8, CPU) for n in (1000, 2000)]
    del del_me[:]
    assert sum(b.nbytes for _, b in memory._idle) <= 2500


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_fork_starts_with_nothing():
    """Another thread of the parent may hold the lock at that moment, for ever in the child."""
    del_me = memory.empty((9000,), torch.uint8, CPU)
    del del_me
    held, done = threading.Event(), threading.Event()

    def hold():
        with memory._lock:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        # an exception here would run the rest of the suite twice
        signal.alarm(10)
        os._exit(0 if not memory._idle and memory.empty((9000,), torch.uint8, CPU).numel() == 9000 else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0


def test_fakes_take_no_memory_and_do_not_fix_a_size(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1000)
    torch._dynamo.reset()
    loss_of = torch.compile(fused_ppl.linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(5, 4)
    for reduction in ("mean", "none"):
        for n in range(300, 312):
            hidden = torch.randn(n, 4, requires_grad=True)
            loss = loss_of(hidden, weight.clone().requires_grad_(), torch.zeros(n).long(), reduction=reduction)
            loss.sum().backward()
    with FakeTensorMode():
        hidden, weight = (torch.empty(s, requires_grad=True) for s in ((30, 40), (50, 40)))
        monkeypatch.setattr(memory, "_take", None)
        fused_ppl.linear_cross_entropy(hidden, weight, torch.zeros(30, dtype=torch.int64)).backward()


def test_gradients_that_are_kept_are_not_written_over():
    logits, target = make_logits((6, 37)), make_target((6,), 37)
    kept = []
    for step in range(4):
        x = (logits + step).requires_grad_()
        (fused_ppl.perplexity(x, target) * (step + 1)).backward()
        kept.append((x.grad, x.grad.clone()))
    assert all(torch.equal(gradient, copied) for gradient, copied in kept)


def test_threads_do_not_share_a_buffer():
    def work(i):
        for _ in range(200):
            buffer = memory.empty((5000,), torch.int64, CPU).fill_(i)
            assert bool((buffer == i).all())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_gradients_on_such_a_buffer_are_those_on_any_other(monkeypatch):
    logits, target = make_logits((6, 37)), make_target((6,), 37)
    hidden, weight = torch.randn(6, 8), torch.randn(37, 8)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (logits, hidden, weight)]
        fused_ppl.perplexity(leaves[0], target).backward()
        fused_ppl.linear_perplexity(leaves[1], leaves[2], target).backward()
        return [leaf.grad for leaf in leaves]

    large = gradients()
    monkeypatch.setattr(memory, "LARGE", 2**60)
    assert all(torch.equal(a, b) for a, b in zip(large, gradients(), strict=True))


def test_a_gradient_can_be_copied_saved_and_changed_in_place():
    logits = make_logits((6, 37)).requires_grad_()
    fused_ppl.perplexity(logits, make_target((6,), 37)).backward()
    copied = copy.deepcopy(logits.grad)
    stream = io.BytesIO()
    torch.save(logits.grad, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream), copied)
    logits.grad.mul_(2)
    assert torch.equal(logits.grad, 2 * copied)
