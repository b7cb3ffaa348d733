# SPDX-License-Identifier: Apache-2.0
"""Values and gradients are those of TRL's chunked log-probabilities and of Liger's fused scaled cross-entropy.

Both run on a CPU in plain PyTorch: TRL folds its tiles there without Triton, and Liger has a fallback for devices that
its CUTLASS kernels do not run on. Two things differ in meaning and are compared only where they agree:

- TRL divides by a temperature after the cap, and here `logit_scale` is before it.
- Neither returns an lse. TRL scores ignored tokens as well, and leaves them to a mask.
"""

from __future__ import annotations

import pytest
import torch
from token_cases import mixture
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import LogProbs, linear_log_probs
from fused_ppl.testing import make_target

N, V, D = 9, 129, 16
NAMES = [("log_prob",), ("entropy",), ("log_prob", "entropy")]
UPSTREAM = mixture((N,))


def make(bias: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))[: 2 + bias]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def assert_same(ours: LogProbs, theirs: tuple[Tensor, Tensor], leaves: list[list[Tensor]], names, counted) -> None:
    """The values of counted tokens, and all gradients from the upstream gradients of some of the outputs."""
    for mine, other in zip(ours[:2], theirs, strict=True):
        assert_close(mine[counted], other[counted], rtol=1e-5, atol=1e-5)
    upstream = [UPSTREAM[name].float() * counted for name in names]
    pick = [("log_prob", "entropy").index(name) for name in names]
    got = torch.autograd.grad([ours[i] for i in pick], leaves[0], upstream)
    want = torch.autograd.grad([theirs[i] for i in pick], leaves[1], upstream)
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", NAMES, ids="+".join)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"temperature": 0.7}, {"logit_scale": 1 / 0.7}),
        ({"final_logit_softcapping": 3.0, "logit_scale": 0.5}, {"softcap": 3.0, "logit_scale": 0.5}),
    ],
    ids=["plain", "temperature", "cap and scale"],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [V, 50], ids=["one chunk", "chunks"])
def test_same_as_the_chunked_log_probabilities_of_trl(chunk, bias, theirs, ours, names, options):
    kernels = pytest.importorskip("trl.kernels", reason="needs a TRL that has trl.kernels (pip install trl)")
    function = getattr(kernels, "ChunkedLogProbFunction", None)
    if function is None:
        pytest.skip("this TRL has no ChunkedLogProbFunction in trl.kernels")
    target = make_target((N,), V, ignored=0.3)
    mine, other = make(bias), make(bias)
    settings = {"temperature": 1.0, "final_logit_softcapping": None, "logit_scale": 1.0, **theirs}
    counted = target != -100
    result = function.apply(
        other[0],
        other[1],
        other[2] if bias else None,
        target.clamp(min=0),
        settings["temperature"],
        chunk,
        settings["final_logit_softcapping"],
        settings["logit_scale"],
        ("entropy",),
    )
    got = linear_log_probs(*mine[:2], target, linear_bias=mine[2] if bias else None, options=options, **ours)
    assert_same(got, (result[0], result[1]), [mine, other], names, counted)


@pytest.mark.parametrize("names", NAMES, ids="+".join)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_same_as_the_fused_scaled_cross_entropy_of_liger(temperature, names, options):
    ops = pytest.importorskip("liger_kernel.ops", reason="needs liger-kernel (pip install liger-kernel)")
    function = getattr(ops, "LigerFusedLinearScaledCrossEntropyFunction", None)
    if function is None:
        pytest.skip("this Liger has no LigerFusedLinearScaledCrossEntropyFunction")
    target = make_target((N,), V, ignored=0.3)
    mine, other = make(False), make(False)
    nll, entropy = function.apply(*other, target, temperature, -100, 1, True)
    got = linear_log_probs(*mine, target, logit_scale=1 / temperature, options=options)
    assert torch.equal(got.entropy[target == -100], entropy[target == -100])
    assert_same(got, (-nll, entropy), [mine, other], names, target != -100)
