# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_acceptance.py without a GPU: its plumbing runs, and it never pretends to have measured."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels run in triton's interpreter; it is in the extra `test`")

from fused_ppl.backends import presence

if presence.TRITON_PROBLEM is not None:
    pytest.skip(presence.TRITON_PROBLEM, allow_module_level=True)

import gpu_checks
import gpu_device
import gpu_peers
import gpu_process
import gpu_report
import gpu_times
import gpu_tools
import gpu_truth
import test_acceptance_process

import fused_ppl
from fused_ppl import plan

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


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """What the whole prints, with every step; the folder of its results must stay empty."""
    folder = tmp_path_factory.mktemp("out")
    done = acceptance("--dry-run", "--out", folder)
    return done, list(folder.iterdir())


def test_a_dry_run_runs_every_step_and_keeps_no_result(dry_run):
    done, kept = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN, NOT MEASURED: made gpu_no_gpu_dry_run.json, gpu_no_gpu_dry_run.md" in done.stdout and not kept
    lines = done.stdout.splitlines()
    steps = [line for line in acceptance("--dry-run", "--list").stdout.splitlines() if line.startswith("  ")]
    # a peer may fail in the interpreter, and is told so; none of ours may
    assert sum(line.startswith(("ok ", "skipped ", "failed ")) for line in lines) == len(steps) > 100
    assert "0 of them ours; 0 did not fit" in done.stdout


def test_a_dry_run_says_why_a_step_is_skipped(dry_run):
    skipped = [line for line in dry_run[0].stdout.splitlines() if line.startswith("skipped")]
    reasons = ("only a GPU", "memory of a GPU", "on a CPU", "two GPUs", "not installed", "compiles for minutes", "2.13")
    reasons += ("a GPU alone", "need a GPU")
    assert skipped and all(any(reason in line for reason in reasons) for line in skipped), skipped


def test_the_estimates_fit_into_the_time_that_the_documentation_names():
    text = acceptance("--list").stdout
    page = (BENCH.parent / "docs" / "gpu.md").read_text()
    for group, count, seconds in re.findall(r"^(\S.*): (\d+) steps, (\d+) s estimated$", text, re.M):
        assert f"| {group} | {count} | {seconds} |" in page, "docs/gpu.md names other estimates"
    total = re.search(r"steps, (\d+) s estimated for an H100", text)
    assert int(total[1]) < 8 * 60 and f"{total[1]} s in all" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be measured")
def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path):
    done = acceptance("--out", tmp_path)
    assert done.returncode == 3 and done.stdout.startswith("NOT MEASURED")
    assert not list(tmp_path.iterdir())


# --- fair timings --------------------------------------------------------------------------------------------------


class Seen(gpu_device.StandIn):
    def milliseconds(self, run):
        run()
        return (1.0, 1.0, 1.0)


def test_forward_alone_is_timed_with_leaves_that_need_no_gradient():
    needed = []

    def loss(x, target):
        needed.append((x.requires_grad, torch.is_grad_enabled()))
        return torch.nn.functional.cross_entropy(x.float(), target)

    case = gpu_times.logits_case(Seen(), gpu_checks.DRY, 4, 31, objective="cross_entropy")
    found = gpu_times.time_loss(Seen(), "p", loss, case)
    assert [row["mode"] for row in found.rows] == ["forward", "forward + backward"]
    assert needed == [(False, True), (False, False), (True, True)]


@pytest.mark.parametrize("objective", ["perplexity", "cross_entropy"])
def test_a_wrong_loss_gets_no_time(objective):
    case = gpu_times.logits_case(Seen(), gpu_checks.DRY, 4, 31, objective=objective)
    loss = gpu_peers.logits_peers()[3].make(objective)
    assert gpu_times.time_loss(Seen(), "p", loss, case).rows
    with pytest.raises(AssertionError, match="no time for a wrong value"):
        gpu_times.time_loss(Seen(), "p", lambda x, target: loss(x, target) * 1.1, case)


def test_the_budget_of_plan_vocab_leads_to_it():
    n, v, d = gpu_checks.REAL.timed_head
    options, kind = gpu_times.HEADS["plan vocab"]
    case = plan.LinearCase(n, v, d, 2, "cuda", (True, True, False), options["memory_budget"])
    assert plan.linear_kind(case, False) == kind


# --- the tools of the CUDA toolkit ---------------------------------------------------------------------------------

