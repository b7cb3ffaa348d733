# SPDX-License-Identifier: Apache-2.0
"""What ranks run in test_distributed_stacks.py: FSDP2 in every layout, 2-D meshes, context parallel, torch.compile."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from distributed_cases import (
    IGNORED,
    D,
    Model,
    V,
    assert_close_to,
    assert_gradients,
    average,
    batch,
    loss_named,
    mesh_of,
    truth,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fused_ppl
from fused_ppl import LinearPerplexityLoss, linear_perplexity, next_token_targets


class WithLoss(nn.Module):
    """The head is a loss module: whatever unshards it for its forward unshards what the loss reads."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        plain = Model()
        self.embedding, self.body = plain.embedding, plain.body
        self.head = LinearPerplexityLoss(D, V, bias=True, group=group)
        self.head.linear = plain.head

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))), target)


def shard_whole(model: WithLoss, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=mesh)


def shard_layers(model: WithLoss, mesh: DeviceMesh) -> None:
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_head_apart(model: WithLoss, mesh: DeviceMesh) -> None:
    fully_shard(model.body, mesh=mesh)
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_head_apart_and_keep(model: WithLoss, mesh: DeviceMesh) -> None:
    fully_shard(model.body, mesh=mesh)
    fully_shard(model.head, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def shard_last_layers_together(model: WithLoss, mesh: DeviceMesh) -> None:
    fully_shard([model.body, model.head], mesh=mesh)
    fully_shard(model, mesh=mesh)


LAYOUTS = (shard_whole, shard_layers, shard_head_apart, shard_head_apart_and_keep, shard_last_layers_together)


def fsdp(group: dist.ProcessGroup, layout: Callable[..., None]) -> None:
    tokens, target = (parts[group.rank()] for parts in batch("unequal", group.size()))
    want, gradients = truth("unequal", group.size(), "perplexity")
    model = WithLoss(group)
    layout(model, mesh_of(group))
    loss = model(tokens, target)
    assert_close_to(loss, want, "loss")
    loss.backward()
    assert_gradients(model, {name.replace("head.", "head.linear."): g for name, g in gradients.items()})


def fsdp_outside_forward(group: dist.ProcessGroup, how: str) -> None:
    """A loss that the training loop computes, from hidden states that the model returns."""
    tokens, target = (parts[group.rank()] for parts in batch("unequal", group.size()))
    want, gradients = truth("unequal", group.size(), "perplexity")
    model = Model()
    mesh = mesh_of(group)
    if how == "method":
        model.loss = lambda t, y: linear_perplexity(  # type: ignore[assignment]
            model.hidden(t), model.head.weight, y, linear_bias=model.head.bias, group=group
        )
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")
        loss = model.loss(tokens, target)  # type: ignore[operator]
        loss.backward()
    else:
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "hidden")
        hidden = model.hidden(tokens)
        model.head.unshard()  # type: ignore[operator]
        loss = linear_perplexity(hidden, model.head.weight, target, linear_bias=model.head.bias, group=group)
        loss.backward()
    assert_close_to(loss, want, "loss")
    assert_gradients(model, gradients)


def fsdp_weight_read_outside(group: dist.ProcessGroup) -> None:
    """It looks like a shard of the vocabulary. Ranks with their own targets are told so, never another number."""
    model = Model(bias=False)
    fully_shard(model, mesh=mesh_of(group))
    hidden = torch.randn(4, D, generator=torch.Generator().manual_seed(group.rank()))
    target = torch.arange(4) + group.rank()
    with pytest.raises(ValueError, match=r"same targets; they are not\. If FSDP"):
        linear_perplexity(hidden, model.head.weight, target, group=group)


