# SPDX-License-Identifier: Apache-2.0
"""The machine code of the kernels, compiled ahead of time without a GPU, stays within bench/budgets.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are compiled by triton; it is in the extra `test`")
BUDGETS = Path(__file__).parents[1] / "bench" / "budgets.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the interpreter, where it is on, replaces the compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BUDGETS), "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)


def test_every_kernel_has_a_budget():
    import budgets

    files = {path.stem.removeprefix("nll_") for path in BUDGETS.parents[1].glob("kernels/nll_*.py")}
    assert files == set(budgets.KERNELS)
    assert set(budgets.BUDGETS) == {(kernel, dtype) for kernel in files for dtype in budgets.NAMES}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_dtype_and_odd_vocabularies_keep_the_budgets(target):
    done = check("--target", target)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_option_spills(target):
    done = check("--options", "--target", target)
    assert done.returncode == 0, done.stdout + done.stderr
