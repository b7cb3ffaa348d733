# SPDX-License-Identifier: Apache-2.0
"""Versions and settings of Triton: none of them warns a user of ours, and none changes what is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import versions

pytest.importorskip("triton", reason="the kernels are compiled by triton; it is in the extra `test`")
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


TARGETS = ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)]


@pytest.mark.parametrize("target", TARGETS)
def test_compiling_prints_no_warning_and_no_setting_changes_the_code(target, tmp_path):
    """Triton 3.9 warns where a launch leaves the fusion of multiply and add to a default that will change."""
    code, printed = compiled(tmp_path / "unset", target, "as launched")
    assert code and printed == ""
    for setting in ("0", "1"):
        assert compiled(tmp_path / setting, target, "as launched", TRITON_DEFAULT_FP_FUSION=setting) == (code, "")


@pytest.mark.parametrize("target", TARGETS)
def test_the_hot_loops_gain_nothing_from_fusion(target, tmp_path):
    """Every multiply and add of a logit is a tl.fma already, rounded once whatever a version does by default."""
    fused, unfused = (compiled(tmp_path / fusion, target, fusion)[0] for fusion in ("fused", "unfused"))
    assert fused and fused == unfused


def test_the_oldest_and_the_last_of_every_minor_version_are_chosen():
    there = ["3.10.0", "3.9.1", "3.9.0", "3.8.0", "3.7.1", "3.7.0", "3.6.0", "2.3.1"]
    assert versions.chosen(there, (3, 7)) == ["3.7.0", "3.7.1", "3.8.0", "3.9.1", "3.10.0"]
    with pytest.raises(RuntimeError, match=r"3\.11 or newer is needed"):
        versions.chosen(there, (3, 11))
    assert versions.floor() >= (3, 7) and versions.pinned("torch").startswith("torch==")
