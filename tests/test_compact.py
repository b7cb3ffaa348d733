# SPDX-License-Identifier: Apache-2.0
"""The compact fused head: held to a dense float64 construction of its approximation, and to the exact gradients with
its own residual as the bound."""

from __future__ import annotations

import gc

import on_device
import pytest
import torch
from compact_cases import ROWS, WHOLE, D, N, V, dense, expand, gradients, make, named, small_groups  # noqa: F401
from op_cases import checked_op
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import Options, backends, linear_cross_entropy, linear_cross_entropy_with_stats, linear_perplexity, plan
from fused_ppl.engines import compact, linear_compact
from fused_ppl.records import Compact, HeadExecution, HeadInputs, KeptColumns, TokenInputs
from fused_ppl.spec import LossSpec
from fused_ppl.testing import make_logits


@named
@pytest.mark.parametrize("count", [5, 30, 100])  # of 5 columns and 20 rows all targets are kept
def test_it_is_the_approximation_that_it_says_it_is(keywords, count, backend, fits):
    fits(N, V)
    tensors, target = make()
    keywords = expand(keywords)
    truth, (residual,) = dense(tensors, target, keywords, ROWS, count)
    options = Options(backend=backend, gradient_columns=count)
    _, found = gradients(linear_cross_entropy, tensors, target, reduction="sum", options=options, **keywords)
    for mine, true in zip(found, truth, strict=True):
        assert_close(mine.double(), true, rtol=1e-4, atol=2e-6 * true.abs().max().item() + 1e-6)
    if "z_loss" in keywords:
        return  # whose statistics need the gradient of each token, which is exact
    leaves = [t.requires_grad_() for t in tensors]
    said = linear_cross_entropy_with_stats(
        *leaves[:2], target, linear_bias=leaves[2], options=options, **keywords
    ).residual
    assert residual * (1 - 1e-4) <= said.item() <= 1.5 * residual


@named
def test_loss_and_statistics_are_those_of_rows_bit_for_bit(keywords, backend, fits):
    fits(N, V)
    tensors, target = make()
    leaves = [t.requires_grad_() for t in tensors]
    keywords = {k: v for k, v in expand(keywords).items() if k != "z_loss"}
    how = {"linear_bias": leaves[2], **keywords}
    exact = linear_cross_entropy_with_stats(*leaves[:2], target, options=Options(backend=backend), **how)
    options = Options(backend=backend, gradient_columns=1 / 4)
    found = linear_cross_entropy_with_stats(*leaves[:2], target, options=options, **how)
    assert exact.residual is None and found.residual is not None
    for mine, true in zip(found[:7], exact[:7], strict=True):
        assert torch.equal(mine, true)


def test_nll_is_that_of_rows_wherever_a_group_ends(monkeypatch):
    """Vector instructions and what is left over for single ones may differ in the last bit: groups are whole walks."""
    monkeypatch.setattr(plan, "GROUP_ROWS", {"cpu": 64, "gpu": 64})
    monkeypatch.setattr(plan, "CPU_BUFFER_PER_THREAD", 40 * V * 4)
    monkeypatch.setattr(plan, "CPU_BUFFER", 40 * V * 4)
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(500, D, generator=g), torch.randn(V, D, generator=g).requires_grad_()
    target = (hidden @ weight.detach().T).argmax(1)  # log(1 + x) of a small x shows it
    exact, found = (
        linear_cross_entropy_with_stats(hidden, weight, target, options=Options(backend="torch", gradient_columns=c))
        for c in (None, 70)
    )
    assert found.residual is not None
    assert torch.equal(found.nll, exact.nll)


def test_lse_of_a_row_is_the_same_wherever_it_stands():
    """Of one row, which vector instructions leave over, and among many."""
    from fused_ppl.backends.torch_chunks import Chunks
    from fused_ppl.backends.torch_stats import Others

    g = torch.Generator().manual_seed(4)
    top, excess, z_y = (torch.randn(997, generator=g, dtype=torch.float64) * 3 for _ in range(3))
    tokens = TokenInputs(torch.empty(0, dtype=torch.int64), None, None)
    chunks = Chunks(torch.empty(0, 3), tokens, LossSpec(), memory_budget=None)
    many = Others(top, top, excess, None, None, None).lse(chunks, z_y)
    for i in range(997):
        one = Others(*(t[i : i + 1] for t in (top, top, excess)), None, None, None).lse(chunks, z_y[i : i + 1])
        assert torch.equal(one, many[i : i + 1])
    assert_close(many, torch.logsumexp(torch.stack((top + excess, z_y)), 0))


