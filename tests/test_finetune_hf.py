# SPDX-License-Identifier: Apache-2.0
"""examples/finetune_hf.py in its tiny version: the same losses native and patched, and the perplexity beside."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("transformers", "accelerate", "psutil", "tokenizers"):
    pytest.importorskip(needed, reason=f"the example needs {needed}")

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_hf.py"


def test_native_and_patched_losses_are_the_same_step_by_step(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(EXAMPLE), "--tiny", "--steps=3", "--length=32", "--accumulation=2", "--batch-size=2"]
    command += ["--learning-rate=1e-3", "--runs", "native", "patched", "perplexity", "--json", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(record.read_text())
    native, patched, perplexity = ([step["loss"] for step in runs[name]["steps"]] for name in runs)
    assert len(native) == 3 and native == pytest.approx(patched, abs=1e-5)
    assert native[2] < native[0]
    assert [math.exp(loss) for loss in perplexity] == pytest.approx(
        [step["perplexity"] for step in runs["perplexity"]["steps"]], rel=1e-5
    )
    assert all(len(run["seconds"]) == 3 for run in runs.values())
    assert "native and patched losses differ by at most" in done.stdout and "beyond the model" in done.stdout
