# SPDX-License-Identifier: Apache-2.0
"""Sums of e^z without the maximum, and rows in threads of our own: the right values wherever z lies."""

from __future__ import annotations

import os
import threading
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import Options, cross_entropy, linear_cross_entropy, perplexity
from fused_ppl.backends import torch_threads
from fused_ppl.testing import assert_as_good_as_eager

CHUNKS = Options(backend="torch", memory_budget=40_000)  # a few rows each
REFERENCE = Options(backend="reference")
N, V = 50, 1003
KINDS = ["usual", "large", "small", "both", "confident", "far", "masked", "infinite", "nan"]


def logits_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    z = 3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    if kind == "large":
        z += 95
    elif kind == "small":
        z -= 120
    elif kind == "both":  # some rows of each chunk are out of bounds
        z[::3] += 120
        z[1::3] -= 120
    elif kind == "confident":
        z[:, 5] += 60
    elif kind == "far":  # the target is the least likely class by far
        z[:, 5] -= 300
    elif kind == "masked":
        z[:, ::2] = -torch.inf
    elif kind == "infinite":
        z[:, 9] = -torch.inf
        z[3] = -torch.inf
        z[3, 5] = 2.0
    elif kind == "nan":
        z[::7] = torch.nan
    return z


def labels(kind: str) -> Tensor:
    target = torch.arange(N) % V
    target[::7] = -100
    target[1:9] = -100  # a chunk of them
    if kind in ("confident", "far", "infinite", "masked"):
        target[target != -100] = 5
    return target


@pytest.fixture
def our_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three of our threads, for logits of any size."""
    if not torch_threads._uses_openmp():
        pytest.skip("this torch has one number of threads for the process")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(torch_threads, "LEAST_LOGITS", 0)
    monkeypatch.setattr(torch_threads, "_calls_left", 10**9)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["pytorch", "own"])
def threads(request: pytest.FixtureRequest) -> None:
    """Rows in PyTorch's threads, or in ours."""
    if request.param == "own":
        request.getfixturevalue("our_threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keywords", [{}, {"softcap": 20.0, "logit_scale": 0.7}, {"z_loss": 0.01}], ids=str)
def test_from_logits(keywords, kind, dtype, threads):
    x, target, found = logits_of(kind).to(dtype), labels(kind), []
    upstream = torch.linspace(-1, 2, N)
    for of, options in ((dtype, CHUNKS), (torch.float32, REFERENCE), (torch.float64, REFERENCE)):
        z = x.to(of).requires_grad_()
        loss = cross_entropy(z, target, reduction="none", options=options, **keywords)
        found.append((loss.detach(), torch.autograd.grad(loss, z, upstream.to(loss))[0]))
    (value, gradient), (eager, wide), (truth, right) = found
    condition = 1 + x[x.isfinite()].abs().max().item()
    assert_as_good_as_eager(value, eager, truth, condition=condition)
    assert_as_good_as_eager(gradient, wide.to(dtype), right, condition=condition)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_from_logits(kind, threads):
    target, found = labels(kind), []
    for options in (CHUNKS, REFERENCE):
        z = logits_of(kind).requires_grad_()
        loss = cross_entropy(z, target, reduction="none", options=options)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), z)[0]))
    assert_close(*found, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS[:7])
@pytest.mark.parametrize("keywords", [{}, {"softcap": 20.0}, {"label_smoothing": 0.1}], ids=str)
def test_through_a_head(keywords, kind, dtype, threads):
    """Logits are the weight's columns: hidden states of one 1 each."""
    z, target = logits_of(kind)[:, :40].to(dtype), labels(kind) % 40
    if keywords and kind == "masked":
        pytest.skip("the other terms are infinite there")
    hidden, found = torch.eye(N, dtype=dtype), []
    for of, options in ((dtype, CHUNKS), (torch.float32, REFERENCE), (torch.float64, REFERENCE)):
        weight = z.t().contiguous().to(of).requires_grad_()
        loss = linear_cross_entropy(hidden.to(of), weight, target, reduction="sum", options=options, **keywords)
        found.append((loss.detach(), torch.autograd.grad(loss, weight)[0]))
    (value, gradient), (eager, wide), (truth, right) = found
    condition = 1 + z[z.isfinite()].abs().max().item()
    assert_as_good_as_eager(value, eager, truth, condition=condition)
    assert_as_good_as_eager(gradient, wide.to(dtype), right, condition=condition)


