# SPDX-License-Identifier: Apache-2.0
"""The machine code of the divergence kernel: instructions of each pass, 16-byte accesses, nothing spilled in a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

aot = pytest.importorskip("aot", reason="needs triton")
import budgets  # noqa: E402  (needs triton)

from fused_ppl.backends import triton_divergence  # noqa: E402  (needs triton)
from fused_ppl.kernels import divergence, launch  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
V = 128256
# instructions for each logit on sm_90: of the sums, of the divergence and of the gradient. The last two read both rows,
# and count the logits of both
LIMITS = {
    "forward": (9.1, 16.8, 16.8),
    "reverse": (9.1, 17.1, 9.2),
    "jensen_shannon": (9.1, 101.0, 55.0),  # expm1 and log1p of both gaps
}


def compiled(direction: str, dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(launch, "device_size", lambda device: launch.Device(132))

    def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    student, teacher = (empty(1, 8, V, dtype=dtype) for _ in range(2))
    call = aot.capture(
        divergence.divergence_kernel,
        lambda: divergence.launch_divergence(
            student,
            teacher,
            empty(8, dtype=torch.int64),
            rows=launch.DivergenceRows(empty(8)),
            upstream=launch.DivergenceUpstream(empty(8), None),
            out=student,
            student=launch.loss_scalars(),
            teacher=launch.loss_scalars(),
            direction=direction,
            beta=0.5,
            config=triton_divergence.divergence_config(student, direction),
            contiguous=True,
            ignore_index=-100,
        ),
    )
    return aot.read(aot.compile_call(divergence.divergence_kernel, call, aot.TARGETS[target]))


@pytest.mark.parametrize("direction", LIMITS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_budget_of_each_pass(dtype, direction, monkeypatch):
    found = compiled(direction, dtype, "sm_90", monkeypatch)
    *sums, last = found.loops
    widest = [loop.per_logit(dtype.itemsize) for loop in found.loops]
    of_sums, of_divergence, of_gradient = (limit * budgets.ALLOWANCE for limit in LIMITS[direction])
    assert last.stores and last.per_logit(dtype.itemsize) <= of_gradient, widest
    if direction == "forward":
        assert max(loop.per_logit(dtype.itemsize) for loop in sums) <= of_sums, widest
    else:
        assert sums[-1].per_logit(dtype.itemsize) <= of_divergence, widest
        assert max(loop.per_logit(dtype.itemsize) for loop in sums[:-1]) <= of_sums, widest
    for loop in found.loops:
        assert not loop.local and not loop.barriers
        assert {aot.access_bytes(op) for op in (*loop.loads, *loop.stores)} == {16}
    assert found.registers <= (64 if direction != "jensen_shannon" else 255)


@pytest.mark.parametrize("target", [name for name in aot.TARGETS if name != "sm_90"])
def test_it_compiles_for_every_target(target, monkeypatch):
    assert compiled("reverse", BF16, target, monkeypatch).instructions > 100
