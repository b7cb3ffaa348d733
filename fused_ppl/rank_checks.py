# SPDX-License-Identifier: Apache-2.0
"""Checks of groups of ranks and of what each rank holds. Errors state the rule, the value, and the way out.

Ranks that compute different losses would otherwise wait for each other or return wrong numbers. `check_same_shards` is
therefore always called, with numbers from the first collective. `check_ranks` compares more and is for debugging.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn


def check_group_reduction(reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(
            f"group= needs reduction='mean', the only reduction that sums over ranks; got reduction={reduction!r}. "
            "Leave group out. To sum over ranks and micro-batches, use 'sum' with PerplexityAccumulator."
        )


def check_mesh(name: str, ndim: int, names: tuple[str, ...] | None) -> None:
    if ndim != 1:
        example = f"mesh[{names[0]!r}]" if names else "mesh.get_group(dim)"
        raise ValueError(
            f"{name} must be one dimension of a DeviceMesh; got a mesh of {ndim} dimensions. Pass {example}. "
            "If all dimensions share the batch, as in HSDP, pass mesh._flatten()."
        )


def fail_group(name: str, value: object) -> NoReturn:
    from torch.distributed import GroupMember

    if value is GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} must be a group that this rank is a member of; it is not. Call only on members.")
    if value is None:
        raise ValueError(f"{name}=None means all ranks; there are none. Call torch.distributed.init_process_group.")
    raise TypeError(
        f"{name} must be a ProcessGroup, or a DeviceMesh of one dimension; got {type(value).__name__}. "
        "For all ranks pass torch.distributed.group.WORLD."
    )


def check_no_group(group: object) -> None:
    if group is not None:
        raise NotImplementedError(
            "backend='reference' must be used without group=, because it handles the tokens of one process only; "
            "got both. Leave one of them out."
        )


def check_placement(name: str, placements: object, *, mesh_dims: int, dim: int, sharded: bool) -> None:
    """Check that a DTensor is sharded over dimension `dim`, the vocabulary, on a mesh of one dimension."""
    if not sharded:
        raise ValueError(
            f"{name} is a DTensor, which must be sharded over the vocabulary, Shard({dim}), on a mesh of one "
            f"dimension; got {placements} on a mesh of {mesh_dims}. Under FSDP call the loss inside forward, where "
            "parameters are ordinary tensors, or between unshard() and reshard(). For tensor parallelism shard the "
            "head with ColwiseParallel. Otherwise pass .to_local() or .full_tensor()."
        )


def check_no_vocab_group(name: str, vocab_group: object) -> None:
    if vocab_group is not None:
        raise ValueError(
            f"{name} is a DTensor, and its placement already names the ranks that hold the other classes; "
            "got vocab_group too. Leave it out."
        )


def check_same_mesh(same: bool) -> None:
    if not same:
        raise ValueError(
            "input is a DTensor, so linear_weight must be a DTensor on the same mesh; it is not. Pass "
            "input.full_tensor(), or input.to_local() if each rank has its own tokens."
        )


def check_shard_sizes(sizes: Sequence[int], rank: int, ranks: int, local: int) -> None:
    if len(sizes) != ranks or min(sizes) < 1:
        raise ValueError(
            f"each of the {ranks} ranks of vocab_group must hold at least one class; got sizes {list(sizes)}. "
            "Pass vocab_group=(group, sizes) with one size for each rank, or use a smaller group."
        )
    if sizes[rank] != local:
        raise ValueError(
            f"rank {rank} of vocab_group must hold {sizes[rank]} classes, because the sizes are {list(sizes)}; its "
            f"tensor has {local}. A DTensor must be split as by torch.chunk. For other sizes pass local tensors and "
            "vocab_group=(group, sizes)."
        )


def check_same_shards(same_sizes: bool, same_targets: bool) -> None:
    """Check what the first collective found: whether all ranks of a vocab_group have the same sizes and targets."""
    if not same_sizes:
        raise ValueError(
            "all ranks of vocab_group must mean the same shards of the vocabulary; they do not. "
            "If ranks hold different numbers of classes, pass DTensors or vocab_group=(group, sizes)."
        )
    if not same_targets:
        raise ValueError(
            "all ranks that hold shards of the vocabulary must be given the same targets; they are not. If FSDP "
            "sharded the weight over data ranks, call the loss inside forward, or between unshard() and reshard()."
        )


def check_ranks(facts: Sequence[Mapping[str, str] | None]) -> None:
    """Check that all ranks have the same facts, such as the dtype. A rank that has not called the loss has None."""
    absent = [rank for rank, own in enumerate(facts) if own is None]
    if absent:
        raise RuntimeError(
            "every rank of the group must call the loss, even without tokens; got no call of rank "
            f"{', '.join(map(str, absent))} of {len(facts)} before the timeout. Give it a batch of 0 tokens."
        )
    present = [own for own in facts if own is not None]
    for fact in present[0]:
        values = [own.get(fact, "nothing") for own in present]
        usual = max(values, key=values.count)
        wrong = [f"rank {rank} has {value}" for rank, value in enumerate(values) if value != usual]
        if wrong:
            raise ValueError(
                f"all ranks of the group must have the same {fact}, {usual}; {', '.join(wrong)}. "
                "Call the same loss with the same options on each rank."
            )
