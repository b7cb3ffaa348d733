# SPDX-License-Identifier: Apache-2.0
"""linear_token_loss against the same function of the reference's log-probabilities, over full logits."""

from __future__ import annotations

from typing import Any

import distributed_cases as cases
import pytest
import token_rank_cases
import torch
from pool import Pool
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import Options, linear_cross_entropy, linear_log_probs, linear_token_loss
from fused_ppl.engines.head import HeadLoop
from fused_ppl.testing import assert_as_good_as_eager

N, V, D = 13, 37, 6
REFERENCE = Options(backend="reference")


def ppo(log_prob: Tensor, entropy: Tensor, advantage: Tensor, old: Tensor) -> Tensor:
    ratio = (log_prob - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - 0.3 * entropy


def batch(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """Hidden states, weight and bias; targets of which some are ignored; constants of each token."""
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((N, D), (V, D), (V,))]
    target = torch.randint(V, (N,))
    target[4] = target[-1] = -100
    return tensors, target, (torch.randn(N), -4 * torch.rand(N))


def run(tensors: list[Tensor], target: Tensor, *constants: Tensor, fn: Any = ppo, **keywords: Any) -> list[Tensor]:
    """The loss, and the gradients for an upstream gradient that is not 1."""
    hidden, weight, bias = tensors
    loss = linear_token_loss(hidden, weight, target, fn, *constants, linear_bias=bias, **keywords)
    leaves = [t for t in tensors if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(-1.7 * loss, leaves)]


def judge(got: list[Tensor], tensors: list[Tensor], target: Tensor, *constants: Tensor, **keywords: Any) -> None:
    """By the policy of fused_ppl.testing: no worse than eager PyTorch over full logits."""
    keywords["options"] = REFERENCE

    def in_dtype(dtype: torch.dtype | None) -> list[Tensor]:
        cast = [t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors]
        given = [c.double() if dtype == torch.float64 and c.is_floating_point() else c for c in constants]
        return run(cast, target, *given, **keywords)

    truth, eager = in_dtype(torch.float64), in_dtype(None)
    for mine, other, exact in zip(got, eager, truth, strict=True):
        assert_as_good_as_eager(mine, other.to(mine.dtype), exact.double(), condition=12.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradients(dtype, reduction, options):
    tensors, target, constants = batch(dtype)
    got = run(tensors, target, *constants, reduction=reduction, options=options)
    assert got[0].dtype == torch.float32 and [g.dtype for g in got[1:]] == [dtype] * 3
    judge(got, tensors, target, *constants, reduction=reduction)


@pytest.mark.parametrize("keywords", [{"softcap": 3.0}, {"logit_scale": 0.6}, {"num_items": 5}], ids=str)
def test_keywords(keywords, options):
    tensors, target, constants = batch()
    judge(run(tensors, target, *constants, options=options, **keywords), tensors, target, *constants, **keywords)


def test_it_is_the_function_of_log_probs(options):
    tensors, target, constants = batch()
    hidden, weight, bias = tensors
    values = linear_log_probs(hidden, weight, target, linear_bias=bias, options=options)
    want = ppo(values.log_prob, values.entropy, *constants)[target != -100].mean()
    gradients = torch.autograd.grad(-1.7 * want, tensors)
    for mine, other in zip(run(tensors, target, *constants, options=options), (want, *gradients), strict=True):
        assert_close(mine, other, rtol=2e-6, atol=2e-6)


def test_minus_the_log_probability_is_the_cross_entropy(options):
    """Bit for bit in PyTorch. On Triton the entropy is summed as well, by another kernel."""
    (hidden, weight, bias), target, _ = batch()
    want = linear_cross_entropy(hidden, weight, target, linear_bias=bias, options=options)
    got = linear_token_loss(
        hidden, weight, target, lambda log_prob, entropy: -log_prob, linear_bias=bias, options=options
    )
    leaves, same = (hidden, weight, bias), options.backend == "torch"
    assert_close(got, want, rtol=0 if same else 5e-7, atol=0)
    for mine, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert_close(mine, other, rtol=0 if same else 1e-6, atol=0 if same else 1e-7)


@pytest.mark.parametrize("gap", [5, 30, 60, 85, 110, 300])
def test_a_confident_token_has_a_small_gradient_and_never_nan(gap, options):
    """The gradient of the bias of one token is that of its logits; the loss adds up log_prob and entropy.

    Above 87 nats a probability is no normal float32, and may be 0.
    """
    tensors = [torch.ones(1, D), torch.randn(V, D) / 10, torch.zeros(V)]
    tensors[2][0] = gap
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        how = options if dtype == torch.float32 else REFERENCE
        got = run(leaves, torch.tensor([0]), fn=lambda log_prob, entropy: log_prob + 0.3 * entropy, options=how)[3]
        if dtype == torch.float32:
            mine = got.double()
    got[0] = -got[1:].sum()  # which float64 rounds to 0 from 37 nats on
    smallest = torch.finfo(torch.float32).tiny * 400  # times 0.3 * 87 nats and the upstream gradient
    assert ((mine - got).abs() <= 4e-6 * got.abs().amax() + smallest).all()


def test_every_chunk_gets_its_own_constants(options, monkeypatch):
    tensors, target, constants = batch()
    want = run(tensors, target, *constants, options=options)
    sizes = []
    chunks = HeadLoop.chunks

    def counted(loop: HeadLoop, *args: Any) -> Any:
        loop.plan = loop.plan.__class__(**{**vars(loop.plan), "rows": 3})
        for chunk in chunks(loop, *args):
            sizes.append(chunk.hidden.shape[0])
            yield chunk

    monkeypatch.setattr(HeadLoop, "chunks", counted)
    got = run(tensors, target, *constants, options=options)
    assert len(sizes) > 2
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other, rtol=2e-6, atol=2e-6)


def test_ignored_tokens_count_for_nothing(options):
    tensors, target, constants = batch()
    want = run(tensors, target, *constants, options=options)
    with torch.no_grad():
        tensors[0][target == -100] = torch.nan
    got = run(tensors, target, *constants, options=options)
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine, other)
    assert not got[1][target == -100].any()


