# SPDX-License-Identifier: Apache-2.0
"""The kernels at ragged shapes for a sanitizer that runs what Triton's compiler makes of them, without a GPU.

    .ci/ttsem        makes an environment with ttsem 0.1.0 and triton 3.8.0, and there runs
    python -m ttsem.sanitize pytest --noconftest tests/sanitize/ragged.py

ttsem executes the compiler's IR and stops at an access outside of the tensors of a launch and at a race between
programs. It does not model release and acquire, so the rows are not split and no sums are asked for: the one step that
programs take in turn is checked by bench/sanitize.py, which does. Not collected by a plain pytest run.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fused_ppl.backends import triton_rows
from fused_ppl.records import Normalizers, RowUpstream, TokenInputs
from fused_ppl.reference import logits_loss
from fused_ppl.spec import LossSpec

pytest.importorskip("ttsem.sanitize", reason="run it as the first lines of the file say")
IGNORED = -100
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ALL = LossSpec(reduction="none", label_smoothing=0.1, logit_scale=0.7, softcap=5.0, z_loss=1e-2, stats=True)


def inputs(n, v, dtype, offset, pad):
    """(1, N, V) logits between NaN, and targets: the first class, the last one, an ignored one."""
    buffer = torch.full((offset + n * (v + pad) + 16,), float("nan"), dtype=dtype, device="cuda")
    view = buffer.as_strided((1, n, v), (n * (v + pad), v + pad, 1), offset)
    view.copy_(torch.randn(1, n, v, generator=torch.Generator().manual_seed(v)) * 3)
    target = torch.arange(n, device="cuda") * 5 % v
    target[-1] = v - 1
    if n > 2:
        target[1] = IGNORED
    return view, target


def check(n, v, dtype, spec, offset=0, pad=0, weight=None, token_weight=None):
    logits, target = inputs(n, v, dtype, offset, pad)
    x = logits[0].double().requires_grad_()
    truth = logits_loss(x, target, spec, weight=weight, token_weight=token_weight)
    (gradient,) = torch.autograd.grad(truth.loss.sum(), x)
    tokens = TokenInputs(target, weight, token_weight)
    stats, totals = triton_rows.nll_forward(logits, tokens, spec, num_items=None, memory_budget=None)
    assert totals is None
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(stats.nll, truth.nll, **close)
    torch.testing.assert_close(stats.lse, truth.lse, **close)
    if spec.stats:
        torch.testing.assert_close(stats.entropy, truth.entropy, rtol=1e-3, atol=1e-4, check_dtype=False)
        assert torch.equal(stats.predicted, truth.predicted)
    out = torch.full_like(logits, float("nan"))
    ones = torch.ones(n, device="cuda")
    of_z = ones if spec.z_loss else None
    known, upstream = Normalizers(stats.lse, stats.nll), RowUpstream(ones, of_z)
    how = {"normalizers": known, "upstream": upstream, "memory_budget": None}
    triton_rows.nll_backward(logits, tokens, spec, out=out, **how)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out[0].double(), gradient, rtol=tolerance, atol=tolerance)
    triton_rows.nll_backward(logits, tokens, spec, out=logits, **how)  # in place
    torch.testing.assert_close(logits[0].double(), gradient, rtol=tolerance, atol=tolerance)


# one class, fewer than a vector, a tile without its last elements, several tiles, odd
@pytest.mark.parametrize("v", [1, 2, 3, 9, 127, 129, 517, 1000])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_vocabulary(v, dtype):
    check(4, v, dtype, LossSpec(reduction="none"), offset=v % 7, pad=v % 4)


@pytest.mark.parametrize("offset", range(8))
def test_a_base_off_by_elements(offset):
    check(2, 300, torch.bfloat16, LossSpec(reduction="none"), offset=offset, pad=1)


@pytest.mark.parametrize("v", [3, 129, 517])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_option_at_once(v, dtype):
    weight, token_weight = torch.linspace(0.2, 3, v, device="cuda"), torch.linspace(0.5, 2, 4, device="cuda")
    check(4, v, dtype, ALL, offset=1, pad=1, weight=weight, token_weight=token_weight)


@pytest.mark.parametrize("v", [3, 129, 517])
def test_the_chunk_primitive(v):
    logits, target = inputs(4, v, torch.bfloat16, 0, 0)
    spec, rows = LossSpec(reduction="none"), logits[0]
    x = rows.double().requires_grad_()
    truth = logits_loss(x, target, spec)
    (gradient,) = torch.autograd.grad(truth.loss.sum(), x)
    at_target = rows.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1).float()
    stats = triton_rows.nll_forward_backward(
        rows, TokenInputs(target, None, None), spec, target_logit=at_target, upstream=1.0, memory_budget=None
    )
    torch.testing.assert_close(stats.nll, truth.nll, rtol=1e-4, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(rows.double(), gradient, rtol=1.6e-2, atol=1.6e-2)


@triton.jit
def planted_kernel(out_ptr, last, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.program_id(0), mask=offs < last)


def test_a_planted_store_out_of_bounds_is_caught():
    out = torch.zeros(37, dtype=torch.int32, device="cuda")
    planted_kernel[(3,)](out, 37, 16, 16)
    with pytest.raises(Exception, match=r"writes 1 element.* past the end of the tensor passed as `out_ptr`"):
        planted_kernel[(3,)](out, 38, 16, 16)


def test_a_planted_race_is_caught():
    out = torch.zeros(37, dtype=torch.int32, device="cuda")
    with pytest.raises(Exception, match="both touch element 15 of `out_ptr`"):
        planted_kernel[(3,)](out, 37, 15, 16)
