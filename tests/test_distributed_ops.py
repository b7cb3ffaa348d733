# SPDX-License-Identifier: Apache-2.0
"""The ops before and after a collective: they keep the rules of torch.library, and none waits for a GPU."""

from __future__ import annotations

import pytest
import torch
import vocab_cases
from pool import Pool
from torch.testing import assert_close

from fused_ppl.engines import linear_rows, linear_vocab, logits, totals, vocab_parallel
from fused_ppl.spec import LossSpec
from fused_ppl.testing import make_logits, make_target

OPS = torch.ops.fused_ppl
SPECS = {
    "plain": LossSpec(),
    "all": LossSpec(label_smoothing=0.1, logit_scale=0.5, softcap=3.0, z_loss=0.1, max_nll=1.0, stats=True),
    "each token": LossSpec(reduction="none", z_loss=0.1),
    "sequences": LossSpec(reduction="sequence"),
}
TRUE = (True,) * 3


def inputs():
    return make_logits((2, 3, 11)), make_target((2, 3), 11), torch.rand(11), torch.rand(2, 3)


@pytest.mark.parametrize("name", SPECS)
def test_ops_keep_the_rules_of_torch_library(name, backend):
    x, y, weight, token_weight = inputs()
    spec = SPECS[name].op_args()
    torch.library.opcheck(OPS.logits_sums.default, (x, y, weight, token_weight, *spec, backend, None))
    sums, nll, *_ = OPS.logits_sums(x, y, weight, token_weight, *spec, backend, None)
    torch.library.opcheck(OPS.finish.default, (sums, torch.tensor(3.0), *spec, nll.dtype, 2))
    head = (torch.randn(2, 3, 5), torch.randn(11, 5), torch.randn(11))
    how = (backend, torch.float32, TRUE if name in ("plain", "all") else (False,) * 3, None)
    torch.library.opcheck(OPS.linear_sums.default, (*head, y, weight, token_weight, *spec, *how))


@pytest.mark.parametrize("name", SPECS)
def test_sums_that_are_finished_at_once_are_the_loss_of_one_process(name, backend):
    x, y, weight, token_weight = inputs()
    spec, how = SPECS[name].op_args(), (backend, None)
    sums, *tokens = OPS.logits_sums(x, y, weight, token_weight, *spec, *how)
    assert sums.dtype == torch.float64
    results = (*OPS.finish(sums, None, *spec, tokens[0].dtype, 1), *tokens)
    for a, b in zip(results, OPS.logits_forward(x, y, weight, token_weight, None, *spec, *how), strict=True):
        assert_close(a, b, rtol=1e-6, atol=0)
    twice = OPS.finish(sums, None, *spec, tokens[0].dtype, 2)
    for a, b, times in zip(twice, results[:5], (1, 1, 1, 2, 2), strict=True):
        assert_close(a, b * times, rtol=0, atol=0)


def shard_calls(x, head, y, weight, token_weight, spec, how, dtype, ops):
    """Every op of vocabulary shards with its arguments, in order: `ops(name, *args)` runs one."""
    shard = (4, 11, 12345)  # columns 4 and on of 11 classes
    for parts in (
        ops("shard_logits", x, y, weight, *spec, *how, *shard),
        ops("shard_hidden", *head, y, weight, *spec, how[0], dtype, how[1], *shard),
    ):
        shards, maxima = parts
        added = ops("shard_sums", shards, maxima, *spec)
        sums, nll, lse, *_ = ops("shard_merge", maxima, added, y, weight, token_weight, *spec, 11, dtype)
        totals_ = ops("finish", sums, None, *spec, dtype, 1)
        one = torch.ones(totals_[0].shape, device=x.device)
        saved = (y, weight, token_weight, lse, nll, *totals_[3:], one, one)
        ops("shard_logits_backward", x, *saved, *spec, *how, *shard[:2])
        ops("shard_logits_backward_", x.clone(), *saved, *spec, *how, *shard[:2])
        ops("linear_vocab_backward", *head, *saved, *spec, how[0], dtype, TRUE, how[1], *shard[:2])


@pytest.mark.parametrize("name", SPECS)
def test_ops_of_shards_keep_the_rules_of_torch_library(name, backend):
    def checked(op, *args):
        torch.library.opcheck(getattr(OPS, op).default, args)
        return getattr(OPS, op)(*args)

    x, y, weight, token_weight = inputs()
    head = (torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7))
    spec = SPECS[name].op_args()
    shard_calls(x[..., 4:], head, y, weight, token_weight, spec, (backend, None), torch.float32, checked)


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
        spec = SPECS[name].op_args()
        sums, nll, *_ = logits._sums(x, y, weight, token_weight, *spec, "torch", None)
        totals._finish(sums, None, *spec, nll.dtype, 2)
        head = (torch.empty(2, 3, 5, device="cuda"), torch.empty(11, 5, device="cuda"), None)
        linear_rows._sums(*head, y, weight, token_weight, *spec, "torch", torch.float32, (True, True, False), None)
        real = {
            "shard_logits": vocab_parallel._shard_logits,
            "shard_hidden": vocab_parallel._shard_hidden,
            "shard_sums": vocab_parallel._shard_sums,
            "shard_merge": vocab_parallel._shard_merge,
            "finish": totals._finish,
            "shard_logits_backward": vocab_parallel._backward,
            "shard_logits_backward_": vocab_parallel._backward_,
            "linear_vocab_backward": linear_vocab._backward,
        }
        x, head = (
            torch.empty(2, 3, 7, device="cuda"),
            (head[0], *(torch.empty(s, device="cuda") for s in ((7, 5), (7,)))),
        )
        rest = (x, head, y, weight, token_weight, spec, ("torch", None), torch.float32)
        shard_calls(*rest, lambda op, *args: real[op](*args))
    assert nll.device.type == "cuda"
