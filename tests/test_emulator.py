# SPDX-License-Identifier: Apache-2.0
"""Does the emulated GPU do what PTX says, and does it find faults? `pytest --emulate sm_90 tests/test_emulator.py`.

Simple kernels are compared with PyTorch. Faults are planted in them and in the package's own kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import on_device
import pytest
import torch
from torch.testing import assert_close

if on_device.emulated is None:
    pytest.skip("it tests the emulated GPU: pytest --emulate sm_90", allow_module_level=True)
import kernel_cases
import triton
import triton.language as tl
from emulator import Device, Fault

from fused_ppl.kernels import nll_backward, nll_forward

NAN = float("nan")


@pytest.fixture
def gpu() -> Iterator[Device]:
    assert on_device.emulated is not None
    with on_device.emulated.using():
        yield on_device.emulated


@triton.jit
def add_kernel(x, y, out, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + o, tl.load(x + o, mask=o < n) + tl.load(y + o, mask=o < n), mask=o < n)


@pytest.mark.parametrize("num_warps", [1, 4])
@pytest.mark.parametrize("n", [1, 100, 1000, 4096])
def test_masked_loads_and_stores(n: int, num_warps: int) -> None:
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n,), NAN)
    add_kernel[(triton.cdiv(n, 256),)](x, y, out, n, B=256, num_warps=num_warps)
    assert torch.equal(out, x + y)


@triton.jit
def softmax_kernel(x, out, V, stride, B: tl.constexpr):
    o = tl.arange(0, B)
    z = tl.load(x + tl.program_id(0) * stride + o, mask=o < V, other=float("-inf")).to(tl.float32)
    e = tl.exp(z - tl.max(z, 0))
    tl.store(out + tl.program_id(0) * stride + o, (e / tl.sum(e, 0)).to(out.dtype.element_ty), mask=o < V)


@pytest.mark.parametrize("num_warps", [1, 2, 8])
@pytest.mark.parametrize("v", [1, 33, 700, 1024])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
def test_reductions_in_shuffles_and_shared_memory(dtype: torch.dtype, v: int, num_warps: int) -> None:
    x = torch.randn(5, v + 3).to(dtype)[:, :v]
    out = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    softmax_kernel[(5,)](x, out, v, x.stride(0), B=1024, num_warps=num_warps)
    assert_close(out.double(), x.double().softmax(1), rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-7)


@triton.jit
def transpose_kernel(x, out, N: tl.constexpr, M: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, M)
    t = tl.load(x + i[:, None] * M + j[None, :])
    tl.store(out + j[:, None] * N + i[None, :], tl.trans(t))


@pytest.mark.parametrize("num_warps", [1, 4])
@pytest.mark.parametrize("shape", [(16, 16), (32, 64), (64, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts_change_in_shared_memory(dtype: torch.dtype, shape: tuple[int, int], num_warps: int) -> None:
    x, out = torch.randn(shape).to(dtype), torch.zeros(shape[::-1], dtype=dtype)
    transpose_kernel[(1,)](x, out, N=shape[0], M=shape[1], num_warps=num_warps)
    assert torch.equal(out, x.T)


@triton.jit
def math_kernel(x, y, out, B: tl.constexpr):
    o = tl.arange(0, B)
    a, b = tl.load(x + o), tl.load(y + o)
    tl.store(out + o, tl.fma(a, b, a))
    tl.store(out + B + o, a / b)
    tl.store(out + 2 * B + o, tl.sqrt(tl.abs(a)))
    tl.store(out + 3 * B + o, tl.floor(a))
    tl.store(out + 4 * B + o, tl.exp2(a))
    tl.store(out + 5 * B + o, tl.log2(tl.abs(a)))
    tl.store(out + 6 * B + o, tl.exp(a.to(tl.float64)).to(tl.float32))
    tl.store(out + 7 * B + o, a.to(tl.bfloat16).to(tl.float32))
    tl.store(out + 8 * B + o, a.to(tl.float16).to(tl.float32))
    tl.store(out + 9 * B + o, tl.rsqrt(tl.abs(a)))
    tl.store(out + 10 * B + o, a.to(tl.int32).to(tl.float32))
    tl.store(out + 11 * B + o, tl.sort(a))


def test_floating_point() -> None:
    x, y = torch.randn(256) * 10, torch.randn(256)
    x[:4] = torch.tensor([0.0, -0.0, 126.0, -126.0])
    out = torch.full((12, 256), NAN)
    math_kernel[(1,)](x, y, out, B=256)
    a, b = x.double(), y.double()
    want = [(a * b + a).float(), x / y, x.abs().sqrt(), x.floor(), a.exp2().float(), a.abs().log2().float()]
    want += [a.exp().float(), x.bfloat16().float(), x.half().float()]
    want += [a.abs().rsqrt().float(), x.trunc(), x.sort().values]
    for k, expected in enumerate(want):
        assert_close(out[k], expected, rtol=3e-7, atol=1e-7, msg=lambda text, k=k: f"row {k}: {text}")


@triton.jit
def integer_kernel(x, y, out, B: tl.constexpr):
    o = tl.arange(0, B)
    a, b = tl.load(x + o), tl.load(y + o)
    tl.store(out + o, a // b)
    tl.store(out + B + o, a % b)
    tl.store(out + 2 * B + o, (a.to(tl.int64) * b.to(tl.int64) >> 7).to(tl.int32))
    tl.store(out + 3 * B + o, a >> 3)
    tl.store(out + 4 * B + o, (a << 5) ^ b)
    tl.store(out + 5 * B + o, (a.to(tl.int64) // b.to(tl.int64)).to(tl.int32))
    tl.store(out + 6 * B + o, tl.minimum(a, b) + tl.maximum(a, b) * 3)
    c, d = a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)
    tl.store(out + 7 * B + o, (c // d).to(tl.int32, bitcast=True))
    tl.store(out + 8 * B + o, (c >> 3).to(tl.int32, bitcast=True))
    tl.store(out + 9 * B + o, a.to(tl.int16).to(tl.int32))


def test_integers() -> None:
    x, y = torch.randint(-(2**31), 2**31, (256,)), torch.randint(1, 5000, (256,))
    y[::2] *= -1
    out = torch.zeros(10, 256, dtype=torch.int32)
    integer_kernel[(1,)](x.int(), y.int(), out, B=256)
    low, unsigned = 2**32, (x % 2**32, y % 2**32)
    quotient = torch.div(x, y, rounding_mode="trunc")
    want = [quotient, x - quotient * y, x * y >> 7, x >> 3, (x << 5) ^ y, quotient]
    want += [torch.minimum(x, y) + torch.maximum(x, y) * 3, torch.div(*unsigned, rounding_mode="trunc")]
    want += [unsigned[0] >> 3, (x + 2**15) % 2**16 - 2**15]
    for k, expected in enumerate(want):
        assert torch.equal(out[k].long() % low, expected % low), k


@triton.jit
def histogram_kernel(x, out, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(out + tl.load(x + o, mask=o < n, other=0), 1, mask=o < n)


def test_atomics() -> None:
    x, out = torch.randint(0, 10, (1000,)), torch.zeros(10, dtype=torch.int32)
    histogram_kernel[(4,)](x, out, 1000, B=256)
    assert torch.equal(out.long(), torch.bincount(x, minlength=10))


@triton.jit
def last_kernel(x, parts, counter, out, B: tl.constexpr, SEM: tl.constexpr):
    i, o = tl.program_id(0), tl.arange(0, B)
    tl.store(parts + i * B + o, tl.load(x + i * B + o) * 2)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1:
        total = tl.zeros((B,), tl.float32)
        for k in range(tl.num_programs(0)):
            total += tl.load(parts + k * B + o, cache_modifier=".cg")
        tl.store(out + o, total)


def sum_by_the_last_program(sem: str) -> None:
    x, parts, out = torch.randn(40 * 256), torch.full((40 * 256,), NAN), torch.zeros(256)
    last_kernel[(40,)](x, parts, torch.zeros(1, dtype=torch.int32), out, B=256, SEM=sem, num_warps=4)
    assert_close(out, 2 * x.view(40, 256).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", [(1, 0), (4, 30), (7, 300)], ids=str)
def test_the_last_program_sees_what_all_others_have_stored(gpu: Device, schedule: tuple[int, int]) -> None:
    for seed in range(5):
        with gpu.using(resident=schedule[0], quantum=schedule[1], shuffle=1, seed=seed):
            sum_by_the_last_program("acq_rel")


@pytest.mark.parametrize("sem", ["relaxed", "release", "acquire"])
def test_atomics_that_order_less_are_a_race(sem: str) -> None:
    with pytest.raises(Fault, match="race: read after a write"):
        sum_by_the_last_program(sem)


@triton.jit
def neighbours_kernel(x, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x + o, tl.load(x + o + 1))


def test_a_program_that_reads_what_another_writes_is_a_race() -> None:
    with pytest.raises(Fault, match="race"):
        neighbours_kernel[(4,)](torch.randn(4 * 256 + 1), B=256, num_warps=4)


def test_an_element_beyond_the_end_is_out_of_bounds() -> None:
    x, y, out = torch.randn(300), torch.randn(300), torch.zeros(300)
    with pytest.raises(Fault, match="load of 4 bytes out of bounds"):
        add_kernel[(2,)](x, y, out, 301, B=256)
    with pytest.raises(Fault, match="store of 4 bytes out of bounds"):
        add_kernel[(2,)](x, y, out[:299].clone(), 300, B=256)


def test_an_element_between_rows_is_out_of_bounds() -> None:
    x = torch.randn(2, 40)[:, :39]
    with pytest.raises(Fault, match="out of bounds"):
        softmax_kernel[(2,)](x, x, 40, 40, B=64)


@triton.jit(do_not_specialize=["n"])
def claims_alignment_kernel(x, out, n, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out + o, tl.load(tl.multiple_of(x + n, 16) + o))


def test_a_vector_at_an_odd_address_is_misaligned() -> None:
    with pytest.raises(Fault, match="misaligned load of 16 bytes"):
        claims_alignment_kernel[(1,)](torch.randn(1025), torch.zeros(1024), 1, B=1024)


@triton.jit
def endless_kernel(x):
    while tl.load(x, volatile=True) == 0:
        pass


def test_a_loop_that_does_not_end_is_stopped(gpu: Device) -> None:
    with gpu.using(max_instructions=10_000), pytest.raises(Fault, match="more than 10000 instructions"):
        endless_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


# ---- faults planted in PTX


@pytest.fixture
def edited(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], str]], None]]:
    """From here on the programs of these kernels are loaded with a change of their PTX."""
    kernels = (softmax_kernel, nll_forward.nll_forward_kernel, nll_backward.nll_backward_kernel)
    original, changes = gpu.program, 0

    def forget() -> None:
        for kernel in kernels:
            kernel.device_caches.clear()

    def edit(change: Callable[[str], str]) -> None:
        def program(ptx: str) -> int:
            nonlocal changes
            changes += change(ptx) != ptx
            return original(change(ptx))

        forget()
        monkeypatch.setattr(gpu, "program", program)

    yield edit
    forget()
    assert changes, "the change has changed no program"


def without(pattern: str) -> Callable[[str], str]:
    return lambda ptx: re.sub(pattern, "", ptx)


def test_a_missing_barrier_is_a_race_in_shared_memory(edited: Callable[..., None]) -> None:
    edited(without(r"bar\.sync\s+0;"))
    with pytest.raises(Fault, match="race"):
        softmax_kernel[(5,)](torch.randn(5, 1000), torch.empty(5, 1000), 1000, 1000, B=1024, num_warps=16)


def test_a_shuffle_without_some_of_its_lanes_is_a_fault(edited: Callable[..., None]) -> None:
    edited(lambda ptx: re.sub(r"(\n\s+)(shfl\.sync\.bfly)", r"\1@%p1 \2", ptx))
    with pytest.raises(Fault, match="do not take part"):
        softmax_kernel[(1,)](torch.randn(1, 3), torch.empty(1, 3), 3, 3, B=1024, num_warps=1)


def unordered(ptx: str) -> str:
    """Without the barriers that stand before an atomic."""
    lines = ptx.split("\n")
    for k, line in enumerate(lines):
        if "atom." in line:
            lines[k - 25 : k] = [re.sub(r"bar\.sync\s+0;", "", before) for before in lines[k - 25 : k]]
    return "\n".join(lines)


# change of the PTX, what reports it: a fault, or wrong numbers
PLANTED = {
    "no barrier before the atomics": (unordered, "race"),
    "relaxed atomics": (lambda t: t.replace("gpu.acq_rel", "gpu.relaxed"), "race"),
    "atomics that only release": (lambda t: t.replace("gpu.acq_rel", "gpu.release"), "race"),
    "atomics that only acquire": (lambda t: t.replace("gpu.acq_rel", "gpu.acquire"), "race"),
    "no barrier": (without(r"bar\.sync\s+0;"), "race"),
    "another lane of a shuffle": (lambda t: re.sub(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 16,", r"\1, 8,", t), None),
    "vectors one element early": (
        lambda t: re.sub(r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+ )0 ", r"\g<1>-4 ", t),
        "misaligned",
    ),
    "a mask forgotten": (lambda t: re.sub(r"@%p\d+ (ld\.global\.v4)", r"\1", t), "out of bounds"),
}


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("stats", [False, True])
def test_planted_faults_are_found(gpu: Device, edited: Callable[..., None], plant: str, stats: bool) -> None:
    change, found = PLANTED[plant]
    case = kernel_cases.make(6, 9001, torch.bfloat16, offset=3, pad=3, ignored=0)
    config = kernel_cases.launch.choose_config(6, 9001, 2, kernel_cases.launch.Device(132), register_pressure=stats)
    kernel_cases.check(case, config, stats)
    edited(change)
    with gpu.using(shuffle=1), pytest.raises((Fault, AssertionError), match=found):
        kernel_cases.check(case, config, stats)
