# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_acceptance.py loses nothing: a step that raises, breaks the device, crashes, hangs or does not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels run in triton's interpreter; it is in the extra `test`")

import gpu_acceptance
import gpu_process
import gpu_report

BENCH = Path(__file__).parents[1] / "bench"

# a child process whose card breaks, crashes or hangs in the step of that name
CHILD = """
import os, sys, time
import gpu_process
from gpu_device import StandIn
from test_acceptance_process import steps

class Card(StandIn):
    broken = False
    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    release = synchronize
    def is_healthy(self):
        return not self.broken

card = Card()
gpu_process.serve({step.key: step for step in steps(card)}, card)
"""


def steps(card) -> list[gpu_process.Step]:
    def breaks():
        card.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def raises():
        raise ValueError("planted")

    def crashes():
        os._exit(7)

    def hangs():
        time.sleep(1000)

    def slow():
        time.sleep(0.3)
        return gpu_process.Found("slow")

    def fine():
        return gpu_process.Found("fine", [{"group": "none"}])

    # (name, what it does, estimated seconds, in which order)
    found = [
        ("fine 1", fine, 1),
        ("raises", raises, 1),
        ("fine 2", fine, 1),
        ("sticky", breaks, 1),
        ("fine 3", fine, 1),
    ]
    found += [("crashes", crashes, 1), ("fine 4", fine, 1), ("hangs", hangs, 0.05), ("fine 5", fine, 1)]
    found += [(f"slow {i}", slow, 1) for i in range(20)] + [("too long", fine, 1000), ("fine 6", fine, 1)]
    return [gpu_process.Step(key, "checks", seconds, run) for key, run, seconds in found]


def record_of_steps() -> dict:
    return {
        "command": "c", "card": {"name": "a card"}, "torch": "0", "triton": "0", "fused_ppl": "0", "commit": "c",
        "date": "d", "seconds": 0.0, "results": {}, "left_out": [],
    }  # fmt: skip


def go(folder: Path, chosen, record=None, seconds: float = 60.0):
    """Runs steps in a child process, and returns the record that lies on the disk."""
    path = os.pathsep.join([str(BENCH), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    worker = gpu_process.Worker([sys.executable, "-c", CHILD], {**os.environ, "PYTHONPATH": path})
    record = record or record_of_steps()
    try:
        run = gpu_acceptance.Run(record, lambda r: gpu_report.write(folder, "r", r), seconds)
        run.go(chosen, worker)
    finally:
        worker.stop()
    return json.loads((folder / "r.json").read_text())


def named(*names: str) -> list[gpu_process.Step]:
    return [step for step in steps(None) if step.key in names]


def test_what_raises_breaks_the_device_or_crashes_takes_nothing_else_with_it(tmp_path):
    names = ("fine 1", "raises", "fine 2", "sticky", "fine 3", "crashes", "fine 4")
    found = go(tmp_path, named(*names))["results"]
    assert list(found) == list(names)
    assert all(found[name]["status"] == "ok" and found[name]["rows"] for name in names if name.startswith("fine"))
    assert found["raises"]["detail"] == "ValueError: planted" and not found["raises"]["ended"]
    assert "illegal memory access" in found["sticky"]["detail"] and "computes no more" in found["sticky"]["detail"]
    assert "code 7" in found["crashes"]["detail"]
    text = (tmp_path / "r.md").read_text()
    assert "3 failed" in text and "- raises: ValueError: planted" in text


def test_a_step_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_acceptance, "PATIENCE", 1.0)
    found = go(tmp_path, named("hangs", "fine 5"))["results"]
    assert found["hangs"]["detail"].startswith("no answer in") and found["fine 5"]["status"] == "ok"


def test_what_does_not_fit_is_named_and_a_later_run_goes_on(tmp_path):
    first = go(tmp_path, named("fine 1", "too long", "fine 6"))
    assert list(first["results"]) == ["fine 1", "fine 6"] and first["left_out"] == ["too long"]
    assert "did not fit" in (tmp_path / "r.md").read_text() and "- too long" in (tmp_path / "r.md").read_text()
    again = gpu_acceptance.resumed(tmp_path / "r.json")
    kept = dict(again["results"])
    second = go(tmp_path, named("fine 1", "too long", "fine 6"), again, seconds=2000)
    assert second["left_out"] == [] and list(second["results"]) == ["fine 1", "fine 6", "too long"]
    assert {key: second["results"][key] for key in kept} == kept  # not run again


KILLED = """
import sys, pathlib
import test_acceptance_process as t
t.go(pathlib.Path(sys.argv[1]), t.steps(None)[9:])
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_what_it_has_found(how, tmp_path):
    path = os.pathsep.join([str(BENCH), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    until = time.monotonic() + 100
    while time.monotonic() < until:
        report = tmp_path / "r.json"
        if report.exists() and len(json.loads(report.read_text())["results"]) > 2:  # never half a file
            break
        time.sleep(0.01)
    process.send_signal(how)
    process.wait()
    found = json.loads(report.read_text())["results"]
    assert 2 < len(found) < 20 and all(r["status"] == "ok" for r in found.values())
    assert len(list(tmp_path.glob("r.*"))) == 2


def test_the_order_is_that_of_value():
    found, _ = gpu_acceptance.all_steps(dry=True)
    groups = [step.group for step in found.values()]
    assert groups[0] == "card" and groups == sorted(groups, key=gpu_acceptance.GROUPS.index)
    assert "compiled" in groups[-1]
    first = [key for key, step in found.items() if step.group == "checks"]
    for kind in (
        "perplexity, N=",
        "misaligned",
        "linear_",
        "compact head",
        "determinism",
        "graph",
        "streams",
        "memory",
    ):
        assert any(kind in key for key in first), kind
