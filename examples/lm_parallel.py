# SPDX-License-Identifier: Apache-2.0
"""Splits the model, the batch and the report over ranks. The training loop is the same for one process and for many.

    torchrun --nproc-per-node 2 examples/train_lm.py --parallel ddp      each rank has the model and a part of the batch
    torchrun --nproc-per-node 2 examples/train_lm.py --parallel fsdp     ... and a part of every weight
    torchrun --nproc-per-node 2 examples/train_lm.py --parallel tp       the batch, and a part of vocabulary and MLPs

For every kind and every number of ranks, the batches are those of one process, and so are the losses, up to rounding.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_model import GPT
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fused_ppl

KINDS = ("ddp", "fsdp", "tp")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the other ranks that train. By default there is one process."""

    device: str
    kind: str | None = None
    mesh: DeviceMesh | None = None
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> DeviceMesh | None:
        """The `group` of the loss: the ranks that hold different tokens. Tensor-parallel ranks hold the same tokens."""
        return None if self.kind == "tp" else self.mesh

    def wrap(self, model: GPT) -> nn.Module:
        """Return the model on its device and, if there are several ranks, split over them."""
        model = model.to(self.device)
        if self.kind == "ddp":
            return DistributedDataParallel(model, device_mesh=self.mesh)
        if self.kind == "fsdp":
            for block in model.blocks:
                fully_shard(block, mesh=self.mesh)
            return fully_shard(model, mesh=self.mesh)
        if self.kind == "tp":
            # the head shares its weight with the embedding, so both are sharded over the vocabulary
            plan: dict[str, Any] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
            for i in range(len(model.blocks)):
                plan |= {f"blocks.{i}.mlp.0": ColwiseParallel(), f"blocks.{i}.mlp.2": RowwiseParallel()}
            return parallelize_module(model, self.mesh, plan)
        return model

    def share(self, batch: Tensor) -> Tensor:
        """Return the sequences of this rank. There may be none."""
        return (batch if self.group is None else batch.tensor_split(self.size)[self.rank]).to(self.device)

    def collect(self, metric: fused_ppl.Perplexity) -> fused_ppl.Perplexity:
        """Add up the sums of all ranks."""
        return metric if self.group is None else metric.sync(self.group)

    def folder(self, out: Path) -> Path:
        """Return the folder for the report of this rank. Only the first rank writes to --out."""
        return out if self.first else Path(tempfile.mkdtemp(prefix="train_lm-"))


def join(kind: str | None, device: str) -> Ranks:
    """Connect to the other processes that torchrun has started. Only the first one prints from then on."""
    if kind is None:
        return Ranks(device)
    if "RANK" not in os.environ:
        raise RuntimeError(
            f"--parallel {kind} needs several processes; this is one. "
            f"Use torchrun --nproc-per-node 2 examples/train_lm.py --parallel {kind}"
        )
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.partition(":")[0], (int(os.environ["WORLD_SIZE"]),))
    ranks = Ranks(device, kind, mesh, dist.get_rank(), dist.get_world_size())
    if not ranks.first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (stays open until exit)
    return ranks


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Put DTensors and ordinary tensors into different groups, because one group must not contain both."""
    kinds: dict[type, list[Tensor]] = {}
    for parameter in model.parameters():
        kinds.setdefault(type(parameter.data), []).append(parameter)
    return [{"params": parameters} for parameters in kinds.values()]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm is at most `max_norm`, and return the norm before.

    The function of torch does not take DTensors and ordinary tensors together.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    total = torch.linalg.vector_norm(torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]))
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for g in gradients:
        (g.to_local() if hasattr(g, "to_local") else g).mul_(factor)
    return total
