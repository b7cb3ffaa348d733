# SPDX-License-Identifier: Apache-2.0
"""Values and gradients are those of Liger's fused linear cross-entropy, whose kernels run in Triton's interpreter.

Left out, because the two mean different things:

- z-loss with class weights: Liger divides its z-loss by the number of counted tokens and leaves the weights out of it;
  here both parts of the loss have the same weights and the same divisor.
- `use_token_scaling`: weights the tokens by their own probability and divides by their number. `token_weight` divides
  by the sum of the weights; `reduction="sum"` with `token_weight` is the same up to that divisor.
- no counted token: Liger gives 0, here as in PyTorch it is NaN, with gradients of zero in both.
- hidden states that need no gradient: Liger gives the weight none either (`test_linear.py` tests all combinations).
- a target outside [0, V): Liger's fused head reads outside of the row and returns a number.
- bf16 and fp16: Liger's logits are all rounded to that dtype; here the target's is an fp32 dot.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fused_ppl import linear_cross_entropy, linear_cross_entropy_with_stats
from fused_ppl.testing import make_target

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Liger's kernels run on a CPU only under TRITON_INTERPRET=1", allow_module_level=True)
liger = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel (pip install liger-kernel)")
import liger_kernel.ops.cross_entropy as liger_ops  # noqa: E402
import liger_kernel.ops.fused_linear_cross_entropy as liger_head  # noqa: E402
import triton.language as tl  # noqa: E402

N, V, D = 7, 129, 16
OPTIONS = {
    "label_smoothing": (0.0, 0.1),
    "softcap": (None, 3.0),
    "z_loss": (0.0, 0.01),
    "weight": (False, True),
    "bias": (False, True),
}
CASES = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
CASES = [case for case in CASES if not (case["z_loss"] and case["weight"])]  # the reason is above


class Scalar(float):
    """What a float argument of a compiled kernel can do, and one of the interpreter cannot."""

    def to(self, dtype: object) -> Scalar:
        return self


class InterpretedKernel:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**kwargs: Any) -> None:
            self.kernel[grid](**{k: Scalar(v) if isinstance(v, float) else v for k, v in kwargs.items()})

        return launch


@pytest.fixture(autouse=True)
def _liger_in_the_interpreter(monkeypatch):
    """Two things that the interpreter lacks: methods of float arguments, and libdevice's tanh."""
    monkeypatch.setattr(liger_ops, "tanh", lambda x: 1 - 2 / (1 + tl.exp(2 * x)))
    monkeypatch.setattr(
        liger_head, "liger_cross_entropy_kernel", InterpretedKernel(liger_head.liger_cross_entropy_kernel)
    )


def name_of(case: dict) -> str:
    return ", ".join(name for name, value in case.items() if value) or "plain"


def make(bias: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))[: 2 + bias]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_same_value_and_gradients(case, reduction, options):
    target = make_target((N,), V, ignored=0.3)
    weight = torch.linspace(0.5, 2, V) if case["weight"] else None
    common = {"reduction": reduction, "label_smoothing": case["label_smoothing"], "softcap": case["softcap"]}
    loss_of = liger.LigerFusedLinearCrossEntropyLoss(
        ce_weight=weight, lse_square_scale=case["z_loss"], accum_dtype=torch.float32, **common
    )
    theirs, ours = make(case["bias"]), make(case["bias"])
    want = loss_of(theirs[1], theirs[0], target, *theirs[2:])
    got = linear_cross_entropy(
        *ours[:2],
        target,
        linear_bias=ours[2] if case["bias"] else None,
        weight=weight,
        z_loss=case["z_loss"],
        options=options,
        **common,
    )
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(-2, 3, got.numel()).view(got.shape)
    for mine, other in zip(
        torch.autograd.grad(got, ours, upstream), torch.autograd.grad(want, theirs, upstream), strict=True
    ):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, V - 1])
def test_same_ignored_tokens_and_predictions(ignore_index, options):
    hidden, weight = make(False)
    target = make_target((N,), V)
    target[::3] = ignore_index
    result = liger.LigerFusedLinearCrossEntropyLoss(ignore_index=ignore_index, return_predicted_tokens=True)(
        weight, hidden, target
    )
    stats = linear_cross_entropy_with_stats(hidden, weight, target, ignore_index=ignore_index, options=options)
    assert_close(stats.loss, result.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.predicted, result.predicted_tokens)
