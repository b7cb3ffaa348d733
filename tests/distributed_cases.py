# SPDX-License-Identifier: Apache-2.0
"""What ranks run in the tests of test_distributed*.py: a small model on unequal parts of one batch, and its truth."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_ppl
from fused_ppl import Options, groups

V, D, IGNORED = 37, 16, -100
REFERENCE = Options(backend="reference")
# tokens of each rank, by the number of ranks: unequal
COUNTS = {1: (23,), 2: (5, 18), 3: (9, 3, 11), 4: (5, 9, 2, 7)}
# how the ranks' tokens are: some ignored; those of the first rank all ignored; those of the last rank not there
BATCHES = ("unequal", "all ignored", "empty")
OPTIONS = {
    "plain": {},
    "options": {"label_smoothing": 0.1, "softcap": 4.0, "logit_scale": 0.8, "weight": torch.linspace(0.5, 2, V)},
}


class Model(nn.Module):
    """Embedding, one layer, and a head whose loss is computed inside of forward."""

    def __init__(self, dtype: torch.dtype = torch.float32, v: int = V, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(v, D, dtype=dtype)
        self.body = nn.Linear(D, D, dtype=dtype)
        self.head = nn.Linear(D, v, bias=bias, dtype=dtype)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.7

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(tokens)))

    def forward(self, tokens: Tensor, target: Tensor, loss: Callable[..., Any], fused: bool, **keywords: Any) -> Any:
        hidden = self.hidden(tokens)
        if fused:
            return loss(hidden, self.head.weight, target, linear_bias=self.head.bias, **keywords)
        return loss(self.head(hidden), target, **keywords)


def batch(kind: str, ranks: int, v: int = V) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and targets of each rank."""
    generator = torch.Generator().manual_seed(5)
    counts = list(COUNTS[ranks])
    if kind == "empty" and ranks > 1:
        counts[-1] = 0
    tokens, target = (torch.randint(v, (sum(counts),), generator=generator) for _ in range(2))
    target[::4] = IGNORED
    if kind == "all ignored" and ranks > 1:
        target[: counts[0]] = IGNORED
    return list(tokens.split(counts)), list(target.split(counts))


def weight_of_other_classes(kind: str, ranks: int) -> Tensor:
    """(V,): 1 of the classes that are no target of the batch, 0 of the others."""
    targets = torch.cat(batch(kind, ranks)[1])
    return torch.ones(V).index_fill(0, targets[targets != IGNORED], 0)


def loss_named(name: str, fused: bool) -> Callable[..., Any]:
    return getattr(fused_ppl, f"linear_{name}" if fused else name)  # type: ignore[no-any-return]


