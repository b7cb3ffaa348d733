# SPDX-License-Identifier: Apache-2.0
"""What ranks run in test_divergence_stacks.py."""

from __future__ import annotations

from typing import Any

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from fused_ppl import linear_kl_divergence


def rank_of_a_batch(group: dist.ProcessGroup, kind: str, keywords: dict[str, Any]) -> None:
    """Loss and averaged gradients of ranks are those of one process with the whole batch."""
    tokens, targets = cases.batch(kind, group.size())
    generator = torch.Generator().manual_seed(9)
    classes = cases.Model().head.weight.shape[0]
    hidden = torch.randn((sum(map(len, targets)), 5), generator=generator).split([len(t) for t in targets])
    weight = torch.randn((classes, 5), generator=generator)

    def loss(model: cases.Model, tokens: Tensor, target: Tensor, teacher: Tensor, **extra: Any) -> Tensor:
        student = model.hidden(tokens)
        head = (model.head.weight, teacher.to(student.dtype), weight.to(student.dtype))
        return linear_kl_divergence(student, *head, target=target, linear_bias=model.head.bias, **keywords, **extra)

    whole = cases.Model(torch.float64)
    want = loss(whole, *(torch.cat(parts) for parts in (tokens, targets, hidden)), options=cases.REFERENCE)
    want.backward()
    rank, model = group.rank(), cases.Model()
    got = loss(model, tokens[rank], targets[rank], hidden[rank], group=group)
    cases.assert_close_to(got, want.detach(), "loss")
    got.backward()
    cases.average(list(model.parameters()), group)
    cases.assert_gradients(model, {n: p.grad for n, p in whole.named_parameters()}, 2e-6)


def rank_of_a_sharded_head(group: dist.ProcessGroup) -> None:
    """A DTensor is refused in a sentence."""
    mesh = DeviceMesh.from_group(group, "cpu")
    weight = distribute_tensor(torch.randn(8, 5), mesh, [Shard(0)])
    with pytest.raises(NotImplementedError, match="plain tensors with all classes"):
        linear_kl_divergence(torch.randn(3, 5), weight, torch.randn(3, 4), torch.randn(8, 4))
