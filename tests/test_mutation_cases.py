# SPDX-License-Identifier: Apache-2.0
"""The launches by which tests/mutants.py judges the kernel tests."""

from __future__ import annotations

import on_device
import pytest

tl = pytest.importorskip("triton.language")

import mutation_cases  # noqa: E402


@pytest.mark.parametrize("title", mutation_cases.MUTATED)
def test_launches_that_see_a_changed_instruction(title):
    """tests/mutants.py counts which changes of an instruction these cases see."""
    if on_device.interpreted():
        pytest.skip("the interpreter takes minutes: pytest --emulate sm_90")
    for case in mutation_cases.MUTATED[title]():
        case()
