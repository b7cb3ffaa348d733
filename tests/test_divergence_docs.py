# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/divergence.md run, the student comes near its teacher, and the report is that of full logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "divergence.md"


def test_the_student_learns_and_the_report_is_right():
    page: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(compile(block, PAGE.name, "exec"), page)
    assert page["after"] < 0.5 * page["before"]
    report, tokens = page["report"], page["tokens"]
    with torch.no_grad():
        log_p, log_q = (
            page[name].head(page[name].hidden(tokens[:, :-1])).double().log_softmax(-1)
            for name in ("changed", "teacher")
        )
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    nll = [-log.gather(-1, tokens[:, 1:, None]).mean() for log in (log_p, log_q)]
    assert report["mean KL"] == pytest.approx(kl.mean().item(), rel=1e-2)  # of 1e-6 nats
    assert report["largest KL"] == pytest.approx(kl.max().item(), rel=1e-2)
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert report["same top token"] == pytest.approx(agree.item())
    assert report["perplexity over the original's"] == pytest.approx((nll[0] - nll[1]).exp().item(), rel=1e-5)
    for name, log in (("changed", log_p), ("original", log_q)):
        assert report[f"entropy, {name}"] == pytest.approx(-(log.exp() * log).sum(-1).mean().item(), rel=1e-5)
