# SPDX-License-Identifier: Apache-2.0
"""From DTensors to local tensors, and to the group of ranks that hold the other shards of the vocabulary.

The loss computes with the local shards of the vocabulary, so no logits and no weights are gathered. Hidden states that
are sharded over tokens are gathered, because every shard of the vocabulary needs all tokens.
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
    """True if no tensor is of a subclass such as DTensor. Every call asks this, so it must be fast."""
    return all(type(t) in _PLAIN for t in tensors)


def local_logits(
    logits: Tensor, class_dim: int, vocab_group: VocabGroup | None, groups: Groups | None
) -> tuple[Tensor, Groups | None]:
    """Return the local classes of the logits, and `groups` extended by the ranks that hold the other classes."""
    dim = 0 if logits.ndim == 1 else class_dim % logits.ndim
    if is_distributed(logits):
        rank_checks.check_no_vocab_group("input", vocab_group)
        return logits.to_local(), _add_shards_of("input", logits, dim, groups)
    if vocab_group is not None:
        groups = plain_shards(groups, vocab_group, logits.shape[dim], False)
    return logits, groups


def local_head(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *,
    vocab_group: VocabGroup | None,
    groups: Groups | None,
) -> tuple[Tensor, Tensor, Tensor | None, Groups | None]:
    """Return hidden states of all tokens, the local weight and bias, and `groups` extended by the vocabulary ranks.

    The gradient of the hidden states is a sum over these ranks. If the hidden states are a DTensor, it computes this
    sum in backward. Otherwise the loss does (`sum_hidden`).
    """
    sum_hidden = not is_distributed(hidden)
    if is_distributed(linear_weight):
        rank_checks.check_no_vocab_group("linear_weight", vocab_group)
        groups = _add_shards_of("linear_weight", linear_weight, 0, groups, sum_hidden=sum_hidden)
        if is_distributed(hidden):
            rank_checks.check_same_mesh(hidden.device_mesh == linear_weight.device_mesh)
            hidden = _gather(hidden)
        linear_weight = linear_weight.to_local()
    else:
        rank_checks.check_same_mesh(sum_hidden)
        if vocab_group is not None:
            groups = plain_shards(groups, vocab_group, linear_weight.shape[0], sum_hidden)
    if linear_bias is not None and is_distributed(linear_bias):
        _add_shards_of("linear_bias", linear_bias, 0, groups)  # for its checks
        linear_bias = linear_bias.to_local()
    return hidden, linear_weight, linear_bias, groups


def whole(tokens: T) -> T:
    """Return targets or weights of all tokens, gathered if they are a DTensor."""
    return tokens.full_tensor() if tokens is not None and is_distributed(tokens) else tokens


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _add_shards_of(
    name: str, tensor: DTensor, dim: int, groups: Groups | None, *, sum_hidden: bool = False
) -> Groups | None:
    """Return `groups` extended by the ranks that hold the shards of `tensor` along `dim`, the vocabulary."""
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    mesh, placements = tensor.device_mesh, tensor.placements
    first = placements[0]
    # `type(first) is Shard` would be shorter, but Dynamo of torch 2.12 cannot trace it
    is_shard = isinstance(first, Shard) and not isinstance(first, _StridedShard) and first.dim % tensor.ndim == dim
    sharded = mesh.ndim == 1 and is_shard
    rank_checks.check_placement(name, placements, mesh_dims=mesh.ndim, dim=dim, sharded=sharded)
    group, ranks = mesh.get_group(), mesh.size()
    sizes = _shard_sizes(tensor.shape[dim], ranks)
    coordinate = mesh.get_coordinate()
    rank = 0 if coordinate is None else coordinate[0]
    rank_checks.check_shard_sizes(sizes, rank, ranks, tensor.to_local().shape[dim])
    return add_shards(groups, group.group_name, rank, sizes, sum_hidden=sum_hidden)


def _shard_sizes(size: int, ranks: int) -> Sequence[int]:
    """The sizes into which torch.chunk, and so Shard, splits a dimension."""
    step = -(-size // ranks)
    return [max(0, min(size, step * (r + 1)) - step * r) for r in range(ranks)]


def _gather(hidden: DTensor) -> Tensor:
    """Return all tokens. Backward sums the partial gradients of all ranks and returns each token's sum to its rank."""
    from torch.distributed.tensor import Partial, Replicate

    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
