# SPDX-License-Identifier: Apache-2.0
"""The ops before and after a collective: they keep the rules of torch.library, and none waits for a GPU."""

from __future__ import annotations

import pytest
import torch
import vocab_cases
from op_cases import checked_op
from pool import Pool
from torch.testing import assert_close

from fused_ppl.engines import linear_rows, logits
from fused_ppl.engines.finish import finish
from fused_ppl.engines.ops import OPS
from fused_ppl.records import (
    Execution,
    HeadExecution,
    HeadInputs,
    LogitsInputs,
    Normalizers,
    Shard,
    TokenInputs,
    Upstream,
)
from fused_ppl.spec import IN_SCALARS, LossSpec
from fused_ppl.testing import make_logits, make_target

SPECS = {
    "plain": LossSpec(),
    "all": LossSpec(label_smoothing=0.1, logit_scale=0.5, softcap=3.0, z_loss=0.1, max_nll=1.0, stats=True),
    "each token": LossSpec(reduction="none", z_loss=0.1),
    "sequences": LossSpec(reduction="sequence"),
    "tensors": LossSpec(
        softcap=IN_SCALARS, z_loss=IN_SCALARS, scalars=torch.tensor([3.0, 0.1, 0], dtype=torch.float64)
    ),
}
TRUE = (True,) * 3


def inputs():
    return make_logits((2, 3, 11)), make_target((2, 3), 11), torch.rand(11), torch.rand(2, 3)


@pytest.mark.parametrize("name", SPECS)
def test_ops_keep_the_rules_of_torch_library(name, backend):
    x, *tokens = inputs()
    tokens = checked_op("logits_sums", LogitsInputs(x, *tokens, None), SPECS[name], Execution(backend, None))
    checked_op("finish", tokens.sums, torch.tensor(3.0), SPECS[name], dtype=tokens.nll.dtype, ranks=2)
    head = (torch.randn(2, 3, 5), torch.randn(11, 5), torch.randn(11))
    execution = HeadExecution(backend, None, torch.float32, TRUE if name in ("plain", "all") else (False,) * 3)
    checked_op("linear_sums", HeadInputs(*head, *inputs()[1:], None), SPECS[name], execution)


@pytest.mark.parametrize("name", SPECS)
def test_sums_that_are_finished_at_once_are_the_loss_of_one_process(name, backend):
    given, spec, execution = LogitsInputs(*inputs(), None), SPECS[name], Execution(backend, None)
    sums, *tokens = logits.logits_sums(given, spec, execution)
    assert sums.dtype == torch.float64
    totals = finish(sums, None, spec, dtype=tokens[0].dtype, ranks=1)
    for a, b in zip((*totals, *tokens), logits.logits_forward(given, spec, execution), strict=True):
        assert_close(a, b, rtol=1e-6, atol=0)
    twice = finish(sums, None, spec, dtype=tokens[0].dtype, ranks=2)
    for a, b, times in zip(twice, totals, (1, 1, 1, 2, 2), strict=True):
        assert_close(a, b * times, rtol=0, atol=0)


def shard_calls(given: LogitsInputs, head: HeadInputs, spec, execution: HeadExecution, ops):
    """Every op of vocabulary shards with its arguments, in order: `ops(name, *args)` runs one."""
    shard, layout, simple = Shard(4, 11), 12345, Execution(execution.backend, None)  # columns 4 and on of 11 classes
    tokens, dtype = TokenInputs(given.target, given.weight, given.token_weight), execution.dtype
    for stats in (
        ops("shard_logits", given, spec, simple, shard=shard, layout=layout),
        ops("shard_hidden", head, spec, execution, shard=shard, layout=layout),
    ):
        added = ops("shard_sums", stats, spec)
        merged = ops("shard_merge", stats.maxima, added, tokens, spec, num_classes=11, dtype=dtype)
        totals = ops("finish", merged.sums, None, spec, dtype=dtype, ranks=1)
        one = torch.ones(totals.loss.shape, device=given.logits.device)
        upstream = Upstream(totals.loss_factor, totals.perplexity_factor, one, one)
        for name, x in (("shard_logits_backward", given.logits), ("shard_logits_backward_", given.logits.clone())):
            ops(name, logits.Saved(x, *tokens, merged.lse, merged.nll), upstream, spec, simple, shard=shard)
        known = Normalizers(merged.lse, merged.nll)
        ops("linear_vocab_backward", head, upstream, spec, execution, normalizers=known, shard=shard)


@pytest.mark.parametrize("name", SPECS)
def test_ops_of_shards_keep_the_rules_of_torch_library(name, backend):
    x, *tokens = inputs()
    head = HeadInputs(torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7), *tokens, None)
    execution = HeadExecution(backend, None, torch.float32, TRUE)
    shard_calls(LogitsInputs(x[..., 4:], *tokens, None), head, SPECS[name], execution, checked_op)


@pytest.mark.parametrize(
    ("name", "dtype"), zip(vocab_cases.NAMES, (torch.float32, torch.bfloat16, torch.float32), strict=True)
)
def test_shards_on_either_backend_give_the_numbers_of_one_process(pool: Pool, backend, name, dtype):
    arguments = ("sizes", name, "all", "mean", dtype, backend)
    pool.run(2, vocab_cases.head, *arguments)
    pool.run(3, vocab_cases.logits, *arguments)


@pytest.mark.parametrize("name", SPECS)
def test_nothing_waits_for_a_gpu(name, fake_gpu):
    with fake_gpu():
        x, weight, token_weight = (torch.empty(shape, device="cuda") for shape in ((2, 3, 11), (11,), (2, 3)))
        y = torch.zeros(2, 3, dtype=torch.long, device="cuda")
        spec, tokens = SPECS[name], (y, weight, token_weight)
        found = logits.logits_sums.function(LogitsInputs(x, *tokens, None), spec, Execution("torch", None))
        finish.function(found.sums, None, spec, dtype=found.nll.dtype, ranks=2)
        head = (torch.empty(2, 3, 5, device="cuda"), torch.empty(11, 5, device="cuda"), None)
        execution = HeadExecution("torch", None, torch.float32, (True, True, False))
        linear_rows.linear_sums.function(HeadInputs(*head, *tokens, None), spec, execution)
        x, weight_, bias = (torch.empty(s, device="cuda") for s in ((2, 3, 7), (7, 5), (7,)))
        given, head = LogitsInputs(x, *tokens, None), HeadInputs(head[0], weight_, bias, *tokens, None)
        execution = HeadExecution("torch", None, torch.float32, TRUE)
        shard_calls(given, head, spec, execution, lambda op, *args, **keywords: OPS[op].function(*args, **keywords))
    assert found.nll.device.type == "cuda"
