# SPDX-License-Identifier: Apache-2.0
"""What ranks run in test_distributed_collectives.py: losses over a process group that records what passes it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import D, mesh_of
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fused_ppl

N, LOCAL = 6, 5  # tokens and classes of a rank
_names = itertools.count()


class Recording(dist.ProcessGroup):
    """Passes everything on to a gloo group, and keeps (collective, operation, bytes)."""

    def __init__(self, inner: dist.ProcessGroup) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner, self.name = inner, f"recording {next(_names)}"
        self.calls: list[tuple[str, str, int]] = []
        torch._C._distributed_c10d._register_process_group(self.name, self)

    @property
    def group_name(self) -> str:
        return self.name

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        operation = next(o for o in ("SUM", "MAX") if options.reduceOp == getattr(dist.ReduceOp, o)).lower()
        self.calls.append(("all_reduce", operation, sum(t.nbytes for t in tensors)))
        return self.inner.allreduce(tensors, options)

    def __getattribute__(self, name: str) -> Any:
        if name in ("allgather", "broadcast", "reduce_scatter", "alltoall", "barrier", "reduce", "gather", "scatter"):
            raise AssertionError(f"{name} was not promised")
        return super().__getattribute__(name)


def losses(group: dist.ProcessGroup, over: str, keywords: dict[str, Any], name: str, fused: bool, grad: bool) -> Any:
    """(calls of forward, calls of backward) of one loss whose tokens or whose vocabulary the group shares."""
    recording = Recording(group)
    generator = torch.Generator().manual_seed(group.rank() if over == "group" else 0)
    h = torch.randn(N, D, generator=generator).requires_grad_(grad)
    w = torch.randn(LOCAL, D, generator=generator).requires_grad_(grad)
    y = torch.randint(LOCAL, (N,), generator=generator)
    keywords = {**keywords, over: recording}
    if fused:
        out = getattr(fused_ppl, f"linear_{name}")(h, w, y, **keywords)
    else:
        out = getattr(fused_ppl, name)(h @ w.T, y, **keywords)
    forward, recording.calls = recording.calls, []
    if grad:
        (out if isinstance(out, Tensor) else out.loss + out.perplexity).backward()
    return forward, recording.calls


def accumulator(group: dist.ProcessGroup) -> Any:
    recording = Recording(group)
    x = torch.zeros(4, 7, requires_grad=True)
    acc = fused_ppl.PerplexityAccumulator([x], group=recording)
    for part in x.split(2):
        out = fused_ppl.cross_entropy_with_stats(part, torch.tensor([1, 2]), reduction="sum")
        acc.add(out).backward()
    before, recording.calls = recording.calls, []
    acc.finish()
    metric = fused_ppl.Perplexity()
    metric.update(x, torch.tensor([1, 2, 3, 4]))
    return before, recording.calls


def sharded_tokens(group: dist.ProcessGroup) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives of forward and backward where hidden states are sharded over tokens: DTensor's own included."""
    mesh = mesh_of(group, "tp")
    hidden = distribute_tensor(torch.randn(8, D), mesh, [Shard(0)]).requires_grad_()
    weight = distribute_tensor(torch.randn(9, D), mesh, [Shard(0)]).requires_grad_()
    with counted() as forward:
        loss = fused_ppl.linear_perplexity(hidden, weight, torch.arange(8))
    with counted() as backward:
        loss.backward()
    assert isinstance(hidden.grad.placements[0], Shard)
    return forward, backward


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    counts: dict[str, int] = {}
    with CommDebugMode() as mode:
        yield counts
    counts.update({str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items() if n})
