# SPDX-License-Identifier: Apache-2.0
"""How the model, the batch and the report are spread over ranks, so that the training loop need not know.

    torchrun --nproc-per-node 2 examples/train_lm.py --parallel ddp      each rank has the model and a part of the batch
    torchrun --nproc-per-node 2 examples/train_lm.py --parallel fsdp     ... and a part of every weight
    torchrun --nproc-per-node 2 examples/train_lm.py --parallel tp       the batch, and a part of vocabulary and MLPs

Whatever the ranks, the batches are those of one process, and so are the losses, up to rounding.
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
    """This process among those that train; by default it is the only one."""

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
        """The ranks that share the tokens of a batch, for the loss."""
        return None if self.kind == "tp" else self.mesh

    def wrap(self, model: GPT) -> nn.Module:
        """The model on its device, whose `forward` computes the loss."""
        model = model.to(self.device)
        if self.kind == "ddp":
            return DistributedDataParallel(model, device_mesh=self.mesh)
        if self.kind == "fsdp":
            for block in model.blocks:
                fully_shard(block, mesh=self.mesh)
            return fully_shard(model, mesh=self.mesh)
        if self.kind == "tp":
            # the head is the embedding transposed, and with it sharded over the vocabulary
            plan: dict[str, Any] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
            for i in range(len(model.blocks)):
                plan |= {f"blocks.{i}.mlp.0": ColwiseParallel(), f"blocks.{i}.mlp.2": RowwiseParallel()}
            return parallelize_module(model, self.mesh, plan)
        return model

    def share(self, batch: Tensor) -> Tensor:
        """This rank's sequences, of which there may be none."""
        return (batch if self.group is None else batch.tensor_split(self.size)[self.rank]).to(self.device)

    def collect(self, metric: fused_ppl.Perplexity) -> fused_ppl.Perplexity:
        """Over the sequences of all ranks."""
        return metric if self.group is None else metric.sync(self.group)

    def folder(self, out: Path) -> Path:
        """Where this rank writes its report: the first one where it is asked to."""
        return out if self.first else Path(tempfile.mkdtemp(prefix="train_lm-"))


def join(kind: str | None, device: str) -> Ranks:
    """Meet the other processes that torchrun has started; all but the first are silent from then on."""
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
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open to the end)
    return ranks


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """DTensors apart from ordinary tensors: an optimizer steps over one group at a time, and cannot mix the two."""
    kinds: dict[type, list[Tensor]] = {}
    for parameter in model.parameters():
        kinds.setdefault(type(parameter.data), []).append(parameter)
    return [{"params": parameters} for parameters in kinds.values()]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], longest: float) -> Tensor:
    """The norm of the whole gradient, which is no longer than `longest` afterwards; DTensors and tensors mixed."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    total = torch.linalg.vector_norm(torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]))
    factor = (longest / (total + 1e-6)).clamp(max=1.0)
    for g in gradients:
        (g.to_local() if hasattr(g, "to_local") else g).mul_(factor)
    return total