def two_dimensions(group: dist.ProcessGroup, name: str, fused: bool, wrapper: str, kind: str) -> None:
    """Two data ranks times two shards of the vocabulary."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))
    tokens, target = (parts[mesh.get_local_rank("dp")] for parts in batch(kind, 2))
    keywords: dict[str, Any] = {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 2, V)}
    want, gradients = truth(kind, 2, name, **keywords)
    model = Model()
    layout = ColwiseParallel() if fused else ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh["tp"], {"head": layout})
    if wrapper == "fsdp":
        fully_shard(model, mesh=mesh["dp"])
    loss = model(tokens, target, loss_named(name, fused), fused, group=mesh["dp"], **keywords)
    assert_close_to(loss, want, "loss")
    loss.backward()
    if wrapper == "none":
        for parameter in model.parameters():
            local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            dist.all_reduce(local, group=mesh["dp"].get_group())
            local /= 2
    assert_gradients(model, gradients)


def refused_placements(group: dist.ProcessGroup) -> None:
    mesh = mesh_of(group, "tp")
    h, y = torch.randn(4, D), torch.arange(4)
    sharded = distribute_tensor(torch.randn(8, D), mesh, [Shard(0)])
    for weight in (distribute_tensor(torch.randn(8, D), mesh, [Shard(1)]), distribute_tensor(torch.randn(8, D), mesh)):
        with pytest.raises(
            ValueError, match=r"must be sharded over the vocabulary, Shard\(0\).*inside forward.*unshard"
        ):
            linear_perplexity(h, weight, y)
    with pytest.raises(ValueError, match=r"input is a DTensor, which must be sharded over the vocabulary, Shard\(1\)"):
        fused_ppl.perplexity(distribute_tensor(torch.randn(4, 8), mesh, [Shard(0)]), y)
    with pytest.raises(ValueError, match="already names the ranks"):
        linear_perplexity(h, sharded, y, vocab_group=group)
    with pytest.raises(ValueError, match="must be a DTensor on the same mesh"):
        linear_perplexity(distribute_tensor(h, mesh, [Shard(0)]), torch.randn(8, D), y)
    with pytest.raises(ValueError, match="must hold at least one class; got sizes"):
        linear_perplexity(h, distribute_tensor(torch.randn(group.size() - 1, D), mesh, [Shard(0)]), y)
    with pytest.raises(ValueError, match=r"must hold \d classes, because the sizes"):
        linear_perplexity(h, torch.randn(8, D), y, vocab_group=(group, [5] * group.size()))
    with pytest.raises(ValueError, match="one number for each class"):
        linear_perplexity(h, torch.randn(8, D), y, vocab_group=group, weight=torch.ones(8))


def context_parallel(group: dist.ProcessGroup, packed: bool) -> None:
    """Targets are shifted before tokens are sharded along the sequence: no token is lost between two ranks."""
    length = 12 * group.size() + 5
    tokens = torch.randint(V, (1, length), generator=torch.Generator().manual_seed(2))
    cu_seqlens = torch.tensor([0, 7, 8, 15, length]) if packed else None
    target = next_token_targets(tokens, cu_seqlens=cu_seqlens)
    assert int((target == IGNORED).sum()) == (4 if packed else 1)
    reference = Model(torch.float64)
    documents = [(0, length)] if cu_seqlens is None else list(itertools.pairwise(cu_seqlens))
    # each document by itself, and no shift but by slicing
    parts = [(reference.hidden(tokens[0, a : b - 1]), tokens[0, a + 1 : b]) for a, b in documents]
    logits, labels = reference.head(torch.cat([h for h, _ in parts])), torch.cat([y for _, y in parts])
    want = nn.functional.cross_entropy(logits, labels).exp()
    want.backward()
    model = Model()
    mine = [t.tensor_split(group.size(), dim=1)[group.rank()] for t in (tokens, target)]
    loss = model(*mine, linear_perplexity, True, group=group)
    assert_close_to(loss, want.detach(), "loss")
    loss.backward()
    average(list(model.parameters()), group)
    assert_gradients(model, {n: p.grad for n, p in reference.named_parameters()})


def compiled(group: dist.ProcessGroup, how: str) -> None:
    """One graph, collectives included; the numbers of eager."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(1)
    mesh = mesh_of(group, "tp")
    whole = torch.randn(8 * group.size(), D, generator=generator)
    keywords: dict[str, Any] = {}
    if how == "dtensor":
        w = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    else:
        w = whole.chunk(group.size())[group.rank()].clone().requires_grad_()
        keywords["vocab_group"] = group

    def loss(h: Tensor, w: Tensor, y: Tensor, number: Tensor) -> Tensor:
        if how == "logits":
            return fused_ppl.cross_entropy(h @ w.T, y, z_loss=number, **keywords)
        return linear_perplexity(h, w, y, softcap=1 + number, **keywords)

    compiled_loss = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (6, 9, 17):
        h = torch.randn(n, D, generator=generator).requires_grad_()
        y = torch.randint(8 * group.size(), (n,), generator=generator)
        results = []
        for function in (compiled_loss, loss):
            value = function(h, w, y, torch.tensor((n - 6) / 10))
            results.append((value.detach(), *torch.autograd.grad(value, (h, w))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def copied(group: dist.ProcessGroup) -> None:
    """A copy of a model, as an average of its weights keeps, trains in the same group."""
    x, y = torch.randn(3, D, generator=torch.Generator().manual_seed(group.rank())), torch.arange(3)
    for keywords in ({"group": group}, {"group": mesh_of(group)}, {"vocab_group": (group, [V] * group.size())}):
        module = LinearPerplexityLoss(D, V, **keywords)
        module.linear.weight.data.fill_(0.1)
        twin = copy.deepcopy(nn.Sequential(module))[0]
        assert twin.linear.weight is not module.linear.weight
        with torch.no_grad():
            x = x if "group" in keywords else torch.ones(3, D)
            torch.testing.assert_close(twin(x, y), module(x, y), rtol=0, atol=0)


def accumulated_over_shards(group: dist.ProcessGroup) -> None:
    """Micro-batches, two data ranks and two shards of the vocabulary at once: every rank scales its own shard."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))
    tokens, target = (parts[mesh.get_local_rank("dp")] for parts in batch("unequal", 2))
    want, gradients = truth("unequal", 2, "perplexity")
    model = Model()
    parallelize_module(model, mesh["tp"], {"head": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    acc = fused_ppl.PerplexityAccumulator(model.parameters(), group=mesh["dp"])
    for part in zip(tokens.tensor_split(3), target.tensor_split(3), strict=True):
        acc.add(model(*part, fused_ppl.linear_cross_entropy_with_stats, True, reduction="sum")).backward()
    assert_close_to(acc.finish(), want, "perplexity")
    assert_gradients(model, gradients)
