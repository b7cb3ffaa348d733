# SPDX-License-Identifier: Apache-2.0
"""The fused LM head: bad input, and corners of the number line."""

from __future__ import annotations

import contextlib
import dataclasses

import on_device
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fused_ppl
from fused_ppl import Options, linear_cross_entropy, linear_cross_entropy_with_stats


@pytest.fixture(autouse=True)
def _over_the_backend_under_test(backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)


def make_head(n, v, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((n, d), (v, d), (v,))]
    return tensors, torch.randint(v, (n,), generator=generator)


HEAD = torch.zeros(5, 3)
HIDDEN = torch.zeros(2, 3)
ERRORS = {
    "1-d weight": ((HIDDEN, HEAD[0], {}), ValueError, r"linear_weight must have shape \(V, D\); got \(3,\)"),
    "wrong width": ((torch.zeros(2, 4), HEAD, {}), ValueError, r"D = 3 .* got \(2, 4\)"),
    "wrong bias": ((HIDDEN, HEAD, {"linear_bias": torch.zeros(4)}), ValueError, r"must have shape \(5,\); got \(4,\)"),
    "two dtypes": ((HIDDEN.half(), HEAD, {}), TypeError, "one dtype outside autocast.*float16.*use torch.autocast"),
    "in place": ((HIDDEN, HEAD, {"options": Options(inplace_backward=True)}), ValueError, "for logits"),
    "integer hidden": ((HIDDEN.long(), HEAD, {}), TypeError, "input must be float16"),
    "no columns": ((HIDDEN[:, :0], HEAD[:, :0], {}), ValueError, r"at least one column; got shape \(5, 0\)"),
    "no classes": ((HIDDEN, HEAD[:0], {}), ValueError, "at least one class"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_state_the_rule_the_value_and_the_way_out(case):
    (hidden, weight, keywords), error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        linear_cross_entropy(hidden, weight, torch.zeros(2, dtype=torch.long), **keywords)


@pytest.mark.cpu("a GPU makes NaN of a target out of range")
def test_a_target_out_of_range_raises_on_a_cpu():
    with pytest.raises(IndexError, match=r"target must be in \[0, 5\).*got 5"):
        linear_cross_entropy(HIDDEN, HEAD, torch.tensor([1, 5]))


def test_modules_refuse_several_targets():
    with pytest.raises(ValueError, match=r"out_features must be \(\)"):
        fused_ppl.LinearCrossEntropyLoss(4, 5, out_features=(2,))


@pytest.mark.parametrize("budget", [None, 1])
def test_without_a_counted_token_zero_items_give_zero_gradients(budget):
    tensors, _ = make_head(6, 11, 4)
    target = torch.full((6,), -100)
    leaves = [t.requires_grad_() for t in tensors]
    options = Options(memory_budget=budget)
    loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], num_items=0, options=options)
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, leaves))


def test_autocast_leaves_float64_alone(fits):
    fits(6, 11, dtype=torch.float64)
    tensors, target = make_head(6, 11, 4, torch.float64)
    with torch.autocast(on_device.device.type, dtype=torch.bfloat16):
        mine = linear_cross_entropy(*tensors[:2], target)
    assert_close(mine, F.cross_entropy(tensors[0] @ tensors[1].T, target))


def test_a_target_that_cannot_be_has_an_entropy_all_the_same():
    (hidden, weight, bias), target = make_head(6, 11, 4)
    bias[target[2]] = -torch.inf
    out = linear_cross_entropy_with_stats(hidden, weight, target, linear_bias=bias)
    logp = F.linear(hidden.double(), weight.double(), bias.double()).log_softmax(1)
    assert_close(out.entropy.double(), -(logp.exp() * logp.clamp(min=-1e300)).sum(1), rtol=1e-5, atol=1e-6)


def test_float64_is_float64_also_21_nats_down(fits):
    fits(1, 2, dtype=torch.float64)
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.0], [21.0]], dtype=torch.float64)
    nll = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    assert_close(nll, F.cross_entropy(hidden @ weight.T, torch.tensor([0])), rtol=1e-15, atol=0)


@pytest.mark.cpu("a GPU makes NaN of a target out of range")
def test_a_bad_target_is_named_at_the_callers_position():
    with pytest.raises(IndexError, match="got 99 at flat position 5"):
        linear_cross_entropy(torch.zeros(6, 3), HEAD, torch.tensor([-100, -100, -100, 1, 2, 99]))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("depth", [-1e4, -1e6, -1e9])
def test_a_target_deep_below_the_others_leaves_their_gradients_right(depth, z_loss):
    """lse must not be the sum of two large numbers that cancel; per token, backward is made of it."""
    bias = torch.linspace(-1, 1, 8).index_fill(0, torch.tensor(3), depth)
    target = torch.tensor([3, 3])
    gradients = []
    for dtype in (torch.float32, torch.float64):
        b = bias.to(dtype).requires_grad_()
        hidden, weight = torch.zeros(2, 8, dtype=dtype), torch.eye(8, dtype=dtype)
        if dtype == torch.float32:
            loss = linear_cross_entropy(hidden, weight, target, linear_bias=b, reduction="none", z_loss=z_loss)
        else:
            z = b.expand(2, 8)
            loss = F.cross_entropy(z, target, reduction="none") + z_loss * z.logsumexp(1).square()
        (gradient,) = torch.autograd.grad(loss.sum(), b)
        gradients.append(gradient.double())
    assert_close(*gradients, rtol=2e-6, atol=0)


