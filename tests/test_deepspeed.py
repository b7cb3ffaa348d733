# SPDX-License-Identifier: Apache-2.0
"""A patched model under DeepSpeed's ZeRO-3, which gathers the weight of the head for its module's call alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed (pip install deepspeed)", allow_module_level=True)
RANKS = Path(__file__).with_name("deepspeed_ranks.py")


def losses(kind: str, head: str) -> list[float]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RANKS)]
    done = subprocess.run(
        [*run, kind, head],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("losses "))
    return [float(value) for value in line.split()[1:]]


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_a_patched_model_trains_under_zero_3_as_the_native_one(head):
    """The second and third loss also show that the gradients of the steps before were right."""
    native, patched = losses("native", head), losses("patched", head)
    assert len(native) == 3 and native[0] != native[2]
    assert patched == pytest.approx(native, rel=1e-4)
