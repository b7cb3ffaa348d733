# SPDX-License-Identifier: Apache-2.0
"""A patched model on two ranks (gloo): the gradients of one process, however the model is wrapped; see hf_ranks.py."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers (pip install transformers accelerate)")
pytest.importorskip("accelerate", reason="needs accelerate (pip install accelerate)")

WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "hf_ranks.py")]
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(port), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(errors[-3000:] for _, errors in said)
    return json.loads(said[0][0].splitlines()[-1])


@pytest.mark.parametrize(
    "name",
    ["ddp", "sum of the losses", "tensor parallel", "Trainer: weights", "Trainer: perplexity"]
    + [
        f"shard_{layout}, patched {when}"
        for layout in ("root", "head_alone", "norm_and_head")
        for when in ("before", "after")
    ],
)
def test_two_ranks_have_the_gradients_of_one(results, name):
    assert results[name] <= 2e-6
