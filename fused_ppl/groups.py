# SPDX-License-Identifier: Apache-2.0
"""Process groups: which one an argument means, whether its ranks agree, and a warning if it is missing.

A group travels as its name, because torch.compile and torch.library carry strings.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fused_ppl import checks, rank_checks
from fused_ppl.records import Groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = ProcessGroup | DeviceMesh
    VocabGroup: TypeAlias = Group | tuple[Group, Sequence[int]]

_warned = False
_calls: dict[str, int] = {}  # how many calls have compared ranks, by group


def token_group(group: Group | None, reduction: str) -> Groups | None:
    """The group over which S and M are summed; None if it has one rank."""
    if group is None:
        return None
    rank_checks.check_group_reduction(reduction)
    resolved = process_group("group", group)
    return None if resolved.size() == 1 else Groups(resolved.group_name, resolved.size())


def add_shards(groups: Groups | None, name: str, rank: int, sizes: Sequence[int], *, sum_hidden: bool) -> Groups | None:
    """`groups` extended by the ranks of a vocabulary group, which hold `sizes` classes each."""
    if len(sizes) == 1:
        return groups
    layout = 0
    for size in sizes:  # a polynomial hash, which torch.compile can trace and float64 can hold
        layout = (layout * 1_000_003 + size + 1) % (2**32 - 5)
    groups = Groups() if groups is None else groups
    # no _replace: torch 2.6 does not trace it
    return Groups(groups.tokens, groups.ranks, name, sum(sizes[:rank]), sum(sizes), layout, sum_hidden)


def plain_shards(groups: Groups | None, vocab_group: VocabGroup, local: int, sum_hidden: bool) -> Groups | None:
    """`groups` extended by `vocab_group`. Without sizes every rank holds as many classes as this one."""
    group, sizes = vocab_group if isinstance(vocab_group, tuple) else (vocab_group, None)
    resolved = process_group("vocab_group", group)
    rank, ranks = resolved.rank(), resolved.size()
    sizes = [local] * ranks if sizes is None else list(sizes)
    rank_checks.check_shard_sizes(sizes, rank, ranks, local)
    return add_shards(groups, resolved.group_name, rank, sizes, sum_hidden=sum_hidden)


def process_group(name: str, group: Group | None) -> ProcessGroup:
    """The process group of an argument. This rank must be a member of it."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        rank_checks.check_mesh(name, group.ndim, group.mesh_dim_names)
        group = group.get_group()
    if not isinstance(group, ProcessGroup):
        rank_checks.fail_group(name, group)
    return group


def group_or_world(group: Group | None) -> tuple[str, str]:
    """The name of the group, or of the group of all ranks, and a device type that it reduces on."""
    resolved: Any = process_group("group", torch.distributed.group.WORLD if group is None else group)
    devices = [device.type for device in resolved._device_types]
    return resolved.group_name, "cpu" if "cpu" in devices else devices[0]


def compare_ranks(name: str, facts: Mapping[str, object]) -> None:
    """Check, before the first collective, that all ranks of the group call the same loss (FUSED_PPL_DEBUG=1).

    The comparison uses the group's store and no collective, so that the message can name a rank that is missing.
    """
    if torch.compiler.is_compiling():
        return
    group: Any = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # it takes a name
    store = torch.distributed.distributed_c10d._get_process_group_store(group)
    rank, ranks = group.rank(), group.size()
    patience = group._get_backend(group._device_types[0]).options._timeout
    call = _calls[name] = _calls.get(name, -1) + 1
    keys = [f"{__name__}/{name}/{call}/{r}" for r in range(ranks)]
    store.set(keys[rank], json.dumps({fact: str(value) for fact, value in facts.items()}))
    with contextlib.suppress(RuntimeError):
        store.wait(keys, patience)
    rank_checks.check_ranks([json.loads(store.get(key)) if store.check([key]) else None for key in keys])
    if call > 1:
        store.delete_key(f"{__name__}/{name}/{call - 2}/{rank}")  # every rank has read it by now


def all_reduce(values: Tensor, operation: str, name: str) -> Tensor:
    """The sum ("sum") or maximum ("max") over the group of this name, by a functional collective."""
    reduced = torch.ops._c10d_functional.all_reduce(values, operation, name)
    return torch.ops._c10d_functional.wait_tensor(reduced)  # type: ignore[no-any-return]  # torch.ops is untyped


def warn_without_group(
    reduction: str, group: object, vocab_group: object, input: object, *, linear_weight: object = None
) -> None:
    """Warn once that the perplexities of ranks do not average to the perplexity of the batch.

    Ranks that hold shards of the vocabulary get no warning, because they may have the same tokens.
    """
    global _warned
    if torch.compiler.is_compiling() or _warned or group is not None or vocab_group is not None or reduction != "mean":
        return
    if not (torch.is_grad_enabled() and isinstance(input, Tensor) and input.requires_grad):
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    ranks = torch.distributed.get_world_size()
    if ranks == 1 or hasattr(input, "device_mesh") or hasattr(linear_weight, "device_mesh"):
        return
    _warned = True
    warnings.warn(
        f"A perplexity is trained on by {ranks} ranks, each of which takes that of its own tokens: their average is "
        "not the perplexity of the batch, nor is its gradient. Pass group=torch.distributed.group.WORLD (or the ranks "
        "that share the batch), or accumulate with fused_ppl.PerplexityAccumulator(..., group=...).",
        UserWarning,
        stacklevel=_caller(),
    )


def _caller() -> int:
    """The stack level of the first frame outside this package and torch, as `warn_without_group` counts."""
    inside = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in (checks, torch))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
