# SPDX-License-Identifier: Apache-2.0
"""docs/distributed.md, run block by block on four ranks: each recipe has the numbers of one process."""

from __future__ import annotations

import re
from pathlib import Path

import doc_cases
import pytest
from pool import NEEDS_FSDP2, Pool

PAGE = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@NEEDS_FSDP2
def test_every_recipe_gives_the_perplexity_and_the_gradient_of_one_process(pool: Pool) -> None:
    compared = pool.run(4, doc_cases.run, BLOCKS)
    assert compared[0] == sum("ppl" in block for block in BLOCKS[1:]) >= 12


def test_a_recipe_that_is_wrong_would_be_seen(pool: Pool) -> None:
    wrong = [BLOCKS[0], BLOCKS[1].replace("group=dist.group.WORLD", "")]
    with pytest.raises(AssertionError, match="block 1"):
        pool.run(4, doc_cases.run, wrong)