def test_rows_sum_to_zero_and_the_bias_gradient_is_exact(backend, fits):
    """The row sums of G show in dh where the weight has a column of ones."""
    fits(N, V)
    (hidden, weight, bias), target = make()
    weight[:, 0] = 1
    options = Options(backend=backend, gradient_columns=30)
    _, found = gradients(linear_cross_entropy, [hidden, weight, bias], target, reduction="sum", options=options)
    exact_options = Options(backend=backend)
    _, exact = gradients(linear_cross_entropy, [hidden, weight, bias], target, reduction="sum", options=exact_options)
    assert found[0][:, 0].abs().max() < 2e-6
    assert_close(found[2], exact[2], rtol=1e-5, atol=2e-6)
    assert (found[1] - exact[1]).norm() > 1e-3 * exact[1].norm()


def test_rows_of_either_sign(backend, fits):
    fits(N, V)
    tensors, target = make()
    keywords = expand({"token_weight": True}, negative=True)
    truth, (residual,) = dense(tensors, target, keywords, ROWS, 60)
    options = Options(backend=backend, gradient_columns=60)
    _, found = gradients(linear_cross_entropy, tensors, target, reduction="sum", options=options, **keywords)
    for mine, true in zip(found, truth, strict=True):
        assert_close(mine.double(), true, rtol=1e-4, atol=1e-5)
    assert residual < 0.5


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
def test_a_tolerance_is_kept(tolerance, backend, fits):
    fits(N, V)
    g = torch.Generator().manual_seed(1)
    tensors, target = make()
    tensors[2] = torch.randn(V, generator=g) * 4  # few classes hold the mass
    leaves = [t.requires_grad_() for t in tensors]
    options = Options(backend=backend, gradient_tolerance=tolerance)
    out = linear_cross_entropy_with_stats(*leaves[:2], target, linear_bias=leaves[2], options=options)
    assert 0 <= out.residual.item() <= tolerance


def test_a_tail_of_full_rank_runs_exact_and_says_so():
    """Every row puts its mass on columns of its own: no K <= V/4 and no rank one serves them."""
    weight = torch.eye(V)
    hidden = torch.zeros(N, V)
    target = torch.arange(N) % V
    for i in range(N):
        hidden[i, torch.randperm(V, generator=torch.Generator().manual_seed(i))[:40]] = 6.0
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), torch.zeros(V, requires_grad=True)]
    exact = gradients(linear_cross_entropy, leaves, target, options=Options(backend="torch"))
    free = Options(backend="torch", gradient_columns=1 / 4)
    out = linear_cross_entropy_with_stats(*leaves[:2], target, linear_bias=leaves[2], options=free)
    assert out.residual.item() > 0.1
    tight = Options(backend="torch", gradient_tolerance=0.1)
    out = linear_cross_entropy_with_stats(*leaves[:2], target, linear_bias=leaves[2], options=tight)
    assert out.residual.item() == 0
    found = gradients(linear_cross_entropy, leaves, target, options=tight)
    for mine, true in zip(found[1], exact[1], strict=True):
        assert_close(mine, true, rtol=1e-5, atol=1e-7)


def test_all_columns_are_the_exact_gradient(backend, fits):
    fits(N, V)
    tensors, target = make()
    options = Options(backend=backend, gradient_columns=V)
    _, found = gradients(linear_perplexity, tensors, target, options=options)
    _, exact = gradients(linear_perplexity, tensors, target, options=Options(backend=backend))
    for mine, true in zip(found, exact, strict=True):
        assert_close(mine, true, rtol=1e-5, atol=1e-6 * true.abs().max().item())


