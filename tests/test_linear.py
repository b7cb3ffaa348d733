# SPDX-License-Identifier: Apache-2.0
"""The fused LM head: values and the gradients of hidden states, weight and bias, against float64 over full logits."""

from __future__ import annotations

import itertools

import on_device
import options as option_table
import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from op_cases import checked_op
from torch.testing import assert_close

import fused_ppl
from fused_ppl import Options, linear_cross_entropy, linear_cross_entropy_with_stats, linear_perplexity, plan
from fused_ppl.records import HeadExecution, HeadInputs, Normalizers, Shard, Upstream
from fused_ppl.spec import LossSpec
from fused_ppl.testing import assert_as_good_as_eager, make_target

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REFERENCE = Options(backend="reference")
# smaller than a block and a chunk; one row; ragged everything; V = 1
SHAPES = [(5, 3, 7), (1, 37, 1), (67, 211, 24), (9, 1, 5)]


@pytest.fixture(autouse=True)
def _over_the_backend_under_test(backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)


def make_head(n, v, d, dtype=torch.float32, seed=0, confident=False):
    """Hidden states, weight and bias. `confident` puts the target's logit 20 to 80 above the others, as in a trained
    model: the hidden state is a long multiple of the target's weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=generator) / d**0.5
    target = make_target((n,), v)
    hidden = torch.randn(n, d, generator=generator)
    if confident:
        own = weight[target]
        hidden = own / own.square().sum(1, keepdim=True) * torch.linspace(20, 80, n)[:, None] + 0.1 * hidden
    bias = torch.randn(v, generator=generator) * 0.5
    return [t.to(dtype) for t in (hidden, weight, bias)], target


def gradients(loss, tensors, target, upstream=1.0, **keywords):
    """The value, and the gradients of hidden states, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves[:2], target, linear_bias=leaves[2], **keywords)
    grad = torch.as_tensor(upstream, dtype=value.dtype).expand(value.shape)
    return value.detach(), torch.autograd.grad(value, leaves, grad)


