# SPDX-License-Identifier: Apache-2.0
"""The words for errors about groups of ranks and what each of them holds: the rule, what was got, and the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn


def check_group_reduction(reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(
            f"group= sums over ranks, for reduction='mean' only; got reduction={reduction!r}. Per-token and "
            "per-sequence losses are each rank's own, and 'sum' is for PerplexityAccumulator: leave group out."
        )


def check_mesh(name: str, ndim: int, names: tuple[str, ...] | None) -> None:
    if ndim != 1:
        one = f"mesh[{names[0]!r}]" if names else "mesh.get_group(dim)"
        raise ValueError(
            f"{name} must be one dimension of a DeviceMesh; got one of {ndim} dimensions. Pass {one}, or "
            "mesh._flatten() where all of them share the batch, as in HSDP."
        )


def fail_group(name: str, value: object) -> NoReturn:
    from torch.distributed import GroupMember

    if value is GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} must be a group that this rank is a member of; it is not. Call only on its members.")
    if value is None:
        raise ValueError(f"{name}=None means all ranks, and there are none: call torch.distributed.init_process_group.")
    raise TypeError(
        f"{name} must be a ProcessGroup, or a DeviceMesh of one dimension; got {type(value).__name__}. "
        "All ranks: torch.distributed.group.WORLD."
    )


def check_no_group(group: object) -> None:
    if group is not None:
        raise NotImplementedError(
            "backend='reference' is plain autograd over one process's tokens, and group= was given. "
            "Leave one of the two out."
        )


def check_placement(
    name: str, sharded: bool, placements: object, mesh_dims: int, dim: int, vocab_group: object
) -> None:
    """A DTensor says by itself how the vocabulary is sharded, and only in one way."""
    if not sharded:
        raise ValueError(
            f"{name} is a DTensor, which must be sharded over the vocabulary, Shard({dim}), on a mesh of one "
            f"dimension; got {placements} on {mesh_dims}. Of an FSDP module call the loss inside forward, where its "
            "parameters are ordinary tensors, or between unshard() and reshard(); for tensor parallelism shard the "
            "head by ColwiseParallel; otherwise pass what you mean, .to_local() or .full_tensor()."
        )
    if vocab_group is not None:
        raise ValueError(
            f"{name} is a DTensor, which says itself how it is sharded; got vocab_group too. Leave it out."
        )


def check_same_mesh(same: bool) -> None:
    if not same:
        raise ValueError(
            "input is a DTensor, so linear_weight must be one on the same mesh; it is not. "
            "Pass input.full_tensor(), or input.to_local() if each rank's tokens are its own."
        )


def check_shard_sizes(sizes: Sequence[int], rank: int, ranks: int, local: int) -> None:
    if len(sizes) != ranks or min(sizes) < 1:
        raise ValueError(
            f"each of the {ranks} ranks of vocab_group must hold at least one class; got sizes {list(sizes)}. "
            "vocab_group=(group, sizes) takes one number for each rank; a smaller group leaves none without a class."
        )
    if sizes[rank] != local:
        raise ValueError(
            f"rank {rank} of vocab_group must hold {sizes[rank]} classes, of sizes {list(sizes)}; its tensor has "
            f"{local}. A DTensor is sharded as torch.chunk does; other sizes are vocab_group=(group, sizes)."
        )


def check_same_shards(same_sizes: bool, same_targets: bool) -> None:
    """Whether all ranks of a vocab_group mean the same sizes of shards, and the same tokens."""
    if not same_sizes:
        raise ValueError(
            "all ranks of vocab_group must mean the same shards of the vocabulary; they do not. Without sizes all hold "
            "as many classes: pass vocab_group=(group, sizes), or DTensors, where they do not."
        )
    if not same_targets:
        raise ValueError(
            "all ranks that hold shards of the vocabulary must be given the same targets; they are not. A weight that "
            "FSDP has sharded over data ranks looks the same: call the loss inside the module's forward, or between "
            "unshard() and reshard()."
        )


def check_ranks(facts: Sequence[Mapping[str, str] | None]) -> None:
    """What each rank says of its call, None where it has not come."""
    absent = [rank for rank, said in enumerate(facts) if said is None]
    if absent:
        raise RuntimeError(
            f"every rank of the group must call the loss, also without tokens; got no call of rank "
            f"{', '.join(map(str, absent))} of {len(facts)} in the group's timeout. Give it a batch of 0 tokens."
        )
    said = [f for f in facts if f is not None]
    for fact in said[0]:
        values = [f.get(fact, "nothing") for f in said]
        usual = max(values, key=values.count)
        wrong = [f"rank {rank} has {value}" for rank, value in enumerate(values) if value != usual]
        if wrong:
            raise ValueError(
                f"all ranks of the group must have the same {fact}, {usual}; {', '.join(wrong)}. "
                "Call the same loss with the same options on each."
            )
