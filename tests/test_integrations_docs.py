# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/integrations.md run, each where what it needs is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_ppl

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
BLOCKS = re.findall(r"^```python(?: needs=(\S+))?\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def missing(needs: str) -> list[str]:
    """A module of a package is tried, since torchtitan can be there without what it needs."""
    absent = []
    for name in filter(None, needs.split(",")):
        if "." not in name:
            absent += [] if importlib.util.find_spec(name) else [name]
            continue
        try:
            importlib.import_module(name)
        except ImportError:
            absent.append(name)
    return absent


@pytest.fixture(scope="module")
def namespace() -> dict[str, object]:
    """What the blocks before have made, and what a block that was left out would have imported."""
    return {"torch": torch, "nn": nn, "fused_ppl": fused_ppl}


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_a_recipe_runs(index, namespace, tmp_path, monkeypatch):
    needs, code = BLOCKS[index]
    if absent := missing(needs):
        pytest.skip(f"needs {', '.join(absent)}")
    monkeypatch.chdir(tmp_path)
    if needs == (module := "trl.trainer.utils"):  # the block replaces the function, and other tests want TRL's own
        utils = importlib.import_module(module)
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
    exec(compile(code, f"{PAGE.name}, block {index}", "exec"), namespace)


def test_the_blocks_are_found():
    assert len(BLOCKS) == 9 and {needs for needs, _ in BLOCKS} >= {"", "transformers", "lightning"}