def test_an_infinite_target_logit_is_nan_as_in_pytorch():
    bias = torch.tensor([0.0, torch.inf, 0.0])
    loss = linear_cross_entropy(torch.zeros(2, 3), torch.eye(3), torch.tensor([1, 1]), linear_bias=bias)
    assert loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_reaches_no_sum(dtype, options):
    """Its dtype is that of the products; what is made of them, here or in a backward inside it, stays float32."""
    torch.manual_seed(0)
    n, v, d = 64, 300, 8
    x, w, y = torch.randn(n, v), torch.rand(v) * 50, torch.randint(v, (n,))
    want = torch.nn.functional.cross_entropy(x, y, w, label_smoothing=0.5)
    h, head = torch.randn(n, d), torch.randn(v, d) * 0.1
    grads = []
    with torch.autocast(on_device.device.type, dtype):
        got = fused_ppl.cross_entropy(x, y, w, label_smoothing=0.5, options=options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for inside in (False, True):
        weight = head.clone().requires_grad_()
        with torch.autocast(on_device.device.type, dtype):
            loss = fused_ppl.linear_cross_entropy(h, weight, y, reduction="none", options=options).sum() / 2**20
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)


PLANS = {
    "rows": Options(),
    "vocab": Options(memory_budget=1),
    "compact": Options(gradient_columns=4),
}


# in float32 alone, which holds e^88, and in float64 as well, which holds e^709
@pytest.mark.parametrize("scale", [15, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_ignored_rows_have_a_gradient_of_zero_where_the_perplexity_is_inf(plan, dtype, scale, backend):
    """0 * inf would be NaN. What stands beside them is inf or NaN, as plain autograd has it."""
    (hidden, weight, bias), target = make_head(6, 11, 4)
    target[[0, 4]] = -100
    leaves = [(scale * t).to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    options = dataclasses.replace(PLANS[plan], backend=backend)
    mean = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], options=options)
    assert (mean.item() > 709) == (scale == 40) and mean.item() > 89
    value = fused_ppl.linear_perplexity(*leaves[:2], target, linear_bias=leaves[2], options=options)
    assert value.isinf()
    gradients = torch.autograd.grad(value, leaves)
    assert not gradients[0][[0, 4]].any()
    assert not gradients[0][[1, 2, 3, 5]].isfinite().all(1).any()
    assert not gradients[1].isfinite().all()


@pytest.mark.parametrize("factor", [torch.inf, torch.nan, -torch.inf])
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_counted_gives_zeros_whatever_the_gradient_is_multiplied_by(plan, factor, backend):
    tensors, _ = make_head(6, 11, 4)
    leaves = [t.requires_grad_() for t in tensors]
    options = dataclasses.replace(PLANS[plan], backend=backend)
    target = torch.full((6,), -100)
    loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], num_items=3, options=options)
    for gradient in torch.autograd.grad(loss * factor, leaves):
        assert not gradient.any()


@pytest.mark.parametrize("plan", ["rows", "compact"])
@pytest.mark.parametrize("when", ["while the graph is made", "afterwards"])
def test_no_hook_sees_a_saved_tensor_change(plan, when, backend):
    """The last backward scales the gradients in their own memory where nobody can tell."""
    (hidden, weight, bias), target = make_head(6, 11, 4)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    seen = []

    def pack(tensor):
        seen.append((tensor, tensor.clone()))
        return tensor

    def unpack(tensor):
        return tensor

    options = dataclasses.replace(PLANS[plan], backend=backend)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    with hooks if when == "while the graph is made" else contextlib.nullcontext():
        loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], options=options)
    if when == "afterwards":
        for saved in loss.grad_fn._raw_saved_tensors:
            with contextlib.suppress(RuntimeError):  # what was saved as None takes no hooks
                saved.register_hooks(pack, unpack)
    gradients = torch.autograd.grad(loss * 3, leaves)
    assert len(seen) >= 6
    for tensor, before in seen:
        assert torch.equal(tensor, before)
    loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], options=options)
    for a, b in zip(gradients, torch.autograd.grad(loss * 3, leaves), strict=True):
        assert torch.equal(a, b)


def test_the_last_backward_scales_in_the_memory_of_what_was_saved(backend):
    (hidden, weight, _), target = make_head(6, 11, 4)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, options=Options(backend=backend))
    (saved,) = (t for t in loss.grad_fn.saved_tensors if t is not None and t.shape == weight.shape and t is not weight)
    place = saved.data_ptr()
    del saved
    loss.backward()
    assert weight.grad.data_ptr() == place
