# SPDX-License-Identifier: Apache-2.0
"""The scripts that compare checkouts: bench/count_calls.py counts what runs, bench/same_bits.py sees every bit."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import bits_grid
import count_calls
import options
import pytest
import same_bits
import torch

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


# --- bits ------------------------------------------------------------------------------------------------------------


def test_every_option_is_in_the_grid():
    keywords = {name for function in options.FUNCTIONS for name in inspect.signature(function).parameters}
    operands = {"input", "target", "linear_weight", "group", "vocab_group", "options"}
    assert keywords - operands <= set(bits_grid.VALUES), "give the new option its values in bench/bits_grid.py"


def test_the_grid_has_every_option_in_every_plan_and_dtype():
    found = {(c.dtype, c.plan, c.options[0]) for c in bits_grid.cases("torch") if len(c.options) == 1}
    for plan in bits_grid.PLANS:
        for option in (("softcap", 4.0), ("token_weight", "signed"), ("function", "perplexity")):
            assert {d for d, p, o in found if (p, o) == (plan, option)} == {*bits_grid.DTYPES, *bits_grid.AUTOCAST}
    pairs = {frozenset(name for name, _ in c.options) for c in bits_grid.cases("triton") if len(c.options) == 2}
    assert {frozenset(p) for p in (("softcap", "z_loss"), ("linear_bias", "weight"), ("class_dim", "max_nll"))} <= pairs


@pytest.mark.parametrize("plan", bits_grid.PLANS)
def test_a_case_gives_every_result_and_the_same_twice(plan):
    case = bits_grid.Case("torch", "fp32", plan, (("weight", "positive"), ("softcap", 4.0)))
    first, second = (same_bits.digests({"": bits_grid.run(case)})[""] for _ in range(2))
    assert first == second
    wanted = {"loss", "perplexity", "total_weight"}
    wanted |= (
        set() if "forward" in plan else {"gradient 0"} if plan.startswith("logits") else {"gradient 0", "gradient 1"}
    )
    assert wanted <= set(first)


def test_one_bit_of_one_result_is_a_difference_of_its_option():
    def results(x: float) -> same_bits.Results:
        plain, capped = ({"loss": torch.ones(3), "gradient 0": torch.ones(2, 2)} for _ in range(2))
        capped["loss"][1] = x
        return {"torch | fp32 | logits | ": plain, "torch | fp32 | logits | softcap=4.0, z_loss=0.01": capped}

    nearly = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    assert same_bits.differences(results(1.0), results(1.0)) == []
    (found,) = same_bits.differences(results(1.0), results(nearly))
    assert (found.result, found.options) == ("loss", ["softcap=4.0", "z_loss=0.01"]) and 1e-8 < found.relative < 1e-6
    assert "softcap=4.0: 1 cases" in same_bits.report([found], 2, every=True)


def test_what_one_checkout_lacks_is_a_difference():
    base, head = {"a | b | c | ": {"loss": torch.zeros(())}}, {"a | b | c | ": {"ValueError": torch.zeros(0)}}
    assert {d.result for d in same_bits.differences(base, head)} == {"loss", "ValueError"}
    assert [d.result for d in same_bits.differences({}, head)] == ["not computed by the base"]
    minus = {"a | b | c | ": {"loss": -torch.zeros(())}}
    assert same_bits.differences(base, minus) != []  # equal numbers, other bits
    infinite = torch.tensor([1.0, torch.inf])
    assert same_bits.distance(infinite, -infinite) == torch.inf and same_bits.distance(infinite, infinite) == 0


def test_two_checkouts_are_compared_in_processes_of_their_own(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "fused_ppl", other / "fused_ppl", ignore=shutil.ignore_patterns("__pycache__"))
    public = other / "fused_ppl" / "__init__.py"
    public.write_text(
        public.read_text()
        + "\nimport functools\nright = linear_cross_entropy_with_stats\n"
        + "@functools.wraps(right)\n"
        + "def linear_cross_entropy_with_stats(x, *args, **keywords):\n"
        + "    out = right(x, *args, **keywords)\n"
        + "    return out._replace(loss=out.loss * (1 + 2**-20)) if str(x.dtype) == 'torch.bfloat16' else out\n"
    )
    script = [sys.executable, ROOT / "bench" / "same_bits.py", ROOT, other, "--backend", "torch"]
    script += ["--only", "16 | head, rows | softcap=4.0, max_nll"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("2 cases, 1 of them with other bits"), done.stdout
    assert "dtypes: bf16 1" in done.stdout and "results: loss 1e-06" in done.stdout, done.stdout
