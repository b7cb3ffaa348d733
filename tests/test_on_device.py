# SPDX-License-Identifier: Apache-2.0
"""`pytest --device`, on a machine without a GPU: everything is collected for one, and runs on one that stands in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import on_device
import pytest
import stand_in
import torch

TESTS = Path(__file__).parent
KERNELS = ("test_kernels.py", "test_kernels_head.py")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SLOW = [pytest.param(f"test_{file}", marks=pytest.mark.slow) for file in ("contracts", "functional")]
stands_in = pytest.mark.skipif(not stand_in.supported(), reason=f"torch {torch.__version__} makes no device in Python")


def run(*arguments: str, **env: str) -> tuple[int, str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(
        command, cwd=TESTS.parent, env={**plain, **env}, capture_output=True, text=True, timeout=600, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_all_kernel_tests_are_collected_for_a_gpu_and_both_backends() -> None:
    pytest.importorskip("triton", reason="the kernels import it")
    files = [*KERNELS, "test_functional.py", "test_compact.py", "test_contracts.py"]
    code, out = run("--device", "cuda", "--collect-only", "tests")
    assert code == 0, out
    ids = [line for line in out.splitlines() if "::" in line]
    for file in files:
        tests = set(re.findall(r"^def (test_\w+)", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE))
        assert tests == {line.split("::")[1].split("[")[0] for line in ids if line.startswith(f"tests/{file}::")}, file
    for backend in ("torch", "triton"):
        assert sum(f"[{backend}" in line for line in ids) > 300


@no_gpu
def test_without_that_device_it_says_so_at_once() -> None:
    code, out = run("--device", "cuda", "tests/test_kernels.py")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: torch" in out and "sees no such device on this machine" in out


def test_a_gpu_does_not_interpret() -> None:
    code, out = run("--device", "cuda", "tests/test_kernels.py", TRITON_INTERPRET="1")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "unset TRITON_INTERPRET" in out


def test_every_reason_to_skip_is_that_of_a_module() -> None:
    modules = [file.stem for file in TESTS.glob("test_*.py")]
    assert [prefix for prefix in on_device.ON_THE_CPU if not any(m.startswith(prefix) for m in modules)] == []


@stands_in
@pytest.mark.parametrize("file", ["test_linear_edges", "test_traps", *SLOW])
def test_the_code_of_a_gpu_runs_on_one_that_stands_in(file: str) -> None:
    beyond = "autocast or inference or no_graph or 50257 or 151643 or 151936 or 129920 or test_11"
    code, out = run("--device", stand_in.NAME, f"tests/{file}.py", "-k", f"not ({beyond})", "-rs")
    assert code == 0, out
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None and int(passed[1]) > 15, out
    assert all("without --device" in line for line in out.splitlines() if line.startswith("SKIPPED")), out


LEFT_BEHIND = """
import torch, stand_in
stand_in.install()
there = torch.ones(3, device=stand_in.NAME)
print((there * 2).tolist(), (there + 1.0).device)
print(there + torch.ones(3))
"""


@stands_in
def test_a_tensor_left_on_the_cpu_would_be_seen() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND], cwd=TESTS, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == f"[2.0, 2.0, 2.0] {stand_in.NAME}:0\n"
    assert done.returncode and "is on the cpu" in done.stderr


PLACED = """
import torch, on_device, stand_in
from fused_ppl.testing import make_logits, make_target
on_device.place(stand_in.NAME, collect_only=False)
made = [make_logits((2, 3)), make_target((2,), 3), torch.ones(1), torch.rand(2, generator=torch.Generator())]
print({str(t.device) for t in made}, torch.randn(2, requires_grad=True).is_leaf)
"""


@stands_in
def test_what_a_test_makes_is_on_the_device() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLACED], cwd=TESTS, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == f"{{'{stand_in.NAME}:0'}} True\n", done.stderr