@pytest.mark.parametrize("grads", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_frozen_parts_cost_nothing_and_change_nothing(grads, backend, fits):
    fits(N, V)
    tensors, target = make()
    options = Options(backend=backend, gradient_columns=30)
    _, everything = gradients(linear_cross_entropy, tensors, target, options=options)
    leaves = [t.clone().requires_grad_(bool(g)) for t, g in zip(tensors, grads, strict=True)]
    loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], options=options)
    if any(grads):
        loss.backward()
    for leaf, true in zip(leaves, everything, strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None:
            assert_close(leaf.grad, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    tensors, target = make(dtype)
    options = Options(backend="torch", gradient_columns=100)
    _, found = gradients(linear_cross_entropy, tensors, target, reduction="sum", options=options)
    truth, _ = dense(tensors, target, {}, ROWS, 100)
    for mine, true in zip(found, truth, strict=True):
        assert mine.dtype == dtype
        eps = 1e-6 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        assert (mine.double() - true).norm() <= eps * true.norm() + 1e-6


def test_second_backward_is_the_same_and_second_derivatives_raise():
    tensors, target = make()
    leaves = [t.requires_grad_() for t in tensors]
    loss = linear_perplexity(*leaves[:2], target, linear_bias=leaves[2], options=Options(gradient_columns=30))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        (loss + grad.pow(2).sum()).backward()


def test_compiles_into_one_graph_for_any_number_of_tokens():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    options = Options(gradient_columns=30)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(hidden, weight, bias, target):
        return linear_cross_entropy(hidden, weight, target, linear_bias=bias, options=options)

    (hidden, weight, bias), target = make(ignored=False)
    for n in (9, 21, 37):
        leaves = [hidden[:n].clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        compiled = torch.autograd.grad(step(*leaves, target[:n]), leaves)
        eager = torch.autograd.grad(
            linear_cross_entropy(*leaves[:2], target[:n], linear_bias=leaves[2], options=options), leaves
        )
        assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("screen", [None, "int8"])
def test_opcheck(screen, backend, fits):
    fits(N, V)
    (hidden, weight, bias), target = make(v=WHOLE[0], d=WHOLE[1]) if screen else make()
    inputs = HeadInputs(hidden, weight, bias, target, None, None, None)
    execution = HeadExecution(backend, None, torch.float32, (True, True, True))
    checked_op("linear_compact", inputs, LossSpec(stats=True), execution, Compact(None, 30.0, screen))


def test_nothing_counted_and_nothing_at_all():
    tensors, target = make()
    options = Options(gradient_columns=30)
    for rows, labels in ((slice(None), torch.full_like(target, -100)), (slice(0, 0), target[:0])):
        value, found = gradients(linear_cross_entropy, [tensors[0][rows], *tensors[1:]], labels[rows], options=options)
        assert value.isnan()
        assert all((g == 0).all() for g in found)


def test_where_another_plan_runs_it_is_exact():
    tensors, target = make()
    options = Options(gradient_columns=30)
    for keywords in ({"reduction": "none"}, {"softcap": 5.0, "label_smoothing": 0.1}):
        leaves = [t.requires_grad_() for t in tensors]
        out = linear_cross_entropy_with_stats(*leaves[:2], target, linear_bias=leaves[2], options=options, **keywords)
        exact = linear_cross_entropy_with_stats(*leaves[:2], target, linear_bias=leaves[2], **keywords)
        assert out.residual is None
        for mine, true in zip(*(torch.autograd.grad(o.loss.sum(), leaves) for o in (out, exact)), strict=True):
            assert torch.equal(mine, true)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"gradient_tolerance": 0.0}, ValueError, "gradient_tolerance must be in"),
        ({"gradient_tolerance": "low"}, TypeError, "gradient_tolerance must be a number"),
        ({"gradient_columns": -1}, ValueError, "gradient_columns must be a finite count"),
        ({"gradient_columns": 2.5}, ValueError, "whole number of columns"),
        ({"gradient_columns": 8, "gradient_tolerance": 1e-3}, ValueError, "Leave out one"),
        ({"screen": "int8"}, ValueError, "nothing asks for that plan"),
        ({"screen": "int4", "gradient_columns": 8}, ValueError, "screen must be one of"),
    ],
)
def test_bad_options_are_errors_in_words(keywords, error, words):
    with pytest.raises(error, match=words):
        Options(**keywords)


def test_where_nothing_may_wait_the_last_step_tells_the_next_what_to_keep(monkeypatch):
    """As on a GPU: exact until a number has arrived, then compact, and exact again when a step needs too much."""

    arrived = []
    monkeypatch.setattr(compact, "may_wait", lambda tensor: False)
    monkeypatch.setattr(compact, "to_host", lambda value: (value.clone(), lambda: bool(arrived)))
    (hidden, weight, _), target = make(ignored=False)
    peaked = torch.zeros(V)
    peaked[:20] = 12.0
    weight.requires_grad_()
    options = Options(backend="torch", gradient_tolerance=0.05)

    def residual(bias: Tensor) -> float:
        out = linear_cross_entropy_with_stats(hidden, weight, target, linear_bias=bias, options=options)
        return out.residual.item()

    assert residual(peaked) == residual(peaked) == 0
    arrived.append(True)
    steps = [residual(peaked) for _ in range(5)]
    assert steps[0] > 0  # compact; here it misses its tolerance, and the next keeps more
    assert steps[-1] <= 0.05
    flat = torch.zeros(V)
    residual(flat)  # too late for this step to run exact; the next does
    assert residual(flat) == 0


def test_what_is_known_of_a_head_dies_with_its_weight(monkeypatch):
    """Another head may be given its address."""
    monkeypatch.setattr(compact, "may_wait", lambda tensor: False)
    monkeypatch.setattr(compact, "to_host", lambda value: (value.clone(), lambda: True))
    (hidden, weight, _), target = make(ignored=False)
    before = len(compact._last_steps)
    options = Options(backend="torch", gradient_tolerance=0.05)
    for head in (weight.clone().requires_grad_() for _ in range(3)):
        for _ in range(2):
            linear_cross_entropy_with_stats(hidden, head, target, options=options)
        assert len(compact._last_steps) == before + 1
    del head
    gc.collect()
    assert len(compact._last_steps) == before


