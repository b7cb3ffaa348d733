# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_acceptance.py without a GPU: its plumbing runs, and it never pretends to have measured."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels run in triton's interpreter; it is in the extra `test`")

import gpu_checks
import gpu_device
import gpu_report
import gpu_times
import gpu_truth

import fused_ppl

BENCH = Path(__file__).parents[1] / "bench"


def acceptance(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu_acceptance.py"), *map(str, arguments)],
        env={**surroundings, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_dry_run_runs_every_check_and_keeps_no_result(tmp_path):
    done = acceptance("--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN, NOT MEASURED: made dry_run.json, dry_run.md, dry_run.png" in done.stdout
    assert not list(tmp_path.iterdir())
    lines = done.stdout.splitlines()
    names = acceptance("--list").stdout.splitlines()
    assert sum(line.startswith(("ok ", "skipped ")) for line in lines) == len(names) > 40
    skipped = [line for line in lines if line.startswith("skipped")]
    assert skipped and all(
        any(word in line for word in ("host synchronisation", "memory", "torch.compile", "not the current one"))
        for line in skipped
    )
    for provider in ("nll_forward", "nll_backward", "torch eager", "Liger", "cut-cross-entropy", "quack"):
        assert any(line.startswith("time ") and provider in line for line in lines), provider


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be measured")
def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path):
    done = acceptance("--out", tmp_path)
    assert done.returncode == 3 and done.stdout.startswith("NOT MEASURED")
    assert not list(tmp_path.iterdir())


PLANTED = """
import sys, gpu_acceptance, gpu_checks
def wrong(card, sizes): assert False, "planted"
gpu_checks.split_rows = wrong
gpu_checks.works = lambda card, sizes: {}
sys.argv = ["gpu_acceptance.py", "--dry-run", "--only", "w"]
sys.exit(gpu_acceptance.main())
"""


def test_a_check_that_fails_is_reported_and_the_others_run():
    path = os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PLANTED], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed  few rows, split over the vocabulary: AssertionError: planted" in done.stdout
    assert "ok      wild logits" in done.stdout
    assert "1 of " in done.stdout


@pytest.mark.parametrize("promise", ["deterministic", "graph", "two_streams", "two_graphs"])
def test_a_broken_promise_is_seen(promise):
    calls = itertools.count()
    work = gpu_checks.Work(lambda seed: None, lambda: (torch.tensor([next(calls)]),))  # other bits in every call
    with pytest.raises(AssertionError, match="has other bits"):
        getattr(gpu_checks, promise)(gpu_device.StandIn(), gpu_checks.DRY, lambda: work)


def test_memory_beyond_the_gradient_is_seen():
    class Greedy(gpu_device.StandIn):
        def peak_bytes(self, run):
            n, v = gpu_checks.DRY.beyond_int32[0]
            return n * v * 2 + 65 * 2**20

    with pytest.raises(AssertionError, match="65 MiB beyond the gradient"):
        gpu_checks.little_memory(Greedy(), gpu_checks.DRY)


def wrong_value(x, *args, loss, **keywords):
    value = loss(x, *args, **keywords)
    return value + 0.1 * value.detach()


def wrong_gradient(x, *args, loss, **keywords):
    """In one element beside the largest: from logits by less than the largest is rounded by."""
    y, share = x.clone(), 0.01 if loss is RIGHT["perplexity"] else 0.1

    def disturb(g):
        largest = g.abs().argmax()
        return torch.where(torch.arange(g.numel()).view(g.shape) == largest ^ 1, g + share * g.abs().max(), g)

    y.register_hook(disturb)
    return loss(y, *args, **keywords)


RIGHT = {name: getattr(fused_ppl, name) for name in ("perplexity", "linear_perplexity")}


@pytest.mark.parametrize("wrong", [None, wrong_value, wrong_gradient])
@pytest.mark.parametrize("name", RIGHT)
def test_a_wrong_value_or_gradient_is_seen(name, wrong, monkeypatch):
    loss = RIGHT[name]
    monkeypatch.setattr(
        gpu_truth, "TRITON", fused_ppl.Options(backend="torch")
    )  # the judge is on trial, not the kernels
    if wrong is not None:
        broken = functools.wraps(loss)(functools.partial(wrong, loss=loss))
        monkeypatch.setattr(fused_ppl, name, broken)
    n, v, d = 6, 40, 16
    if name == "perplexity":
        target = gpu_truth.make_target(n, v, torch.device("cpu"), 1)
        logits = gpu_truth.fill_logits(torch.empty(n, v, dtype=torch.bfloat16), target, 0)
        run = functools.partial(gpu_truth.judge_logits, fused_ppl.perplexity, logits, target, {}, chunk=4)
    else:
        inputs = gpu_checks.head_inputs(gpu_device.StandIn(), n, v, d)
        run = functools.partial(gpu_truth.judge_head, fused_ppl.linear_perplexity, *inputs, chunk=4)
    with contextlib.nullcontext() if wrong is None else pytest.raises(AssertionError):
        run()


def test_the_report_says_what_was_found(tmp_path):
    record = {
        "command": "python bench/gpu_acceptance.py", "card": {"name": "NVIDIA H100 80GB HBM3"}, "torch": "2.13.0",
        "triton": "3.9.0", "fused_ppl": "0", "date": "2026-01-01", "roofline": "data sheet", "copy_bandwidth": 3e12,
        "checks": [{"name": "graph", "status": "failed", "detail": "other bits", "seconds": 1.0}],
    }  # fmt: skip
    shape = (8192, 128256)
    timings = [
        gpu_times.Timing("logits", "fused_ppl", "forward", shape, "", (0.7, 0.75, 0.8), 2 * 8192 * 128256, 0, 0.9),
        gpu_times.Timing("logits", "quack", "", shape, "not installed (pip install quack-kernels)"),
        gpu_times.Timing("head", "fused_ppl", "forward", (4, 5, 6), "", (1.0, 2.0, 3.0), 0, 240, 0.5),
    ]
    made = gpu_report.write(tmp_path, "card", record, timings)
    text = (tmp_path / "card.md").read_text()
    assert "| graph | failed | other bits | 1.0 |" in text and "1 checks: 1 failed, 0 skipped" in text
    assert "| 8192, 128256 | fused_ppl | forward | 0.750 (0.700 to 0.800) | 2802 GB/s | 90% |" in text
    assert "| 8192, 128256 | quack | not installed (pip install quack-kernels) | | | |" in text
    assert len(json.loads((tmp_path / "card.json").read_text())["timings"]) == 3
    assert [p.suffix for p in made] == [".json", ".md", ".png"] and (tmp_path / "card.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "terabytes"),
    [
        ("NVIDIA A100-SXM4-80GB", 2.04),
        ("NVIDIA A100-SXM4-40GB", 1.555),
        ("NVIDIA A100 80GB PCIe", 1.935),
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H100 PCIe", 2.0),
        ("NVIDIA H200", 4.8),
        ("NVIDIA B200", 8.0),
        ("AMD Instinct MI300X", 5.3),
    ],
)
def test_named_cards_are_known_by_their_data_sheet(name, terabytes):
    class Named:
        stand_in = False

    Named.name = name
    assert gpu_times.roofline(Named()).bandwidth == pytest.approx(terabytes * 1e12)


def test_an_unknown_card_is_held_to_what_a_copy_reaches():
    class Unknown:
        name = "NVIDIA GeForce RTX 4090"
        stand_in = False

        def copy_bandwidth(self):
            return 0.9e12

    found = gpu_times.roofline(Unknown())
    assert found.bandwidth == 0.9e12 and found.source.startswith(gpu_times.UNKNOWN)
