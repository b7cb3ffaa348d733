# SPDX-License-Identifier: Apache-2.0
"""The scripts that compare two checkouts: bench/count_calls.py counts what runs, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import count_calls

import fused_ppl
from fused_ppl.testing import make_logits, make_target

ROOT = Path(__file__).parents[1]


def test_a_function_counts_once_and_only_those_of_the_folders_count(tmp_path):
    source = "def leaf(): return 1\ndef root(other): return leaf() + sum(leaf() for _ in range(3)) + other()\n"
    inside, outside = tmp_path / "package" / "a.py", tmp_path / "package_of_others" / "a.py"
    scopes: list[dict] = [{}, {}]
    for file, scope in zip((inside, outside), scopes, strict=True):
        file.parent.mkdir()
        file.write_text(source)
        exec(compile(source, str(file), "exec"), scope)
    before = sys.getprofile()
    found = count_calls.functions_of(lambda: scopes[0]["root"](scopes[1]["leaf"]), [inside.parent])
    assert found == {(str(inside), "root"): 1, (str(inside), "leaf"): 4}
    assert sys.getprofile() is before
    count = count_calls.Count("", found)
    assert (count.functions, count.lines) == (2, 2)


def test_the_public_function_is_among_them():
    x, target = make_logits((4, 11)), make_target((4,), 11)
    found = count_calls.functions_of(lambda: fused_ppl.perplexity(x, target), count_calls.package_folders())
    names = {(Path(file).name, name): calls for (file, name), calls in found.items()}
    assert names["functional.py", "perplexity"] == 1


def test_the_table_has_every_plan(tmp_path):
    command = [sys.executable, ROOT / "bench" / "count_calls.py", "--package", ROOT, "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=True)
    first, _, *lines = done.stdout.splitlines()
    assert first == str(ROOT)
    found = {line[:26].strip(): int(line[26:36]) for line in lines[:6]}
    assert 0 < found["logits"] < found["head, rows"] < found["head, compact, columns"]
    assert any(line.endswith("functional.py: linear_perplexity") for line in lines)