NCU = """==PROF== Connected to process 1
==PROF== Profiling "nll_forward_kernel" - 0: 0%....50%....100% - 1 pass
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","nll_forward_kernel(int)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","93.10"
"0","1","nll_forward_kernel(int)","launch__registers_per_thread","register/thread","32"
"1","1","nll_backward_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.50"
"""


def test_what_ncu_prints_becomes_a_table():
    text = gpu_tools.profile_table(NCU)
    assert "| nll_forward_kernel | 93.10 % |" in text and "| nll_backward_kernel | 91.50 % |" in text
    assert "32 register/thread" in text and gpu_tools.profile_table("==ERROR== no permission") == ""


@pytest.mark.parametrize(
    ("printed", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 3 errors", 3),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 2),
        ("Segmentation fault", None),
    ],
)
def test_the_summary_of_compute_sanitizer_is_read(printed, errors):
    assert gpu_tools.sanitizer_errors(printed) == errors


def test_a_sweep_names_the_best_beside_ours():
    ours = gpu_tools.Tried("nll_forward", torch.bfloat16, 8, 16, 4, 8, 1, True)
    better = dataclasses.replace(ours, vectors=2, ours=False)
    text = gpu_tools.sweep_table({ours: 2.0, better: 1.6}, 3)
    assert "2 of 3" in text
    assert "| 4 vectors, 8 warps, 1 slices | 2.0000 | 2 vectors, 8 warps, 1 slices | 1.6000 | 1.25 |" in text


def test_a_sweep_runs_the_configurations_that_it_names():
    done = acceptance("--dry-run", "--sweep")
    assert done.returncode == 0 and "2 of 2 configurations timed" in done.stdout, done.stderr


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
    shape = (8192, 128256)
    head = (4, 5, 6)
    ours = gpu_times.Timing(
        "logits", "fused_ppl", "forward", shape, "bf16", (0.7, 0.75, 0.8), "perplexity", 2 * 8192 * 128256, 0, 2**20,
        0, 0.5, 30.0,
    )  # fmt: skip
    bare = gpu_times.Timing("head", gpu_times.BARE, "forward", head, "bf16", (1.0, 2.0, 3.0), flops=240)
    through = gpu_times.Timing("head", "fused_ppl", "forward", head, "bf16", (1.0, 2.2, 3.0), "perplexity", flops=240)
    result = functools.partial(gpu_process.Result, "ok")
    record = test_acceptance_process.record_of_steps() | {
        "card": {"name": "NVIDIA H100 80GB HBM3", "copy_bandwidth": 3e12},
        "results": {
            "graph": dataclasses.asdict(gpu_process.Result("failed", "other bits", 1.0)),
            "quack": dataclasses.asdict(gpu_process.Result("skipped", "not installed (pip install quack-kernels)")),
            "p": dataclasses.asdict(result(rows=[dataclasses.asdict(ours)])),
            gpu_times.BARE: dataclasses.asdict(result(rows=[dataclasses.asdict(bare)])),
            "h": dataclasses.asdict(result(rows=[dataclasses.asdict(through)])),
        },
    }
    made = gpu_report.write(tmp_path, "card", record)
    text = (tmp_path / "card.md").read_text()
    assert "5 steps" in text and "1 failed, 1 skipped, 0 did not fit" in text
    assert "- graph: other bits" in text and "| graph | failed | other bits | 1.0 |" in text
    assert "reaches 3.000 TB/s. The data sheet says 3.35 TB/s." in text
    want = "| 8192, 128256 | perplexity fused_ppl | forward | 0.750 (0.700 to 0.800) | 93% | 84% |  | 1 MiB | 0 MiB |"
    assert f"{want} 0.5000 ms | 30 us |" in text
    assert "| 4, 5, 6 | perplexity fused_ppl | forward | 2.200 (1.000 to 3.000) |  |  | 1.10 |" in text
    assert [p.suffix for p in made] == [".json", ".md"] and json.loads(made[0].read_text()) == json.loads(
        json.dumps(record)
    )
    gpu_report.picture(tmp_path / "card.png", record)
    assert (tmp_path / "card.png").stat().st_size > 1000


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
    assert gpu_report.data_sheet(name) == pytest.approx(terabytes * 1e12)


def test_an_unknown_card_has_no_share_of_a_data_sheet():
    assert gpu_report.data_sheet("NVIDIA GeForce RTX 4090") is None
    row = {"bytes": 10**9, "milliseconds": [1.0, 1.0, 1.0]}
    assert gpu_report.share(row, None) == "" and gpu_report.share(row, 2e12) == "50%"