def judge(loss, tensors, target, upstream=1.0, options=None, **keywords):
    """Value and gradients within the policy. What eager loses is judged in fp32 for values, and in the dtype of the
    head for gradients; the products of an LM head round, so nll's condition is that of the logits."""
    wide = [t.double() for t in tensors]
    value, grads = gradients(loss, tensors, target, upstream, options=options, **keywords)
    eager, eager_grads = gradients(loss, tensors, target, upstream, options=REFERENCE, **keywords)
    truth, true_grads = gradients(loss, wide, target, upstream, options=REFERENCE, **keywords)
    assert value.dtype == (torch.float64 if tensors[0].dtype == torch.float64 else torch.float32)
    assert_as_good_as_eager(value, eager, truth, f"{loss.__name__} {keywords}", condition=8.0)
    for name, grad, eager_grad, true_grad in zip(
        ("hidden", "weight", "bias"), grads, eager_grads, true_grads, strict=True
    ):
        assert grad.dtype == tensors[0].dtype
        assert_as_good_as_eager(grad, eager_grad, true_grad, f"gradient of {name} {keywords}", condition=8.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", [linear_cross_entropy, linear_perplexity])
def test_value_and_gradients(loss, shape, dtype, fits):
    fits(*shape[:2], dtype=dtype)
    tensors, target = make_head(*shape, dtype)
    judge(loss, tensors, target, -0.7 * 2**-6)


# one value of each option alone, and all of them together
EACH = {name: [name] for name in option_table.one_each(linear_cross_entropy)}
EACH["all"] = option_table.together(linear_cross_entropy)


@pytest.mark.parametrize("kind", ["rows", "vocab"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence"])
@pytest.mark.parametrize("name", EACH)
def test_each_option_with_each_reduction_and_plan(name, reduction, kind, monkeypatch):
    if any(reduction not in option_table.VALUE[each][0].reductions for each in EACH[name]):
        pytest.skip(f"{name} does not go with {reduction}")
    if kind == "vocab":
        monkeypatch.setattr(plan, "COLUMNS", 16)
        monkeypatch.setattr(plan, "linear_kind", lambda case, per_token: "vocab")
    (hidden, weight, bias), _ = make_head(12, 41, 8)
    target = make_target((3, 4), 41, ignored=0.3)
    upstream = {"none": torch.randn(3, 4), "sequence": torch.randn(3)}.get(reduction, -1.7)
    judge(
        linear_cross_entropy,
        [hidden.view(3, 4, 8), weight, bias],
        target,
        upstream,
        reduction=reduction,
        **option_table.keywords(EACH[name], 41, target),
    )


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_combination_of_gradients(needed, reduction):
    tensors, target = make_head(20, 37, 6)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    loss = linear_perplexity(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction).sum()
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward()
    truth = [t.double().requires_grad_() for t in tensors]
    F.cross_entropy(F.linear(*truth), target, reduction=reduction).exp().sum().backward()
    for leaf, true, need in zip(leaves, truth, needed, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_close(leaf.grad.double(), true.grad, rtol=1e-5, atol=1e-5 * true.grad.abs().max().item())


@pytest.mark.parametrize("frozen", ["weight", "everything"])
def test_what_needs_no_gradient_costs_no_buffer(frozen, peak_bytes, fits):
    n, v, d = 4, 20000, 64
    fits(n, v)
    (hidden, weight, _), target = make_head(n, v, d)
    hidden.requires_grad_(frozen == "weight")

    def step():
        loss = linear_perplexity(hidden, weight, target)
        if frozen == "weight":
            loss.backward()

    # logits of four rows, and no V x D
    assert peak_bytes(step) < 3 * n * v * 4 + v * d < v * d * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_does_not_grow_with_the_number_of_chunks(dtype, monkeypatch, fits):
    fits(512, 101)
    tensors, target = make_head(512, 101, 16, dtype)
    _, truth = gradients(linear_cross_entropy, [t.double() for t in tensors], target, options=REFERENCE)
    errors, losses = [], []
    for chunks in (1, 4, 32, 256):
        monkeypatch.setattr(plan, "MAX_ROWS", dict.fromkeys(("cpu", "gpu"), 512 // chunks))
        monkeypatch.setattr(plan, "MIN_ROWS", dict.fromkeys(("cpu", "gpu"), dict.fromkeys((2, 4, 8), 1)))
        value, grads = gradients(linear_cross_entropy, tensors, target)
        losses.append(value.item())
        errors.append([((g.double() - t).norm() / t.norm()).item() for g, t in zip(grads, truth, strict=True)])
    for error in errors[1:]:
        for mine, of_one_chunk in zip(error, errors[0], strict=True):
            assert mine < 1.25 * of_one_chunk + 4 * torch.finfo(torch.float32).eps
    assert max(losses) - min(losses) <= 1e-6 * losses[0]


def test_confident_rows_lose_no_digits():
    """bf16, the target 20 to 80 above the rest: the formula in bf16 is negative for many rows and wrong by its ulp."""
    (hidden, weight, bias), target = make_head(64, 300, 64, torch.bfloat16, confident=True)
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    truth = F.softplus(
        others - logits.gather(1, target[:, None])[:, 0], threshold=700
    )  # 0 in F.cross_entropy's float64
    mine = linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction="none")
    all_bf16 = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")
    assert mine.min() >= 0
    assert ((mine - truth).abs() <= (all_bf16 - truth).abs().max()).all()
    assert (mine - truth).abs().mean() < 0.5 * (all_bf16 - truth).abs().mean()
    # and relatively: nll down to 1e-30 keeps what the other logits' rounding leaves of it
    assert ((mine - truth).abs() <= 0.3 * truth + 1e-37).all()


def test_a_second_backward_is_bitwise_the_same():
    tensors, target = make_head(20, 37, 6)
    leaves = [t.requires_grad_() for t in tensors]
    for reduction in ("mean", "none"):
        loss = linear_perplexity(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction).sum()
        first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
        kept = [a.clone() for a in first]
        second = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
        assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True)), "the last backward wrote on the first"


@pytest.mark.parametrize("keep", [False, True], ids=["last", "kept"])
def test_the_last_backward_scales_the_gradients_in_their_own_memory(keep, peak_bytes, fits):
    n, v, d = 4, 20000, 64
    fits(n, v)
    (hidden, weight, _), target = make_head(n, v, d)
    loss = linear_perplexity(hidden.requires_grad_(), weight.requires_grad_(), target)
    peak = peak_bytes(lambda: loss.backward(retain_graph=keep))
    assert peak >= v * d * 4 if keep else peak < v * d
    assert weight.grad is not None and weight.grad.abs().max() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_may_hold_anything(reduction):
    (hidden, weight, bias), target = make_head(11, 37, 6)
    target[2], target[5:8] = -100, -100
    hidden[2], hidden[6] = float("nan"), float("inf")
    counted = target != -100
    value, (dhidden, dweight, dbias) = gradients(
        linear_cross_entropy, [hidden, weight, bias], target, reduction=reduction
    )
    assert dhidden[~counted].eq(0).all()
    kept, kept_grads = gradients(
        linear_cross_entropy, [hidden[counted], weight, bias], target[counted], reduction=reduction
    )
    assert_close(value[counted] if reduction == "none" else value, kept)
    for mine, alone in zip((dhidden[counted], dweight, dbias), kept_grads, strict=True):
        assert_close(mine, alone)


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence"])
def test_no_counted_token(n, reduction):
    tensors, _ = make_head(4, 37, 6)
    tensors[0] = tensors[0][:n]
    target = torch.full((n,), -100)
    value, grads = gradients(
        linear_perplexity if reduction != "sum" else linear_cross_entropy, tensors, target, reduction=reduction
    )
    expected = {"sum": torch.tensor(0.0), "none": torch.ones(n)}.get(reduction, torch.tensor(float("nan")))
    assert_close(value, expected, equal_nan=True)
    assert all(g.eq(0).all() for g in grads)


def test_statistics_are_those_of_the_logits():
    (hidden, weight, bias), target = make_head(12, 41, 8)
    target[3] = -100
    mine = linear_cross_entropy_with_stats(hidden, weight, target, linear_bias=bias, label_smoothing=0.1, z_loss=0.01)
    truth = fused_ppl.cross_entropy_with_stats(
        F.linear(hidden.double(), weight.double(), bias.double()),
        target,
        label_smoothing=0.1,
        z_loss=0.01,
        options=REFERENCE,
    )
    for name, a, b in zip(mine._fields[:7], mine[:7], truth[:7], strict=True):  # two are None: no plan but "compact"
        assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_loss_and_perplexity_are_differentiable_together():
    tensors, target = make_head(12, 41, 8)

    def both(hidden, weight, target, linear_bias, **keywords):
        out = linear_cross_entropy_with_stats(hidden, weight, target, linear_bias=linear_bias, z_loss=0.01, **keywords)
        return 2 * out.loss - 0.1 * out.perplexity

    both.__name__ = "both"
    judge(both, tensors, target)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [None, -100, 3])
def test_it_is_torch_linear_cross_entropy(bias, reduction, label_smoothing, ignore_index):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    tensors, target = make_head(12, 41, 8)
    keywords = {"weight": torch.linspace(0.2, 3, 41), "reduction": reduction, "label_smoothing": label_smoothing}
    leaves = [t.requires_grad_() for t in tensors]
    linear_bias = leaves[2] if bias else None
    used = leaves if bias else leaves[:2]
    theirs = F.linear_cross_entropy(*leaves[:2], target, linear_bias=linear_bias, ignore_index=ignore_index, **keywords)
    mine = linear_cross_entropy(*leaves[:2], target, linear_bias=linear_bias, ignore_index=ignore_index, **keywords)
    assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine.sum(), used), torch.autograd.grad(theirs.sum(), used), strict=True):
        assert_close(a, b)


