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
from typing import Any

import on_device
import pytest
import torch
from torch.testing import assert_close

from fused_ppl import linear_cross_entropy, linear_cross_entropy_with_stats
from fused_ppl.integrations import liger as adapter
from fused_ppl.testing import make_target

if "triton" not in on_device.backends():
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
    if not on_device.interpreted():
        return
    monkeypatch.setattr(liger_ops, "tanh", lambda x: 1 - 2 / (1 + tl.exp(2 * x)))
    kernel = InterpretedKernel(liger_ops.liger_cross_entropy_kernel)
    monkeypatch.setattr(liger_ops, "liger_cross_entropy_kernel", kernel)
    monkeypatch.setattr(liger_head, "liger_cross_entropy_kernel", kernel)


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


# the adapter: Liger's own examples and arguments, in Liger's order

SETTINGS = [
    {},
    {"softcap": 3.0, "label_smoothing": 0.1, "accum_dtype": torch.float32},
    {"ce_weight": torch.linspace(0.5, 2, V), "ignore_index": 3},
    {"lse_square_scale": 0.01, "return_z_loss": True},
    {"return_token_accuracy": True, "return_predicted_tokens": True},
]


def assert_same_output(got: Any, want: Any) -> None:
    if isinstance(want, torch.Tensor):
        assert_close(got, want, rtol=1e-5, atol=1e-5)
        return
    for name in ("loss", "z_loss", "token_accuracy", "predicted_tokens"):
        mine, other = getattr(got, name), getattr(want, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_the_example_of_liger_s_readme(backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 256)
    hidden, target = torch.randn(4, 128, requires_grad=True), torch.randint(256, (4,))
    results = []
    for package in (liger, adapter):
        model.zero_grad()
        hidden.grad = None
        loss_fn = package.LigerFusedLinearCrossEntropyLoss()
        loss = loss_fn(model.weight, hidden, target)
        loss.backward()
        results.append((loss.detach(), hidden.grad, model.weight.grad))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ", ".join(s) or "plain")
def test_the_adapter_of_the_fused_head(settings, reduction, backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    target = make_target((N,), V, ignored=0.3)
    hidden, weight, bias = make(True)
    want, got = (
        package.LigerFusedLinearCrossEntropyLoss(reduction=reduction, **settings)(weight, hidden, target, bias)
        for package in (liger, adapter)
    )
    assert_same_output(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ", ".join(s) or "plain")
def test_the_adapter_of_the_logits(settings, reduction, backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    settings = {"weight" if k == "ce_weight" else k: v for k, v in settings.items() if k != "accum_dtype"}
    target = make_target((N,), V, ignored=0.3)
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(1))
    got = adapter.LigerCrossEntropyLoss(reduction=reduction, **settings)(logits, target)
    want = liger.LigerCrossEntropyLoss(reduction=reduction, **settings)(logits.clone(), target)
    assert_same_output(got, want)


def test_the_adapter_s_mean_over_no_token_is_liger_s(backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    hidden, weight = make(False)
    target = torch.full((N,), -100)
    got = adapter.LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)
    assert_close(got.detach(), liger.LigerFusedLinearCrossEntropyLoss()(weight, hidden, target).detach())
    assert all((g == 0).all() for g in torch.autograd.grad(got, (hidden, weight)))
