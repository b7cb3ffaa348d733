# SPDX-License-Identifier: Apache-2.0
"""The examples do what their first lines say: they run, keep what was run, and refuse in a sentence."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import FSDP, Pool, gloo_was_mended

for needed in ("matplotlib", "psutil", "rich", "tokenizers", "tqdm"):
    pytest.importorskip(needed, reason='the examples need pip install -e ".[examples]"')

EXAMPLES = Path(__file__).parents[1] / "examples"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
# smaller than the default in everything, with more than ten files so that whole files are held out
TINY = ["--vocab-size=600", "--dim=32", "--heads=2", "--layers=1", "--context=32", "--batch-size=2", "--eval-windows=6"]
TEXT = [str(path) for path in sorted(STDLIB.glob("[a-c]*.py"))[:20]]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / "train_lm.py"), *map(str, arguments)]


def train_lm(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, check=False)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The three losses, five steps each, from one seed: the record, what was printed, the folder."""
    out = tmp_path_factory.mktemp("compared")
    done = train_lm("--compare", "--steps", 5, "--eval-every", 2, "--text", *TEXT, "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return read(out), done.stdout, out


def test_a_run_keeps_arguments_versions_machine_and_curves(compared: tuple[dict[str, Any], str, Path]) -> None:
    record, printed, out = compared
    assert record["arguments"]["steps"] == 5 and record["versions"]["torch"] == torch.__version__
    assert record["machine"]["cores"] >= 1 and record["corpus"]["vocab_size"] == 600
    assert [run["loss"] for run in record["runs"]] == ["perplexity", "cross_entropy", "torch"]
    for run in record["runs"]:
        assert [step["tokens"] for step in run["steps"]] == [64, 128, 192, 256, 320]
        assert [point["step"] for point in run["validation"]] == [2, 4, 5]
        last = run["validation"][-1]
        assert math.isclose(2 ** last["bits_per_token"], last["perplexity"], rel_tol=1e-6)
        assert run["finished"] and run["summary"]["validation_perplexity"] == last["perplexity"]
        assert run["summary"]["tokens_per_second"] > 0 and run["summary"]["memory_peak_mb"] > 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "run.json") in printed and str(out / "curves.png") in printed
    assert f"{record['unigram_perplexity']:,.1f}" in printed and "cross_entropy" in printed


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, Path]:
    """A run of --loss torch that gets Ctrl-C after its first validation: exit code, record, errors, folder."""
    out = tmp_path_factory.mktemp("interrupted")
    arguments = ("--loss", "torch", "--steps", 1_000_000, "--eval-every", 3, "--text", *TEXT, "--out", out, *TINY)
    # a shell's background job ignores Ctrl-C, and so would what it starts
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(*arguments), preexec_fn=heed, **pipes) as process:
        deadline = time.monotonic() + 240
        while not (out / "run.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    return process.returncode, read(out), errors, out


def test_an_interrupt_keeps_what_was_run(interrupted: tuple[int, dict[str, Any], str, Path]) -> None:
    code, record, errors, out = interrupted
    assert code == 130 and "interrupted; what was run is kept" in errors
    (run,) = record["runs"]
    assert not run["finished"] and len(run["steps"]) >= 3 and len(run["validation"]) >= 1
    assert (out / "curves.png").exists()


def test_every_loss_starts_from_the_same_number(
    compared: tuple[dict[str, Any], str, Path], interrupted: tuple[int, dict[str, Any], str, Path]
) -> None:
    perplexity, cross_entropy, eager = (run["steps"][0] for run in compared[0]["runs"])
    alone = interrupted[1]["runs"][0]["steps"][0]  # alone or in --compare, a run starts from the seed
    assert eager["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert cross_entropy["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    assert perplexity["loss"] == pytest.approx(math.exp(eager["loss"]), rel=1e-4)
    # the gradient of the perplexity is PPL times that of cross-entropy
    assert perplexity["gradient_norm"] / cross_entropy["gradient_norm"] == pytest.approx(perplexity["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ["ddp", FSDP, "tp"])
def test_ranks_train_as_one_process_does(
    kind: str, compared: tuple[dict[str, Any], str, Path], tmp_path: Path, pool: Pool
) -> None:
    """Two of them, over gloo, from the same seed."""
    if kind == "fsdp" and pool.run(2, gloo_was_mended)[0]:
        pytest.skip("FSDP2 asks gloo for an average, and that of this torch sums")
    arguments = ("--parallel", kind, "--steps", 5, "--eval-every", 2, "--text", *TEXT, "--out", tmp_path, *TINY)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *command(*arguments)[1:]], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    if "ColwiseParallel currently only support" in done.stderr:
        pytest.skip("parallelize_module of this torch takes the last part of blocks.0.mlp.0 for a block as well")
    assert done.returncode == 0, done.stderr
    (run,), alone = read(tmp_path)["runs"], compared[0]["runs"][0]
    for mine, theirs in zip(run["steps"], alone["steps"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    for mine, theirs in zip(run["validation"], alone["validation"], strict=True):
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-4)
    assert done.stdout.count("unigram perplexity") == 1  # one rank speaks


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_lm").main


def test_a_text_too_short_is_refused_in_a_sentence(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short to hold anything out\n")
    assert main(["--text", str(short), "--out", str(tmp_path / "out"), *TINY]) == 1
    error = capsys.readouterr().err
    assert "must each hold one sequence of --context 32 tokens; got" in error and "Give more --text" in error


def test_a_missing_text_is_refused_in_a_sentence(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--text", "/no/such/file", "--out", str(tmp_path)]) == 1
    assert "--text takes readable files; /no/such/file is not one" in capsys.readouterr().err


def test_ranks_without_torchrun_are_refused_in_a_sentence(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--parallel", "ddp", "--text", *TEXT, "--out", str(tmp_path), *TINY]) == 1
    error = capsys.readouterr().err
    assert "--parallel ddp needs several processes; this is one. Use torchrun --nproc-per-node 2" in error


def test_a_run_that_diverges_stops_in_a_sentence_and_is_kept(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--lr", "1e30", "--text", *TEXT, "--out", str(tmp_path), *TINY]) == 1
    error = capsys.readouterr().err
    assert "must be finite; step 2 got" in error and "smaller --lr than 1e+30" in error
    assert len(read(tmp_path)["runs"][0]["steps"]) == 1 and (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dim", "10", "--heads", "4"], "--heads must divide --dim; got --dim 10 --heads 4"),
        (["--steps", "0"], "must be a whole number above 0; got 0"),
        (["--vocab-size", "100"], "--vocab-size must be at least 257"),
        (
            ["--parallel", "ddp", "--loss", "torch"],
            "--parallel takes one of the fused losses, which know of ranks; got torch",
        ),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(
    main: Callable[[list[str]], int], arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_grpo_tiny_draws_both_runs_and_says_its_accuracy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # that of the other tests stays
    grpo = importlib.import_module("grpo_tiny")
    printed = []
    for _ in range(2):  # the seed is fixed, so a second run prints the same numbers
        assert grpo.main(["--steps", "3", "--questions", "4", "--group", "4", "--out", str(tmp_path)]) == 0
        printed.append(capsys.readouterr().out.splitlines()[:2])
    assert printed[0] == printed[1]
    assert printed[0][0].startswith("no entropy bonus: final accuracy ") and "of 100 questions" in printed[0][0]
    assert printed[0][1].startswith("entropy bonus 0.05: final accuracy ")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_grpo_tiny_ignores_what_follows_the_end_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    grpo = importlib.import_module("grpo_tiny")
    questions, right = grpo.all_questions()
    assert len(right) == 100 and right[0] == "0." and right[99] == "18."
    answers = torch.tensor([[grpo.CHARACTERS.index(c) for c in text] for text in ("7.3", "18.", "..1", "123")])
    monkeypatch.setattr(grpo, "answer", lambda policy, questions: torch.cat([questions, answers], 1))
    torch.manual_seed(0)
    samples = grpo.sample(grpo.Policy(8), questions[:4], ["7.", "18.", "1.", "12."])
    assert samples.target.eq(-100).tolist() == [[False, False, True], [False] * 3, [False, True, True], [False] * 3]
    assert samples.reward.tolist() == [1, 1, 0, 0]
    assert samples.log_prob[samples.target.eq(-100)].eq(0).all() and samples.log_prob[1].lt(0).all()
    assert grpo.advantages(samples.reward, 4).sum().abs() < 1e-6


class TestData:
    @pytest.fixture(autouse=True)
    def _path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(EXAMPLES)

    def test_unigram_perplexity_by_hand(self) -> None:
        from lm_data import unigram_perplexity

        # counts + 1 = 3, 2, 1 of 6; the target that is ignored does not count
        perplexity = unigram_perplexity(torch.tensor([0, 0, 1]), torch.tensor([0, 2, -100]), vocab_size=3)
        assert perplexity == pytest.approx((2 * 6) ** 0.5)

    @pytest.mark.parametrize("count", [1, 9, 10, 25])
    def test_nothing_is_in_both_splits(self, count: int) -> None:
        from lm_data import split

        documents = [f"{i:03d}" * 10 for i in range(count)]
        train, held_out = split(documents)
        assert sum(map(len, train + held_out)) == 30 * count and 0.05 < sum(map(len, held_out)) / (30 * count) < 0.15
        if count >= 10:
            assert not set(train) & set(held_out)

    def test_validation_windows_do_not_overlap(self) -> None:
        from lm_data import even_windows

        windows = even_windows(torch.arange(103), context=10, count=4)
        assert windows[:, 0].tolist() == [0, 30, 60, 90] and windows.shape == (4, 10)
        assert even_windows(torch.arange(103), context=10, count=99).flatten().tolist() == list(range(100))


@pytest.mark.slow
def test_the_default_beats_the_unigram_model(tmp_path: Path) -> None:
    done = train_lm("--out", tmp_path, timeout=1800)
    assert done.returncode == 0, done.stderr
    record = read(tmp_path)
    assert record["corpus"]["vocab_size"] >= 32768
    assert record["runs"][0]["summary"]["validation_perplexity"] < record["unigram_perplexity"]