# --- our threads -----------------------------------------------------------------------------------------------------


def both_ways(call: Callable[[], tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    results = []
    for left in (0, 10**9):
        monkeypatch.setattr(torch_threads, "LEAST_LOGITS", 0 if left else 10**18)
        monkeypatch.setattr(torch_threads, "_calls_left", left)
        results.append(call())
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 60_000), (200, 513), (3, 50, 129), (1, 300)], ids=str)
@pytest.mark.skipif(not torch_threads._uses_openmp(), reason="this torch has one number of threads for the process")
def test_our_threads_have_the_bits_of_pytorch_s(shape, dtype, monkeypatch):
    torch.manual_seed(0)
    x, target = (4 * torch.randn(shape)).to(dtype), torch.randint(shape[-1], shape[:-1])
    hidden, weight = torch.randn(*shape[:-1], 8).to(dtype), torch.randn(shape[-1], 8).to(dtype)

    def from_logits() -> tuple[Tensor, ...]:
        z = x.clone().requires_grad_()
        loss = cross_entropy(z, target, class_dim=-1, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]

    def channels() -> tuple[Tensor, ...]:  # (N, C, d)
        z = x.movedim(-1, 1).contiguous().requires_grad_()
        loss = perplexity(z, target)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    def through_head() -> tuple[Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, target)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for call in (from_logits, channels, through_head):
        alone, ours = both_ways(call, monkeypatch)
        assert all(torch.equal(a, b) for a, b in zip(alone, ours, strict=True)), call.__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [300.0, -300.0, torch.nan])
def test_a_row_out_of_bounds_changes_no_other_row(value, dtype, our_threads, monkeypatch):
    """From logits and through a head, in one part and in three: the bits of the other rows are the same."""
    torch.manual_seed(0)
    x, target = (3 * torch.randn(100, 400)).to(dtype), torch.randint(400, (100,))
    changed = x.clone()
    changed[37, 5] = value
    if value == -300.0:
        changed[37] = value
    others = torch.arange(100) != 37

    def losses(z: Tensor) -> list[Tensor]:
        found = []
        for left in (0, 10**9):
            monkeypatch.setattr(torch_threads, "_calls_left", left)
            found.append(cross_entropy(z, target, reduction="none", options=CHUNKS))
            if value != value:  # 0 * NaN would reach all rows
                continue
            # logits are the weight's own numbers: hidden states of one 1 each
            weight = z.t().contiguous().requires_grad_()
            of_head = linear_cross_entropy(torch.eye(100, dtype=dtype), weight, target, reduction="sum", options=CHUNKS)
            found.append(torch.autograd.grad(of_head, weight)[0].t())
        return found

    for before, after in zip(losses(x), losses(changed), strict=True):
        assert torch.equal(before[others], after[others])


def test_our_threads_leave_everything_as_it_was(our_threads):
    """The numbers of threads, inference mode, errors, and a forked child."""
    x, target = torch.randn(40, 300), torch.arange(40)
    want = cross_entropy(x, target, options=REFERENCE)
    with torch.inference_mode():
        assert_close(cross_entropy(x.clone(), target), want)
    assert torch.get_num_threads() == 3
    of_new: list[int] = []
    new = threading.Thread(target=lambda: of_new.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert of_new == [3]
    with pytest.raises(IndexError, match="at flat position 17"):
        cross_entropy(x, target.index_fill(0, torch.tensor([17]), 300))
    if not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(cross_entropy(x, target), cross_entropy(x, target)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("share", "left"), [(1.0, 0), (0.8, 0), (0.5, torch_threads.CALLS)])
def test_a_thread_without_a_core_sends_the_next_calls_to_ours(share, left, monkeypatch):
    wall, own = iter([0.0, 1.0]), iter([0.0, share])
    clocks = types.SimpleNamespace(perf_counter=lambda: next(wall), thread_time=lambda: next(own))
    monkeypatch.setattr(torch_threads, "LEAST_LOGITS", 0)
    monkeypatch.setattr(torch_threads, "_calls_left", 0)
    monkeypatch.setattr(torch_threads, "_worth_it", lambda logits: True)
    monkeypatch.setattr(torch_threads, "time", clocks)
    cross_entropy(torch.randn(8, 5), torch.zeros(8, dtype=torch.long))
    assert torch_threads._calls_left == left
