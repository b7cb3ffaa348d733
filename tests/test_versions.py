# SPDX-License-Identifier: Apache-2.0
"""Versions and settings of Triton: none of them warns a user of ours, and none changes what is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import versions

from fused_ppl.backends import presence

BENCH = Path(__file__).parents[1] / "bench"

# prints a hash of the machine code of every kernel, with every option off and with all on; of the hot loop too
COMPILE = """
import hashlib, sys, warnings
import aot, budgets
warnings.simplefilter("error")
target, fusion = sys.argv[1:]
for name, make in budgets.KERNELS.items():
    for options in ({}, budgets.OPTIONS["all"]) if fusion == "as launched" else ({},):
        kernel, kwargs = make(target=target, **options)
        if fusion != "as launched":
            kwargs["enable_fp_fusion"] = fusion == "fused"
        compiled = aot.compile_call(kernel, kwargs, aot.TARGETS[target])
        if fusion == "as launched":
            code = compiled.asm["amdgcn"] if "amdgcn" in compiled.asm else aot.disassemble(compiled.asm["cubin"])[0]
            print(name, hashlib.sha256(code.encode()).hexdigest())
        else:
            print(name, aot.read(compiled).passes)
"""


def compiled(folder: Path, target: str, fusion: str, **env: str) -> tuple[str, str]:
    """What compiling prints, by a process of its own and without the cache that has seen the kernels before."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    path = os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, target, fusion],
        env={**kept, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


compiles = pytest.mark.skipif(presence.TRITON_PROBLEM is not None, reason=str(presence.TRITON_PROBLEM))
TARGETS = ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)]


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_compiling_prints_no_warning_and_no_setting_changes_the_code(target, tmp_path):
    """Triton 3.9 warns where a launch leaves the fusion of multiply and add to a default that will change."""
    code, printed = compiled(tmp_path / "unset", target, "as launched")
    assert code and printed == ""
    for setting in ("0", "1"):
        assert compiled(tmp_path / setting, target, "as launched", TRITON_DEFAULT_FP_FUSION=setting) == (code, "")


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_the_hot_loops_gain_nothing_from_fusion(target, tmp_path):
    """Every multiply and add of a logit is a tl.fma already, rounded once whatever a version does by default."""
    fused, unfused = (compiled(tmp_path / fusion, target, fusion)[0] for fusion in ("fused", "unfused"))
    assert fused and fused == unfused


def test_the_pairs_begin_at_the_oldest_that_are_supported():
    project = (BENCH.parent / "pyproject.toml").read_text()
    pairs = versions.PAIRS
    assert f'"torch>={pairs[0].torch.rpartition(".")[0]}"' in project
    oldest = next(pair.triton for pair in pairs if pair.compiles)
    assert f'"triton>={oldest};' in project and versions.number(oldest) == presence.OLDEST_TRITON
    assert all(pair.compiles == (versions.number(pair.triton) >= presence.OLDEST_TRITON) for pair in pairs)
    assert [p.torch for p in pairs] == sorted((p.torch for p in pairs), key=versions.number)


def test_a_version_that_cannot_be_installed_is_named_and_fails_nothing(tmp_path, monkeypatch, capsys):
    def refuses(folder, pair):
        raise versions.NotInstallable("no matching distribution")

    monkeypatch.setattr(versions, "make_environment", refuses)
    monkeypatch.setattr(sys, "argv", ["versions.py", "--torch", "2.7.1", "--out", str(tmp_path / "table.md")])
    assert versions.main() == 0
    assert "| 2.7.1 | 3.3.1 | not installed: no matching distribution |" in capsys.readouterr().out
    assert "no matching distribution" in (tmp_path / "table.md").read_text()


def test_a_pair_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(
        versions, "run", lambda python, arguments, **env: versions.Found("tests" not in arguments, "x", 1)
    )
    ok, row = versions.check(Path("python"), versions.PAIRS[1])
    assert not ok and row == "| 2.7.1 | 3.3.1 | x | x | FAILED: x | 3 |"
    ok, row = versions.check(Path("python"), versions.PAIRS[0])
    assert not ok and row == "| 2.6.0 | 3.2.0 | refused | refused | FAILED: x | 1 |"
