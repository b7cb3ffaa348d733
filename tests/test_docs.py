# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows is run: the examples of the docstrings and the Python blocks of the README."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import fused_ppl

ROOT = Path(__file__).parents[1]
ON_RANKS = "distributed.md"  # test_distributed_docs.py runs it
DOCS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = ["README.md", *(page for page in DOCS if page != f"docs/{ON_RANKS}")]


def modules():
    """All but the kernels, which need Triton to be imported."""
    names = [m.name for m in pkgutil.walk_packages(fused_ppl.__path__, "fused_ppl.", onerror=lambda name: None)]
    return ["fused_ppl", *(n for n in names if not n.endswith("__main__") and not re.search("kernels|triton", n))]


@pytest.mark.parametrize("name", modules())
def test_examples_of_docstrings_print_what_they_say(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_every_public_name_has_an_example():
    without = [n for n in fused_ppl.__all__ if ">>>" not in inspect.getdoc(getattr(fused_ppl, n)) and n != "LossOutput"]
    assert without == []


def test_every_keyword_of_the_public_functions_is_described():
    of_all = inspect.getdoc(fused_ppl.cross_entropy) + inspect.getdoc(fused_ppl.perplexity)
    for function in (fused_ppl.cross_entropy, fused_ppl.perplexity, fused_ppl.cross_entropy_with_stats):
        for keyword in inspect.signature(function).parameters:
            assert f"\n    {keyword}: " in of_all, keyword


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_one_after_another(page, tmp_path, monkeypatch):
    if not (ROOT / page).exists():
        pytest.skip(f"{page} is not written yet")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    if not blocks:
        pytest.skip(f"{page} has no Python blocks")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {i}", "exec"), namespace)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *DOCS])
def test_links_lead_to_files_and_headings(page):
    if not (ROOT / page).exists():
        pytest.skip(f"{page} is not written yet")
    text = (ROOT / page).read_text()
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if link.startswith("http"):
            continue
        path = (ROOT / page).parent / link if link else ROOT / page
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, f"{link}#{anchor}"


def test_every_trap_of_a_test_is_in_the_list():
    numbers = set(re.findall(r"def test_(\d\d)_", (ROOT / "tests" / "test_traps.py").read_text()))
    listed = set(re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "traps.md").read_text(), re.MULTILINE))
    assert {str(int(number)) for number in numbers} <= listed