def test_tied_weights_get_both_gradients():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 8)
    head = fused_ppl.LinearPerplexityLoss(8, 50)
    head.linear.weight = embedding.weight
    tokens = torch.randint(50, (2, 9))
    target = fused_ppl.next_token_targets(tokens)
    head(embedding(tokens), target).backward()
    truth = embedding.weight.detach().double().requires_grad_()
    F.cross_entropy(F.linear(F.embedding(tokens, truth), truth).flatten(0, 1), target.flatten()).exp().backward()
    assert_close(embedding.weight.grad.double(), truth.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(compute, reduction):
    tensors, target = make_head(12, 41, 8)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast(on_device.device.type, dtype=compute):
        loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction).sum()
    grads = torch.autograd.grad(loss, leaves)
    lower = [t.to(compute).double().requires_grad_() for t in tensors]
    truth = F.cross_entropy(F.linear(*lower), target, reduction=reduction).sum()
    assert loss.dtype == torch.float32
    assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    for grad, true in zip(grads, torch.autograd.grad(truth, lower), strict=True):
        assert grad.dtype == torch.float32
        assert ((grad - true).norm() / true.norm()) < 4 * torch.finfo(compute).eps


def test_second_derivatives_raise_in_every_form():
    tensors, target = make_head(6, 11, 4)
    leaves = [t.requires_grad_() for t in tensors]
    for reduction in ("mean", "none"):
        loss = linear_perplexity(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, leaves[1], create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            (loss + grad.pow(2).sum()).backward()

    def of_hidden(hidden):
        return linear_perplexity(hidden, tensors[1].detach(), target)

    hidden = tensors[0].detach()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda x: torch.func.grad(of_hidden)(x).pow(2).sum())(hidden)
    truth = hidden.double().requires_grad_()
    F.cross_entropy(truth @ tensors[1].detach().double().T, target).exp().backward()
    assert_close(torch.func.grad(of_hidden)(hidden).double(), truth.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph_for_any_number_of_tokens(reduction):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(hidden, weight, bias, target):
        return linear_perplexity(hidden, weight, target, linear_bias=bias, reduction=reduction).sum()

    for n in (5, 9, 14):
        tensors, target = make_head(n, 37, 6)
        leaves = [t.requires_grad_() for t in tensors]
        compiled = torch.autograd.grad(step(*leaves, target), leaves)
        truth = [t.detach().double().requires_grad_() for t in tensors]
        F.cross_entropy(F.linear(*truth), target, reduction=reduction).exp().sum().backward()
        for mine, true in zip(compiled, truth, strict=True):
            assert_close(mine.double(), true.grad, rtol=1e-5, atol=1e-5 * true.grad.abs().max().item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("grads", [(True, True, True), (True, False, False), (False, False, False)], ids=str)
def test_opcheck(grads, backend):
    (hidden, weight, bias), target = make_head(6, 11, 4)
    spec, execution = LossSpec(stats=True), HeadExecution(backend, None, torch.float32, grads)
    inputs, one = HeadInputs(hidden, weight, bias, target, None, None, None), torch.ones(())
    losses, unscaled, *_ = checked_op("linear_forward", inputs, spec, execution)
    factors = (losses.loss_factor, losses.perplexity_factor)
    checked_op("linear_scale", inputs, unscaled, Upstream(*factors, one, None), spec, grads=grads)
    known, shard = Normalizers(losses.lse, losses.nll), Shard(0, weight.shape[0])
    upstream = Upstream(*factors, None, one)
    checked_op("linear_vocab_backward", inputs, upstream, spec, execution, normalizers=known, shard=shard)
