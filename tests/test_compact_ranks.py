# SPDX-License-Identifier: Apache-2.0
"""The compact fused head over the tokens of several ranks, and what it says to shards of the vocabulary; the numbers of
its plan; its kernels' machine code."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compact_cases import V, gradients, make, of_two_ranks
from pool import Pool
from torch.testing import assert_close

from fused_ppl import Options, linear_cross_entropy, plan
from fused_ppl.backends import presence

BUDGETS = Path(__file__).parents[1] / "bench" / "compact_budgets.py"


def test_ranks_give_the_loss_and_the_gradient_of_the_whole_batch(pool: Pool) -> None:
    parts = pool.run(2, of_two_ranks)
    tensors, target = make()
    exact, true = gradients(linear_cross_entropy, tensors, target)
    for loss, (hidden, *_) in parts:
        assert_close(loss, exact, rtol=1e-6, atol=0)
        assert hidden.shape[0] in (18, 19)
    # DDP averages what each rank multiplied by the number of ranks
    assert_close(torch.cat([g[0] for _, g in parts]) / 2, true[0], rtol=1e-4, atol=1e-6)
    for i in (1, 2):
        assert_close(sum(g[i] for _, g in parts) / 2, true[i], rtol=1e-4, atol=1e-6)


def test_the_plan_explains_itself_with_its_numbers():
    asked = plan.Compact(None, 1 / 8, None)
    case = plan.LinearCase(2048, 50304, 768, 4, "cpu", (True, True, False), None, asked)
    made = plan.linear_plan(case, plan.linear_kind(case, per_token=False))
    assert made.kind == "compact" and made.columns == 6288
    assert made.flops == 2 * 2048 * 768 * (50304 + 2 * 6288)
    screened = plan.linear_plan(dataclasses.replace(case, compact=plan.Compact(None, 1 / 8, "int8")), "compact")
    assert (screened.cheap_flops, screened.flops) == (2 * 2048 * 768 * 50304, 2 * 2048 * 768 * 3 * 6288)
    tight = dataclasses.replace(case, memory_budget=made.saved_bytes + made.temporary_bytes - 1)
    assert "over the budget" in plan.linear_plan(tight, "compact").explain() and "over" not in made.explain()
    for words in ("plan compact", "6288 columns kept", "GFLOP"):
        assert words in made.explain()
    assert "of the screen" in screened.explain()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_kernels_keep_their_budgets(target):
    """In a process of its own: the interpreter, where it is on, replaces the compiler."""
    if presence.TRITON_PROBLEM:
        pytest.skip(presence.TRITON_PROBLEM)
    if target not in importlib.import_module("aot").TARGETS:
        pytest.skip("this Triton compiles for AMD with the linker of ROCm, which is not here")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BUDGETS), "--check", "--target", target]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_columns_of_a_small_vocabulary():
    """K is never less than the rows of a group, whose targets are all kept, nor more than V."""
    tensors, target = make()
    _, found = gradients(linear_cross_entropy, tensors, target, options=Options(gradient_columns=V + 50))
    _, true = gradients(linear_cross_entropy, tensors, target)
    assert_close(found[1], true[1], rtol=1e-5, atol=1e-7)
