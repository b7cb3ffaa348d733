# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are honest: what is wrong gets no time, time and memory are those that were spent, a loss stays in."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_fakes
import compare
import gate
import measure
import pytest
import record
import record_tables
import report
import torch
from bench_fakes import fake
from cases import CASES, CPU_CASES, Case, Setting, make_inputs
from compare import Comparison, How
from providers import all_providers

ROOT = Path(__file__).parents[1]
SMALL = Setting("logits", Case("small", 64, 300, 16), "fp32")
ONCE = How(modes=("both",), kinds=("random",), rounds=3)


def compared(*providers, setting=SMALL, how=ONCE):
    """The row of each provider in the first mode."""
    rows = Comparison(setting, list(providers), how, lambda share: None).rows()
    return {row.provider: row for row in rows if row.mode == how.modes[0]}


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bench_fakes.wrong_gradient, bench_fakes.wrong_value, bench_fakes.forgets_the_factor])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_provider_gets_no_time(make, dtype):
    found = compared(fake(bench_fakes.plain), fake(make), setting=dataclasses.replace(SMALL, dtype=dtype))
    row = found[make.__name__]
    if dtype == "bf16" and make is not bench_fakes.forgets_the_factor:
        # a tenth is what bf16 itself loses: it is let through, and its error is told
        assert max(row.value_error, row.gradient_error) > 0.05
    else:
        assert row.note.startswith("wrong value" if make is bench_fakes.wrong_value else "wrong gradient"), row.note
        assert row.median is None and row.p20 is None and row.over_ours is None
    assert found["plain"].median > 0 and not found["plain"].note