def test_no_event_is_asked_for_while_a_graph_captures(monkeypatch):
    asked, under_capture = [], []
    monkeypatch.setattr(compact, "may_wait", lambda tensor: False)
    monkeypatch.setattr(compact, "capturing", lambda: bool(under_capture))
    monkeypatch.setattr(compact, "to_host", lambda value: (value.clone(), lambda: not asked.append(1)))
    (hidden, weight, _), target = make(ignored=False)
    weight.requires_grad_()
    options = Options(backend="torch", gradient_tolerance=0.05)
    linear_cross_entropy_with_stats(hidden, weight, target, options=options)
    under_capture.append(True)
    linear_cross_entropy_with_stats(hidden, weight, target, options=options)
    assert not asked
    under_capture.clear()
    linear_cross_entropy_with_stats(hidden, weight, target, options=options)
    assert asked


def test_it_waits_for_no_device(fake_gpu, monkeypatch):

    monkeypatch.setattr(compact, "to_host", lambda value: (value, lambda: False))
    with fake_gpu():
        hidden, weight, bias = (torch.empty(s, device="cuda") for s in ((N, D), (V, D), (V,)))
        target = torch.empty(N, dtype=torch.int64, device="cuda")
        for keywords in ({"gradient_columns": 40}, {"gradient_tolerance": 1e-2}):
            inputs = HeadInputs(hidden, weight, bias, target, None, None, None)
            execution = HeadExecution("torch", None, torch.float32, (True,) * 3)
            asked = Compact(keywords.get("gradient_tolerance"), keywords.get("gradient_columns"), None)
            out = linear_compact.linear_compact.function(inputs, LossSpec(), execution, asked)
            assert out.unscaled.grad_hidden.shape == hidden.shape and out.residual.shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_is_for_the_products_alone(dtype):
    torch.manual_seed(0)
    h, w, y = torch.randn(40, 16), (torch.randn(2000, 16) * 0.3).requires_grad_(), torch.randint(2000, (40,))
    with torch.autocast(on_device.device.type, dtype):
        loss = linear_cross_entropy(h, w, y, options=Options(gradient_columns=0.25))
    loss.backward()
    truth = torch.nn.functional.cross_entropy(h @ w.t(), y)
    (want,) = torch.autograd.grad(truth, w)
    assert (w.grad - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("weight", [1e-22, 1e20])
def test_squares_that_are_no_float32_are_summed_all_the_same(weight, backend, fits):
    fits(N, V)
    if on_device.elsewhere() and backend == "torch":
        pytest.skip("on a GPU the torch backend would have to wait for the largest factor, and takes 1 for it")
    (hidden, head, _), target = make(ignored=False)
    said = [
        linear_cross_entropy_with_stats(
            hidden,
            head.requires_grad_(),
            target,
            token_weight=torch.full((N,), u),
            options=Options(backend=backend, gradient_columns=30),
        ).residual
        for u in (1.0, weight)
    ]
    assert said[0] > 1e-3
    assert_close(said[1], said[0], rtol=1e-4, atol=0)


def test_the_residual_of_nan_is_nan(backend, fits):
    fits(N, V)
    (hidden, head, _), target = make(ignored=False)
    hidden[3, 0] = torch.nan
    for how in ({"gradient_columns": 30}, {"gradient_tolerance": 0.1}):
        out = linear_cross_entropy_with_stats(
            hidden, head.requires_grad_(), target, options=Options(backend=backend, **how)
        )
        assert out.loss.isnan() and out.residual.isnan()


def test_the_slope_at_the_target_is_that_of_its_fp32_logit(backend):
    """The chunk holds the logit rounded to bf16. Under a softcap that would cost the gradient 1e-3 of itself."""
    x, y = make_logits((6, 40), torch.bfloat16), torch.tensor([0, 39, 7, 8, 8, 20])
    target_logit, spec = x.gather(1, y[:, None])[:, 0].float() * 1.0037, LossSpec(softcap=4.0, logit_scale=0.8)
    z = x.double().scatter(1, y[:, None], target_logit.double()[:, None]).requires_grad_()
    loss = torch.nn.functional.cross_entropy(4 * torch.tanh(0.8 * z / 4), y, reduction="sum")
    want = torch.autograd.grad(loss, z)[0].gather(1, y[:, None])
    module, out = backends.load_compact(backend), torch.empty(6, 40)
    how = {"target_logit": target_logit, "signed": False, "memory_budget": None}
    stats, _, factors = module.nll_columns(x, TokenInputs(y, None, None), spec, **how)
    kept = KeptColumns(torch.arange(40), y)
    module.nll_kept(x.float(), kept, spec, stats=stats, factors=factors, out=out, memory_budget=None)
    assert_close(out.gather(1, y[:, None]).double(), want, rtol=2e-6, atol=0)
