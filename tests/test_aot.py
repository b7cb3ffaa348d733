# SPDX-License-Identifier: Apache-2.0
"""The machine code of the kernels, compiled ahead of time without a GPU, stays within bench/budgets.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_ppl.backends import presence

if presence.TRITON_PROBLEM:
    pytest.skip(presence.TRITON_PROBLEM, allow_module_level=True)
STATIC = Path(__file__).parents[1] / "bench" / "static.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the interpreter, where it is on, replaces the compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(STATIC), "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200, check=False)


def test_every_dtype_and_odd_vocabularies_keep_the_budgets():
    done = check("--fast")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_launch_configuration_and_every_option_keeps_its_promises():
    """No spill and no barrier in any, and fewer instructions than the peers that are installed."""
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr
