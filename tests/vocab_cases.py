# SPDX-License-Identifier: Apache-2.0
"""What ranks run in test_distributed_vocab.py: shards of one vocabulary, against one process in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from distributed_cases import IGNORED, REFERENCE, D, V, assert_close_to, loss_named, mesh_of
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fused_ppl
from fused_ppl import Options

NAMES = ("cross_entropy", "perplexity", "cross_entropy_with_stats")
B, T = 3, 5
SIZES = {1: (37,), 2: (20, 17), 3: (1, 30, 6), 4: (9, 9, 9, 10)}


class Problem(NamedTuple):
    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    target: Tensor  # (B, T)

    @classmethod
    def make(cls, dtype: torch.dtype = torch.float64, v: int = V) -> Problem:
        generator = torch.Generator().manual_seed(11)
        hidden, weight, bias = (torch.randn(s, generator=generator) for s in ((B, T, D), (v, D), (v,)))
        target = torch.randint(v, (B, T), generator=generator)
        target[0, 0], target[0, 1], target[1, 1:3] = 0, v - 1, IGNORED
        weight[5] = weight[v - 2]  # a tie between shards: the lower index is predicted
        bias[5] = bias[v - 2] = 9.0
        hidden[2] = 0
        return cls(hidden.to(dtype), weight.to(dtype), bias.to(dtype), target)


def keywords_of(name: str, which: str, v: int = V) -> dict[str, Any]:
    if which == "plain":
        return {}
    generator = torch.Generator().manual_seed(7)
    keywords = {
        "weight": torch.rand(v, generator=generator) + 0.5,
        "token_weight": torch.rand((B, T), generator=generator) + 0.5,
        "label_smoothing": 0.1,
        "logit_scale": 0.7,
        "softcap": 5.0,
        **({"max_nll": 1.0} if name == "perplexity" else {"z_loss": 1e-2}),
    }
    return keywords if which == "all" else {which: keywords[which]}


def truth(problem: Problem, name: str, **keywords: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The result and the gradients of hidden states, weight, bias and logits."""
    leaves = [t.double().clone().requires_grad_() for t in problem[:3]]
    logits = torch.nn.functional.linear(*leaves)
    keywords = {k: w.double() if isinstance(w, Tensor) else w for k, w in keywords.items()}
    out = getattr(fused_ppl, name)(logits, problem.target, class_dim=-1, options=REFERENCE, **keywords)
    return out, torch.autograd.grad(scalar(out), (*leaves, logits))


def scalar(out: Any) -> Tensor:
    """Something to differentiate, in which every entry counts, and perplexity beside loss where there are both."""
    if not isinstance(out, Tensor):
        return scalar(out.loss) + 0.5 * scalar(out.perplexity)
    return (out * torch.linspace(1, 2, out.numel()).view(out.shape).to(out)).sum()


def shard_of(tensor: Tensor, sizes: Sequence[int], rank: int, dim: int = 0) -> Tensor:
    return tensor.split(list(sizes), dim)[rank].clone()


def assert_result(got: Any, want: Any, tolerance: float) -> None:
    if isinstance(want, Tensor):
        assert_close_to(got, want, "loss", tolerance)
        return
    for field in ("loss", "perplexity", "nll", "lse", "entropy", "total_weight"):
        assert_close_to(getattr(got, field), getattr(want, field), field, tolerance)
    assert torch.equal(got.predicted, want.predicted)


def head(
    group: dist.ProcessGroup,
    how: str,
    name: str,
    which: str,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
) -> None:
    """The fused head: shards of "sizes", "even" ones, a "dtensor", and that with "tokens" sharded or "replicated"."""
    rank, ranks = group.rank(), group.size()
    v = 36 if how == "even" else V
    problem, keywords = Problem.make(dtype, v), {**keywords_of(name, which, v), "reduction": reduction}
    want, (dhidden, dweight, dbias, _) = truth(problem, name, **keywords)
    hidden = problem.hidden.clone().requires_grad_()
    if how in ("sizes", "even"):
        sizes = SIZES[ranks] if how == "sizes" else [v // ranks] * ranks
        weight, bias = (shard_of(t, sizes, rank).requires_grad_() for t in problem[1:3])
        keywords["vocab_group"] = (group, sizes) if how == "sizes" else mesh_of(group)
        x: Tensor = hidden
    else:
        mesh = mesh_of(group, "tp")
        weight, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in problem[1:3])
        sizes = [t.shape[0] for t in problem.weight.chunk(ranks)]
        x = hidden
        if how != "dtensor":
            hidden = distribute_tensor(problem.hidden, mesh, [Shard(1) if how == "tokens" else Replicate()])
            x = hidden.requires_grad_()
    loss = loss_named(name, True)
    out = loss(x, weight, problem.target, linear_bias=bias, options=Options(backend), **keywords)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert_result(out, want, tolerance)
    scalar(out).backward()
    assert_close_to(hidden.grad, dhidden, "hidden states", tolerance)
    for tensor, whole in ((weight, dweight), (bias, dbias)):
        got = tensor.grad.to_local() if isinstance(tensor.grad, DTensor) else tensor.grad
        assert_close_to(got, shard_of(whole, sizes, rank), "weight or bias", tolerance)


def logits(
    group: dist.ProcessGroup,
    how: str,
    name: str,
    which: str,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
    inplace: bool = False,
) -> None:
    rank, sizes = group.rank(), SIZES[group.size()]
    problem, keywords = Problem.make(dtype), {**keywords_of(name, which), "reduction": reduction}
    want, (*_, dlogits) = truth(problem, name, **keywords)
    whole = torch.nn.functional.linear(*(t.double() for t in problem[:3])).to(dtype)
    if how == "dtensor":
        leaf: Tensor = distribute_tensor(whole, mesh_of(group, "tp"), [Shard(2)]).requires_grad_()
        sizes = tuple(t.shape[0] for t in problem.weight.chunk(group.size()))
    else:
        leaf = shard_of(whole, sizes, rank, 2).requires_grad_()
        keywords["vocab_group"] = (group, sizes)
    x, class_dim = (leaf * 1, -1) if inplace else (leaf.movedim(-1, 1), 1)
    options = Options(backend, inplace_backward=inplace)
    out = getattr(fused_ppl, name)(x, problem.target, class_dim=class_dim, options=options, **keywords)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert_result(out, want, tolerance)
    scalar(out).backward()
    got = leaf.grad
    if isinstance(got, DTensor):  # torch before 2.13 gathers what goes back through movedim
        got = got.redistribute(placements=[Shard(2)]).to_local()
    assert_close_to(got, shard_of(dlogits, sizes, rank, 2), "logits", tolerance)


def token_values(
    group: dist.ProcessGroup,
    how: str,
    keywords: dict[str, Any],
    names: Sequence[str] = ("log_prob", "entropy", "lse"),
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
) -> None:
    """Log-probabilities, entropies and lse of shards: from "logits", by the "head", and that with a "dtensor"."""
    rank, sizes, problem = group.rank(), SIZES[group.size()], Problem.make(dtype)
    generator = torch.Generator().manual_seed(2)
    upstream = {name: torch.randn(B, T, generator=generator, dtype=torch.float64) for name in names}

    def total(out: Any) -> Tensor:
        return sum(((getattr(out, name) * g.to(out.lse)).sum() for name, g in upstream.items()), out.lse.new_zeros(()))

    wide = [t.double().clone().requires_grad_() for t in problem[:3]]
    whole = torch.nn.functional.linear(*wide)
    want = fused_ppl.log_probs(whole, problem.target, class_dim=-1, options=REFERENCE, **keywords)
    dhidden, *dparameters, dlogits = torch.autograd.grad(total(want), (*wide, whole))
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    options = Options(backend)
    if how == "logits":
        leaf = shard_of(whole.detach().to(dtype), sizes, rank, 2).requires_grad_()
        x = leaf.movedim(-1, 1)
        got = fused_ppl.log_probs(x, problem.target, vocab_group=(group, sizes), options=options, **keywords)
        checked = [(leaf, shard_of(dlogits, sizes, rank, 2))]
    else:
        hidden, shards = problem.hidden.clone().requires_grad_(), problem[1:3]
        if how == "dtensor":
            mesh, sizes = mesh_of(group, "tp"), tuple(t.shape[0] for t in problem.weight.chunk(group.size()))
            leaves: list[Tensor] = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in shards]
        else:
            leaves = [shard_of(t, sizes, rank).requires_grad_() for t in shards]
            keywords = {**keywords, "vocab_group": (group, sizes)}
        weight, bias = leaves
        got = fused_ppl.linear_log_probs(hidden, weight, problem.target, linear_bias=bias, options=options, **keywords)
        checked = [
            (hidden, dhidden),
            *((t, shard_of(g, sizes, rank)) for t, g in zip(leaves, dparameters, strict=True)),
        ]
    for field, value, true in zip(want._fields, got, want, strict=True):
        assert_close_to(value, true.detach(), field, tolerance)
    total(got).backward()
    for leaf, true in checked:
        gradient = leaf.grad.to_local() if isinstance(leaf.grad, DTensor) else leaf.grad
        assert_close_to(gradient, true, f"gradient from {names}", tolerance)
