# SPDX-License-Identifier: Apache-2.0
"""`fused-ppl doctor`: what it tells, that it sees wrong numbers, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_ppl
from fused_ppl.cli import machine, main

SMALL = ["doctor", "--device", "cpu", "--shape", "5", "11"]
EXTRAS = ["hypothesis", "matplotlib", "psutil", "pytest", "rich", "tokenizers", "tqdm", "triton"]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Let the perplexity be wrong, and its reference be right."""
    right = fused_ppl.perplexity
    monkeypatch.setattr(fused_ppl, "perplexity", lambda *args, **keywords: change(right(*args, **keywords)))


def test_it_tells_what_there_is_and_ends_with_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    for expected in (torch.__version__, fused_ppl.__version__, "threads", "torch (not triton: ", "bfloat16", "5 x 11"):
        assert expected in out
    assert out.splitlines()[-1] == "Verdict: good: all 8 checks are within the tolerance."


def test_the_cases_it_chooses_itself_are_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "8 x 50257" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["1 1", "1 2", "4 3", "2 4099"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_any_shape_of_ones_own_is_checked(shape: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--shape", *shape.split(), "--dtype", dtype]) == 0
    assert shape.replace(" ", " x ") in capsys.readouterr().out


def test_the_rows_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fused_ppl.cli.numbers.BLOCK", 20)
    assert main(["doctor", "--device", "cpu", "--shape", "9", "11"]) == 0


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--dtype", "bf16", "--backend", "torch", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert [(b["device"], b["dtype"], b["chosen"]) for b in report["backends"]] == [("cpu", "bfloat16", "torch")]
    assert [(c["backend"], c["dtype"], c["of"], c["good"]) for c in report["checks"]] == [
        ("torch", "bfloat16", "value", True),
        ("torch", "bfloat16", "gradient", True),
    ]
    assert all(0 <= c["error"] <= c["allowed"] < 0.1 for c in report["checks"])
    assert report["exit_code"] == 0 and report["verdict"].startswith("good")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda loss: loss + (1e-4 * loss).detach(), ["value"]),
        (lambda loss: 1.1 * loss - (0.1 * loss).detach(), ["gradient"]),
        (lambda loss: loss * float("nan"), ["value", "gradient"]),
        (lambda loss: loss * float("inf"), ["value", "gradient"]),
    ],
    ids=["value", "gradient", "nan", "inf"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_wrong_numbers_are_seen(
    change: Callable[[Tensor], Tensor],
    wrong: list[str],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, change)
    assert main([*SMALL, "--dtype", dtype]) == 1
    *table, verdict = capsys.readouterr().out.splitlines()
    assert [line.split()[-4] for line in table if line.endswith("WRONG")] == wrong
    assert verdict.startswith(f"Verdict: WRONG: {len(wrong)} of 2 checks")


def test_a_call_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(loss: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nand a long trace")

    spoil(monkeypatch, broken)
    assert main([*SMALL, "--dtype", "fp32"]) == 1
    out = capsys.readouterr().out
    assert "torch raised RuntimeError: no kernel image\n" in out and "long trace" not in out


def test_a_backend_that_cannot_run_is_not_called_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--backend", "triton"]) == 2
    out = capsys.readouterr().out
    assert "backend='triton' cannot run on cpu with torch.float32: " in out
    assert out.splitlines()[-1].startswith("Verdict: NOT CHECKED: no call can run as asked")


@pytest.mark.parametrize("name", ["triton", "tritn"])
def test_a_default_that_cannot_run_is_shown(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSED_PPL_BACKEND", name)
    assert main(SMALL) == 2
    assert f"FUSED_PPL_BACKEND  {name}" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_an_error_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpus"]) == 2
    assert capsys.readouterr().err.startswith("fused-ppl: --device must be one that torch can use here, cpu")


@pytest.mark.parametrize("shape", [["0", "5"], ["5", "-1"], ["5", "many"]])
def test_a_shape_that_is_none_is_an_error_in_a_sentence(shape: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--shape", *shape])
    assert "Try --shape 4096 50257." in capsys.readouterr().err


def test_the_distribution_that_brought_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.metadata, "version", {"triton": "3.9.0", "pytorch-triton-rocm": "3.8.1"}.__getitem__)
    assert machine.triton_version([]) == "not installed"
    assert machine.triton_version(["triton", "triton"]) == "3.9.0 from the distribution triton"
    both = machine.triton_version(["triton", "pytorch-triton-rocm"])
    assert "3.8.1 from the distribution pytorch-triton-rocm and 3.9.0" in both and "overwrite each other" in both


def test_the_core_installation_is_enough(tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({EXTRAS}));"  # None: importing it raises
        f"sys.argv = ['fused-ppl', *{SMALL}]; runpy.run_module('fused_ppl.cli', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Verdict: good" in done.stdout