def truth(kind: str, ranks: int, name: str, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the whole batch in one process, in float64 by plain autograd."""
    model = Model(torch.float64)
    tokens, target = (torch.cat(parts) for parts in batch(kind, ranks))
    keywords = {k: w.double() if isinstance(w, Tensor) and w.is_floating_point() else w for k, w in keywords.items()}
    loss = model(tokens, target, loss_named(name, False), False, options=REFERENCE, **keywords)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_close_to(got: Tensor, want: Tensor, name: str, tolerance: float = 1e-6) -> None:
    """By the norm of the difference."""
    got = got.full_tensor() if hasattr(got, "full_tensor") else got
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} for {tuple(want.shape)}"
    error = (got.detach().double() - want).norm()
    assert error <= tolerance * want.norm(), f"{name}: relative error {(error / want.norm()).item():.2e}"


def assert_gradients(model: nn.Module, want: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        assert parameter.grad is not None, name
        assert_close_to(parameter.grad, want[name], name, tolerance)


def wrap(model: nn.Module, how: str, group: dist.ProcessGroup) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model, process_group=group)
    if how == "fsdp":
        return fully_shard(model, mesh=mesh_of(group))
    return model


def mesh_of(group: dist.ProcessGroup, name: str = "dp") -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(name,))


def average(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    for parameter in parameters:
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= group.size()


def data_parallel(
    group: dist.ProcessGroup, how: str, kind: str, name: str, fused: bool, keywords: dict[str, Any]
) -> None:
    """One step: loss and gradients are those of the whole batch, on every rank."""
    tokens, target = (parts[group.rank()] for parts in batch(kind, group.size()))
    want, gradients = truth(kind, group.size(), name, **{k: v for k, v in keywords.items() if k != "options"})
    model = wrap(Model(), how, group)
    loss = model(tokens, target, loss_named(name, fused), fused, group=group, **keywords)
    assert_close_to(loss, want, "loss")
    loss.backward()
    if how == "none":
        average(list(model.parameters()), group)
    assert_gradients(model, gradients)


def with_stats(group: dist.ProcessGroup, kind: str, fused: bool) -> None:
    """M and both losses are those of the batch, differentiable together; what is said of tokens is of this rank's."""
    all_tokens, all_targets = batch(kind, group.size())
    tokens, target = all_tokens[group.rank()], all_targets[group.rank()]
    keywords: dict[str, Any] = {"max_nll": 2.0, "z_loss": 0.01, "label_smoothing": 0.1}
    reference, model = Model(torch.float64), Model()
    loss = fused_ppl.cross_entropy_with_stats
    want = reference(torch.cat(all_tokens), torch.cat(all_targets), loss, False, options=REFERENCE, **keywords)
    (want.loss + want.perplexity).backward()
    out = model(tokens, target, loss_named("cross_entropy_with_stats", fused), fused, group=group, **keywords)
    for field in ("loss", "perplexity", "total_weight"):
        assert_close_to(getattr(out, field), getattr(want, field), field)
    first = sum(len(t) for t in all_tokens[: group.rank()])
    for field in ("nll", "lse", "entropy"):
        assert_close_to(getattr(out, field), getattr(want, field)[first : first + len(tokens)], field)
    assert torch.equal(out.predicted, want.predicted[first : first + len(tokens)])
    (out.loss + out.perplexity).backward()
    average(list(model.parameters()), group)
    assert_gradients(model, {n: p.grad for n, p in reference.named_parameters()})


def micro_batches(tokens: Tensor, target: Tensor, cuts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    bounds = [0, *sorted(min(c, tokens.numel()) for c in cuts), tokens.numel()]
    return [(tokens[a:b], target[a:b]) for a, b in itertools.pairwise(bounds)]


def accumulated(group: dist.ProcessGroup, how: str, kind: str, fused: bool, dtype: torch.dtype, items: float) -> None:
    """A window of three micro-batches a rank, gradients reduced with the last one."""
    tokens, target = (parts[group.rank()] for parts in batch(kind, group.size()))
    want, gradients = truth(kind, group.size(), "perplexity")
    model = wrap(Model(dtype), how, group)
    acc = fused_ppl.PerplexityAccumulator(model.parameters(), group=group, expected_items=items)
    window = micro_batches(tokens, target, (2, 5))
    for i, part in enumerate(window):
        last = i == len(window) - 1
        if how == "fsdp":
            model.set_requires_gradient_sync(last)
        with model.no_sync() if how == "ddp" and not last else contextlib.nullcontext():
            loss = loss_named("cross_entropy_with_stats", fused)
            acc.add(model(*part, loss, fused, reduction="sum")).backward()
    if how == "none":
        average(list(model.parameters()), group)
    ppl = acc.finish()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert_close_to(ppl, want, "perplexity", tolerance)
    assert_gradients(model, gradients, tolerance)
    # the next window begins at nothing: no token on any rank
    assert acc.finish().isnan()
    for parameter in model.parameters():
        local = parameter.grad.to_local() if how == "fsdp" else parameter.grad
        assert not local.any()


def metric(group: dist.ProcessGroup) -> None:
    """Ranks that have seen unequal parts of the data, one of them nothing, hold the perplexity of all."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(n, 11, generator=generator) for n in range(group.size())]
    targets = [torch.randint(11, (n,), generator=generator) for n in range(group.size())]
    mine = fused_ppl.Perplexity()
    for other in (group, mesh_of(group)):
        mine.reset()
        if group.rank():
            mine.update(parts[group.rank()], targets[group.rank()])
        whole = fused_ppl.Perplexity()
        whole.update(torch.cat(parts), torch.cat(targets))
        torch.testing.assert_close(mine.sync(other).compute(), whole.compute(), rtol=1e-7, atol=0, equal_nan=True)
        torch.testing.assert_close(mine.bits_per_token, whole.bits_per_token, rtol=1e-7, atol=0, equal_nan=True)


def warned(group: dist.ProcessGroup) -> tuple[list[str], list[str]]:
    """(the warnings, the files they are attributed to) of calls of which one should warn, and once."""
    groups._warned = False
    x, y = torch.zeros(2, 5, requires_grad=True), torch.tensor([1, 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused_ppl.perplexity(x.detach(), y)
        fused_ppl.cross_entropy(x, y)
        fused_ppl.perplexity(x, y, reduction="none")
        fused_ppl.perplexity(x, y, group=group)
        with torch.no_grad():
            fused_ppl.perplexity(x, y)
        torch.compile(lambda x: fused_ppl.perplexity(x, y), backend="aot_eager", fullgraph=True)(x)
        assert not caught
        fused_ppl.PerplexityLoss()(x, y)
        fused_ppl.perplexity(x, y)
        fused_ppl.linear_perplexity(x, torch.zeros(7, 5), y)
    return [str(w.message) for w in caught], [w.filename for w in caught]


def refused(group: dist.ProcessGroup) -> None:
    """Groups that cannot be meant, in a sentence."""
    x, y = torch.zeros(4, 5), torch.tensor([1, 2, 3, 4])
    for reduction in ("sum", "none", "sequence"):
        with pytest.raises(ValueError, match=r"needs reduction='mean'.*; got reduction='\w+'\. Leave group out"):
            fused_ppl.cross_entropy(x, y, reduction=reduction, group=group)
    with pytest.raises(NotImplementedError, match="Leave one of them out"):
        fused_ppl.perplexity(x, y, group=group, options=REFERENCE)
    with pytest.raises(TypeError, match=r"must be a ProcessGroup, or a DeviceMesh of one dimension; got str"):
        fused_ppl.perplexity(x, y, group="dp")  # type: ignore[arg-type]
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"one dimension of a DeviceMesh; got a mesh of 2 .* Pass mesh\['dp'\]"):
        fused_ppl.perplexity(x, y, group=mesh)
    one = dist.new_group([0])
    if group.rank():
        with pytest.raises(ValueError, match="that this rank is a member of; it is not"):
            fused_ppl.perplexity(x, y, group=one)


def compiled(group: dist.ProcessGroup, fused: bool) -> None:
    """One graph, collective included, for several numbers of tokens and of an option; the numbers of eager."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(1))

    def loss(h: Tensor, w: Tensor, y: Tensor, number: Tensor) -> Tensor:
        if fused:
            return fused_ppl.linear_cross_entropy(h, w, y, group=group, z_loss=number)
        return fused_ppl.perplexity(h @ w.T, y, group=group, logit_scale=1 + number)

    def step(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        value = function(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs[:2])

    compiled_loss = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (6, 9, 17):
        h = torch.randn(n + group.rank(), D, generator=torch.Generator().manual_seed(n))
        y = torch.randint(V, h.shape[:1], generator=torch.Generator().manual_seed(n))
        inputs = (h.requires_grad_(), head.detach().requires_grad_(), y, torch.tensor((n - 6) / 10))
        for a, b in zip(step(compiled_loss, *inputs), step(loss, *inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


fragile: list[dist.ProcessGroup] = []


def make_fragile(group: dist.ProcessGroup, size: int, seconds: float) -> None:
    """In all processes: a new group of the first of them that may break, with a timeout of its own."""
    fragile[:] = [dist.new_group(list(range(size)), timeout=datetime.timedelta(seconds=seconds))]


def mismatched(_: dist.ProcessGroup, what: str, vocab: bool) -> tuple[str, str, float]:
    """What the last rank does otherwise; (type, message, seconds) of the error that follows."""
    (group,) = fragile
    odd = group.rank() == group.size() - 1
    x, y = torch.zeros(4, 10), torch.tensor([1, 2, 3, 4])
    keywords: dict[str, Any] = {"vocab_group" if vocab else "group": group}
    if odd and what == "V":
        x = torch.zeros(4, 12)
    if odd and what == "dtype":
        x = x.double()
    if odd and what == "options":
        keywords["label_smoothing"] = 0.1
    if odd and what == "class weights":
        keywords["weight"] = torch.ones(10 * (group.size() if vocab else 1))
    if odd and what == "targets":
        y = y.flip(0)
    if odd and what == "tokens":
        x, y = x[:3], y[:3]
    if odd and what == "call":
        return "", "", 0.0
    begin = time.monotonic()
    try:
        fused_ppl.cross_entropy(x, y, **keywords)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "no error", time.monotonic() - begin


def agree_in_debug(group: dist.ProcessGroup) -> None:
    """Calls that do not differ pass the check, several of them, whatever the parts of the batch."""
    for n in range(4):
        x, y = torch.zeros(n + group.rank(), 10), torch.zeros(n + group.rank(), dtype=torch.long)
        fused_ppl.perplexity(x, y, group=group)
        fused_ppl.cross_entropy(x[:1], y[:1], vocab_group=group) if n else None


def any_split(group: dist.ProcessGroup, bounds: Sequence[int], windows: Sequence[Sequence[int]], fused: bool) -> None:
    """24 tokens: this rank's part by `bounds`, its micro-batches by its window's cuts; unequal numbers of them too."""
    generator = torch.Generator().manual_seed(9)
    tokens, target = (torch.randint(V, (24,), generator=generator) for _ in range(2))
    target[::5] = IGNORED
    reference = Model(torch.float64)
    want = reference(tokens, target, fused_ppl.perplexity, False, options=REFERENCE)
    want.backward()
    rank, model = group.rank(), Model()
    mine = slice(bounds[rank], bounds[rank + 1])
    acc = fused_ppl.PerplexityAccumulator(model.parameters(), group=group)
    for part in micro_batches(tokens[mine], target[mine], windows[rank]):
        acc.add(model(*part, loss_named("cross_entropy_with_stats", fused), fused, reduction="sum")).backward()
    average(list(model.parameters()), group)
    assert_close_to(acc.finish(), want.detach(), "perplexity")
    assert_gradients(model, {n: p.grad for n, p in reference.named_parameters()})