def test_a_provider_that_breaks_is_reported_and_the_others_go_on():
    found = compared(fake(bench_fakes.breaks), fake(bench_fakes.plain))
    assert found["breaks"].note == "failed: RuntimeError: broken" and found["breaks"].median is None
    assert found["plain"].median > 0


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_truth_is_that_of_the_reference(op, kind, softcap, monkeypatch):
    from fused_ppl import reference
    from fused_ppl.spec import LossSpec

    monkeypatch.setattr(gate, "CHUNK", 7 * 300)  # several chunks, the last of them ragged
    setting = dataclasses.replace(SMALL, op=op, kind=kind, case=dataclasses.replace(SMALL.case, softcap=softcap))
    inputs = make_inputs(setting)
    truth = gate.truth_of(setting, inputs)
    tensors = [t.detach().double().requires_grad_() for t in inputs.tensors]
    logits = tensors[0] if op == "logits" else tensors[0] @ tensors[1].t()
    of_reference = reference.logits_loss(logits, inputs.target, LossSpec(softcap=softcap))
    assert truth.nll == pytest.approx(of_reference.loss.item(), rel=1e-12)
    for got, wanted in zip(truth.gradients, torch.autograd.grad(of_reference.perplexity, tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_a_truth_that_is_too_dear_is_of_fewer_tokens_and_says_so(monkeypatch):
    monkeypatch.setattr(gate, "MOST_LOGITS", 10 * 300)
    row = compared(fake(bench_fakes.plain))["plain"]
    assert row.checked_tokens == 10 and row.median > 0


def test_peaked_inputs_are_those_of_a_trained_model():
    for op in ("logits", "linear"):
        nll = {}
        for kind in ("random", "peaked"):
            setting = Setting(op, Case("c", 512, 4096, 64), "fp32", kind)
            nll[kind] = gate.truth_of(setting, make_inputs(setting)).nll
        assert nll["random"] > 9 and 0.5 < nll["peaked"] < 4


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_sleeping_provider_is_slower_by_what_it_sleeps():
    slower = []
    for _ in range(4):  # tries: where other programs want the cores, one may be off by their turns
        found = compared(fake(bench_fakes.plain), fake(bench_fakes.sleeps), how=dataclasses.replace(ONCE, rounds=15))
        slower.append(found["sleeps"].p20 - found["plain"].p20)
        if 0.95 * bench_fakes.SLEEP < slower[-1] < 1.5 * bench_fakes.SLEEP:
            return
    raise AssertionError(f"slower by {slower} seconds; sleeps for {bench_fakes.SLEEP}")


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_mode_times_its_own_part_alone(mode):
    found = compared(
        fake(bench_fakes.plain), fake(bench_fakes.sleeps), how=dataclasses.replace(ONCE, modes=(mode,), rounds=9)
    )
    slower = found["sleeps"].median - found["plain"].median  # it sleeps in forward
    assert slower > 0.9 * bench_fakes.SLEEP if mode == "forward" else slower < 0.3 * bench_fakes.SLEEP


def test_rounds_are_interleaved_and_every_call_gets_other_inputs():
    order, inputs = [], make_inputs(SMALL)
    turns = measure.rotation(inputs, 3)
    seen = []

    def step(name):
        def prepare():
            seen.append(id(next(turns)))
            return lambda: order.append(name)

        return prepare

    seconds = measure.interleaved({name: step(name) for name in "abc"}, rounds=4)
    assert {name: len(s) for name, s in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 6 and all(sorted(r) == ["a", "b", "c"] for r in rounds)  # two of them warm up
    assert len({tuple(r) for r in rounds}) > 1
    assert all(a != b for a, b in itertools.pairwise(seen)) and len(set(seen)) == 3


def test_large_inputs_go_round_beyond_a_gigabyte_and_none_is_alone():
    assert measure.copies_of(Setting("logits", CASES["gpt2-cpu"], "bf16")) * 1024 * 50257 * 2 > 0.9 * 2**30
    assert measure.copies_of(Setting("linear", CASES["llama3-8b"], "fp32")) == 2


def test_quantiles_and_paired_ratios():
    assert measure.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert measure.paired_ratio([2.0, 6.0, 40.0], [1.0, 2.0, 10.0]) == 3.0
    low, median, high = measure.bootstrap_ratio([2.0] * 9, [1.0] * 9)
    assert (low, median, high) == (2.0, 2.0, 2.0)


# --- memory ----------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")


@linux
@pytest.mark.parametrize("make", [bench_fakes.greedy, bench_fakes.hoards])
def test_a_provider_that_takes_500_mib_shows_500_mib(make):
    peak = measure.peak_bytes(fake(make), SMALL, threads=1)
    assert peak == pytest.approx(bench_fakes.TAKEN, rel=0.02)


@linux
def test_inputs_and_gradients_do_not_count():
    setting = Setting("logits", Case("wide", 256, 65536, 8), "fp32")  # 64 MiB
    inputs_and_one = setting.gradient_bytes
    peak = measure.peak_bytes(all_providers()[0], setting, threads=1)
    assert peak < 0.4 * inputs_and_one
    in_place = next(p for p in all_providers() if p.in_place)
    assert measure.peak_bytes(in_place, setting, threads=1) < -0.6 * inputs_and_one


# --- providers and the report ----------------------------------------------------------------------------------------


def test_who_cannot_run_says_why():
    setting = Setting("linear", CASES["gemma2-2b-cpu"], "bf16")
    said = {p.name: p.refusal(setting) for p in all_providers() if p.belongs(setting)}
    assert said["fused_ppl"] is None and said["eager"] is None
    assert said["Liger"] == "needs a GPU" or said["Liger"].startswith("not installed (pip install ")
    assert said["quack"] == "needs a GPU" or said["quack"] == "not installed (pip install quack-kernels)"
    if "F.linear_cross_entropy, chunked" in said:
        assert said["F.linear_cross_entropy, chunked"] == "has no softcap"


def test_every_cpu_case_has_the_vocabulary_of_its_model():
    for name in CPU_CASES:
        if name != "smoke":
            real = CASES[name.removesuffix("-cpu")]
            assert (CASES[name].num_classes, CASES[name].softcap) == (real.num_classes, real.softcap)


def rows(provider, seconds, peak, errors=(1e-7, 1e-6), ratio=(1.0, 1.0, 1.0), **more):
    common = {
        "op": "linear", "case": "gpt2-cpu", "num_tokens": 8, "num_classes": 9, "hidden_size": 4, "softcap": None,
        "dtype": "bf16", "kind": "random", "objective": "perplexity", "provider": provider,
        "ours": provider == "fused_ppl", "value_error": errors[0], "gradient_error": errors[1], **more,
    }  # fmt: skip
    both = record.Row(**common, mode="both", p20=seconds, median=seconds, p80=seconds, over_bare=1.0, over_ours=ratio)
    return [both, record.Row(**common, mode="memory", peak_bytes=peak)]


MACHINE = {"processor": "P", "threads": 2, "torch": "2", "commit": "c", "date": "d"}


def test_a_comparison_that_we_lose_stays_in_the_table_and_is_marked():
    ours = rows("fused_ppl", 1.0, 100 * 2**20)
    slower = rows("slower", 2.0, 200 * 2**20, ratio=(1.9, 2.0, 2.1))
    faster = rows("faster", 0.5, 50 * 2**20, ratio=(0.4, 0.5, 0.6))
    careless = rows("careless", 0.1, 2**20, errors=(1e-2, 1e-2), ratio=(0.1, 0.1, 0.1))
    even = rows("even", 0.99, 100 * 2**20, ratio=(0.9, 0.99, 1.02))
    made = record.Record("python bench/run.py", MACHINE, {}, [*ours, *slower, *faster, *careless, *even])
    text = report.markdown(made)
    of = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "**LOST time, memory**" in of["faster"]
    assert "**LOST time, memory, less accurate**" in of["careless"]
    assert all("LOST" not in of[name] for name in ("fused_ppl", "slower", "even"))
    assert report.lost(made) == [
        "linear gpt2-cpu bf16: LOST time, memory to faster",
        "linear gpt2-cpu bf16: LOST time, memory, less accurate to careless",
    ]
    assert "fused_ppl loses to a provider 2 times" in text
    assert list(of).index("careless") < list(of).index("faster") < list(of).index("fused_ppl")


def test_what_was_refused_on_one_kind_of_inputs_shows_no_time_of_the_other():
    wrong = [dataclasses.replace(rows("p", 1.0, 1)[0], note="wrong value", median=None, kind="random")]
    right = [dataclasses.replace(rows("p", 1.0, 1)[0], kind="peaked")]
    (found,) = record_tables.tables([*wrong, *right]).values()
    assert found[0].timed == () and found[0].note == "wrong value"


@pytest.mark.parametrize(("page", "blocks"), report.PAGES.items())
def test_the_tables_of_the_documentation_are_those_of_the_record(page, blocks):
    made = record.load(ROOT / "bench" / "results" / "cpu.json")
    text = (ROOT / page).read_text()
    for name, block in blocks(made).items():
        assert report.replaced(text, name, block) == text, "python bench/report.py bench/results/cpu.json --docs"


def test_every_case_of_a_cpu_is_in_the_record():
    made = record.load(ROOT / "bench" / "results" / "cpu.json")
    assert {(r.op, r.case) for r in made.rows} == {(op, case) for op in ("logits", "linear") for case in CPU_CASES}


def test_a_record_survives_the_disk(tmp_path):
    made = record.Record("c", MACHINE, {"seconds": 1}, rows("fused_ppl", 0.125, 0))
    made.save(tmp_path, "r")
    assert record.load(tmp_path / "r.json") == made
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"r.json", "r.csv"}


def test_a_machine_is_named_in_full():
    found = record.machine()
    assert {"processor", "cores", "threads", "torch", "python", "commit", "date", "versions"} <= set(found)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # of an index, without its build


def run(*arguments, **env):
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_command_makes_table_records_and_plots(tmp_path):
    pytest.importorskip("rich", reason="the table is drawn with rich, of the extra `bench`")
    pytest.importorskip("matplotlib", reason="the plots are drawn with matplotlib, of the extra `bench`")
    out = run(
        "--case", "smoke", "--op", "logits", "--provider", "eager", "--dtype", "fp32", "--rounds", "3",
        "--inputs", "random", "--threads", "1", "--mode", "forward", "backward", "both", "memory", "--out", tmp_path,
    )  # fmt: skip
    assert "fused_ppl" in out and "eager" in out and "from logits, smoke, fp32" in out
    made = {p.name for p in tmp_path.iterdir()}
    assert {"bench.json", "bench.csv", "bench.md", "bench_time.png", "bench_memory.png", "bench_error.png"} <= made
    whole = json.loads((tmp_path / "bench.json").read_text())
    assert {r["mode"] for r in whole["rows"]} == {"forward", "backward", "both", "memory"}
    assert {r["provider"] for r in whole["rows"]} == {"bare", "fused_ppl", "eager"}
    assert all(r["rounds"] == 3 for r in whole["rows"] if r["mode"] != "memory")


def test_what_there_is_can_be_listed():
    out = run("--list")
    assert all(name in out for name in CASES) and all(p.name in out for p in all_providers())


def test_an_unknown_case_is_named():
    with pytest.raises(SystemExit, match="No case is called llama9"):
        import run as command

        command.settings_of(command.parser().parse_args(["--case", "llama9"]))


def test_slow_providers_are_left_out_with_their_time():
    how = dataclasses.replace(ONCE, patience=0.5 * bench_fakes.SLEEP)
    row = compared(fake(bench_fakes.sleeps), how=how)["sleeps"]
    assert (
        row.note.startswith("too slow: ")
        and row.median is None
        and compare.failed(ValueError()) == "failed: ValueError: "
    )