def test_no_token_is_counted(options):
    tensors, target, constants = batch()
    loss, *gradients = run(tensors, torch.full_like(target, -100), *constants, options=options)
    assert loss.isnan() and not any(g.any() for g in gradients)


def test_shapes_and_constants_of_any_dtype(options):
    tensors, target, _ = batch()
    mask, number = torch.arange(N) % 3 == 0, torch.arange(N)

    def fn(log_prob: Tensor, entropy: Tensor, mask: Tensor, number: Tensor) -> Tensor:
        assert mask.dtype == torch.bool and number.dtype == torch.int64
        return torch.where(mask, -log_prob * number, entropy)

    flat = run(tensors, target, mask, number, fn=fn, options=options)
    shaped = [tensors[0].view(1, N, D), *tensors[1:]]
    hidden, weight, bias = shaped
    loss = linear_token_loss(
        hidden,
        weight,
        target.view(1, N),
        fn,
        *(c.view(1, N) for c in (mask, number)),
        linear_bias=bias,
        options=options,
    )
    assert torch.equal(loss, flat[0])


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_frozen_tensors(frozen, options):
    tensors, target, constants = batch()
    want = run(tensors, target, *constants, options=options)
    for k in frozen:
        tensors[k].requires_grad_(False)
    hidden, weight, bias = tensors
    loss = linear_token_loss(hidden, weight, target, ppo, *constants, linear_bias=bias, options=options)
    assert_close(loss.detach(), want[0], rtol=1e-6, atol=1e-6)
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        left = [k for k in range(3) if k not in frozen]
        for k, mine in zip(left, torch.autograd.grad(-1.7 * loss, [tensors[k] for k in left]), strict=True):
            assert_close(mine, want[1 + k], rtol=2e-6, atol=2e-6)


