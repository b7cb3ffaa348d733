# SPDX-License-Identifier: Apache-2.0
"""What a DTensor says of its shards: the local tensors to compute with, and the ranks that hold the others.

A tensor is taken apart only where the parts can be computed with; none is gathered but hidden states that are sharded
over tokens, which every shard of the vocabulary needs whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import Tensor

from fused_ppl import rank_checks
from fused_ppl.groups import add_shards, plain_shards
from fused_ppl.records import Groups

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from fused_ppl.groups import VocabGroup

T = TypeVar("T", Tensor, Tensor | None)
_PLAIN = (Tensor, torch.nn.Parameter)


def all_plain(*tensors: object) -> bool:
    """Whether none is of a subclass. Fast: it is asked of every call."""
    return all(type(t) in _PLAIN for t in tensors)


def local_logits(
    logits: Tensor, class_dim: int, vocab_group: VocabGroup | None, groups: Groups | None
) -> tuple[Tensor, Groups | None]:
    """This rank's columns, and the groups with those that hold the others."""
    dim = 0 if logits.ndim == 1 else class_dim % logits.ndim
    if _is_distributed(logits):
        groups = _of_spec("input", logits, dim, vocab_group, groups, False)
        return logits.to_local(), groups
    if vocab_group is not None:
        groups = plain_shards(groups, vocab_group, logits.shape[dim], False)
    return logits, groups


def local_head(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    vocab_group: VocabGroup | None,
    groups: Groups | None,
) -> tuple[Tensor, Tensor, Tensor | None, Groups | None]:
    """Hidden states of all tokens, this rank's rows of weight and bias, and the groups with those that hold the others.

    A gradient of the hidden states is summed by the DTensor that they come from, or else by us.
    """
    sum_hidden = not _is_distributed(hidden)
    if _is_distributed(linear_weight):
        groups = _of_spec("linear_weight", linear_weight, 0, vocab_group, groups, sum_hidden)
        if _is_distributed(hidden):
            rank_checks.check_same_mesh(hidden.device_mesh == linear_weight.device_mesh)
            hidden = _gather(hidden)
        linear_weight = linear_weight.to_local()
    else:
        rank_checks.check_same_mesh(sum_hidden)
        if vocab_group is not None:
            groups = plain_shards(groups, vocab_group, linear_weight.shape[0], sum_hidden)
    if linear_bias is not None and _is_distributed(linear_bias):
        _of_spec("linear_bias", linear_bias, 0, None, groups, False)
        linear_bias = linear_bias.to_local()
    return hidden, linear_weight, linear_bias, groups


def whole(tokens: T) -> T:
    """Targets or weights of all tokens."""
    return tokens.full_tensor() if tokens is not None and _is_distributed(tokens) else tokens


def _is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _of_spec(
    name: str,
    tensor: DTensor,
    dim: int,
    vocab_group: VocabGroup | None,
    groups: Groups | None,
    sum_hidden: bool,
) -> Groups | None:
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    sharded = mesh.ndim == 1 and type(placements[0]) is Shard and placements[0].dim % tensor.ndim == dim
    rank_checks.check_placement(name, sharded, placements, mesh.ndim, dim, vocab_group)
    group, ranks = mesh.get_group(), mesh.size()
    sizes = _chunks(tensor.shape[dim], ranks)
    coordinate = mesh.get_coordinate()
    rank = 0 if coordinate is None else coordinate[0]
    rank_checks.check_shard_sizes(sizes, rank, ranks, tensor.to_local().shape[dim])
    return add_shards(groups, group.group_name, rank, sizes, sum_hidden)


def _chunks(size: int, ranks: int) -> Sequence[int]:
    """As torch.chunk, and so Shard, cuts."""
    step = -(-size // ranks)
    return [max(0, min(size, step * (r + 1)) - step * r) for r in range(ranks)]


def _gather(hidden: DTensor) -> Tensor:
    """All tokens. In backward every rank's part of their gradient is summed, to where the tokens are."""
    from torch.distributed.tensor import Partial, Replicate

    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
