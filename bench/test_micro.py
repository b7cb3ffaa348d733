# SPDX-License-Identifier: Apache-2.0
"""The micro-benchmarks for pytest-benchmark, by the same gate, inputs and steps as run.py.

pytest bench/                                          all; grouped by op, case and dtype
pytest bench/ -k smoke                                 seconds; CI runs it
pytest bench/ --benchmark-autosave                     and later --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Callable

import gate
import measure
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, Setting, make_inputs
from providers import Provider, all_providers, eager

import fused_ppl

pytest.importorskip("pytest_benchmark", reason="the extra `bench` has it")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = {"smoke": 30, "gpt2-cpu": 5}
TINY = ((8, 16), (1, 2), (32, 128))  # overhead decides: a few classes, a small image task


def _settings() -> list[tuple[Setting, Provider]]:
    return [
        (setting, provider)
        for case in ROUNDS
        for op in ("logits", "linear")
        for dtype in ("fp32", "bf16")
        for setting in [Setting(op, CASES[case], dtype, device=DEVICE)]
        for provider in all_providers()
        if provider.belongs(setting)
    ]


@pytest.mark.parametrize(
    ("setting", "provider"),
    [pytest.param(s, p, id=f"{s.op}-{s.case.name}-{s.dtype}-{p.name}".replace(" ", "_")) for s, p in _settings()],
)
def test_forward_and_backward(benchmark, setting: Setting, provider: Provider) -> None:
    benchmark.group = f"{setting.op} {setting.case.name} {setting.dtype}"
    if (why := provider.refusal(setting)) is not None:
        pytest.skip(why)
    torch._dynamo.reset()
    inputs, loss = make_inputs(setting), provider.make(setting)
    truth = gate.truth_of(setting, inputs)
    error = gate.error_of(loss, setting, truth, provider.in_place)
    tolerated = gate.error_of(eager(setting), setting, truth)
    if (why := gate.verdict(error, tolerated, setting, truth.nll)) is not None:
        pytest.skip(f"no time for it: {why}")
    benchmark.extra_info |= {"value_error": error.value, "gradient_error": error.gradient}
    turns = measure.rotation(inputs, 2)
    if provider.in_place:
        turns = measure.not_leaves(turns, 2)
    _run(benchmark, measure.steps("both", loss, turns), ROUNDS[setting.case.name])


def _run(benchmark, prepare: Callable[[], measure.Run], rounds: int) -> None:
    benchmark.pedantic(lambda run: run(), setup=lambda: ((prepare(),), {}), rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize(("n", "v"), TINY, ids=lambda size: str(size))
def test_overhead_of_tiny_inputs(benchmark, op: str, n: int, v: int) -> None:
    """Over F.cross_entropy, forward and backward, on the same input in the same rounds."""
    setting = Setting(op, Case("tiny", n, v, 16), "fp32", objective="cross_entropy")
    inputs = make_inputs(setting)
    if op == "logits":
        losses = {"fused_ppl": fused_ppl.cross_entropy, "torch": F.cross_entropy}
    else:
        losses = {
            "fused_ppl": fused_ppl.linear_cross_entropy,
            "torch": lambda h, w, t: F.cross_entropy(F.linear(h, w), t),
        }
    turns = measure.rotation(inputs, 2)
    prepare = {name: measure.steps("both", loss, turns) for name, loss in losses.items()}
    seconds = measure.interleaved(prepare, rounds=300)
    ratio = measure.paired_ratio(seconds["fused_ppl"], seconds["torch"])
    benchmark.extra_info["over_torch"] = ratio
    benchmark.group = f"overhead, {op} {n} x {v}: {ratio:.1f} times F.cross_entropy"
    _run(benchmark, prepare["fused_ppl"], 100)