def test_a_function_that_depends_on_nothing_has_zero_gradients(options):
    tensors, target, _ = batch()
    loss, *gradients = run(
        tensors, target, fn=lambda log_prob, entropy: torch.ones_like(entropy.detach()), options=options
    )
    assert loss == 1 and not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    ("fn", "got"),
    [
        (lambda p, h: p.sum(), r"got \(\)"),
        (lambda p, h: 1.0, "got float"),
        (lambda p, h: p[:, None], r"got \(\d+, 1\)"),
    ],
)
def test_a_function_must_return_one_loss_for_each_token(fn, got, options):
    tensors, target, _ = batch()
    with pytest.raises(ValueError, match=f"one loss for each token.*{got}"):
        run(tensors, target, fn=fn, options=options)


def test_a_learned_parameter_inside_of_the_function_is_refused(options):
    """It would get no gradient, without a word."""
    tensors, target, _ = batch()
    temperature = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"uses a tensor of shape \(\) that requires grad"):
        run(tensors, target, fn=lambda log_prob, entropy: log_prob * temperature.exp(), options=options)
    run(tensors, target, fn=lambda log_prob, entropy: log_prob * temperature.exp().detach(), options=options)


def test_wrong_arguments():
    (hidden, weight, _), target, (advantage, old) = batch()
    with pytest.raises(ValueError, match=r"per_token\[1\] must have shape \(13,\)"):
        linear_token_loss(hidden, weight, target, ppo, advantage, old[:-1])
    with pytest.raises(ValueError, match=r"per_token\[0\] is a constant"):
        linear_token_loss(hidden, weight, target, ppo, advantage.requires_grad_(), old)
    with pytest.raises(ValueError, match="reduction"):
        linear_token_loss(hidden, weight, target, ppo, advantage, old, reduction="none")
    with pytest.raises(ValueError, match="gradient_tolerance"):
        linear_token_loss(hidden, weight, target, ppo, advantage, old, options=Options(gradient_tolerance=1e-3))


def test_gradcheck_and_a_second_backward():
    tensors, target, constants = batch(torch.float64)
    constants = tuple(c.double() for c in constants)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_token_loss(hidden, weight, target, ppo, *constants, linear_bias=bias, softcap=5.0)

    assert torch.autograd.gradcheck(loss, tensors)
    value = loss(*tensors)
    first = torch.autograd.grad(value, tensors, retain_graph=True)
    for mine, other in zip(torch.autograd.grad(value, tensors), first, strict=True):
        assert torch.equal(mine, other)
    (gradient,) = torch.autograd.grad(loss(*tensors), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_torch_compile_leaves_it_alone():
    (hidden, weight, bias), target, constants = batch()

    def step(hidden: Tensor) -> Tensor:
        return 2 * linear_token_loss(hidden, weight, target, ppo, *constants, linear_bias=bias)

    want = step(hidden)
    torch._dynamo.reset()
    got = torch.compile(step, backend="aot_eager")(hidden)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in (got, want)))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="differentiates fn in its forward"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(hidden)


def test_autocast_and_no_grad():
    tensors, target, constants = batch()
    hidden, weight, bias = tensors
    with torch.no_grad():
        plain = linear_token_loss(hidden, weight, target, ppo, *constants, linear_bias=bias)
    assert not plain.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_token_loss(hidden, weight, target, ppo, *constants, linear_bias=bias)
    assert loss.dtype == torch.float32
    assert_close(loss.detach(), plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", cases.BATCHES)
def test_ranks_have_the_loss_and_the_gradient_of_one_process(pool: Pool, kind: str) -> None:
    for reduction in ({}, {"num_items": 40}):
        pool.run(2, token_rank_cases.rank_of_a_batch, kind, reduction)


def test_a_group_is_for_the_mean_only(pool: Pool) -> None:
    with pytest.raises(AssertionError, match="reduction"):
        pool.run(2, token_rank_cases.rank_of_a_batch, "unequal", {"reduction": "sum"})
