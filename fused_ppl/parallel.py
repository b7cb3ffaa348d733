# SPDX-License-Identifier: Apache-2.0
"""Groups of ranks: which one is meant, what is summed over it, and what is said where none was given.

Collectives are functional ones between opaque ops, so that torch.compile sees them; what travels beside tensors is
names and numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_ppl import checks, rank_checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = ProcessGroup | DeviceMesh
    VocabGroup: TypeAlias = Group | tuple[Group, Sequence[int]]

_OPS = torch.ops.fused_ppl
_warned = False
_calls: dict[str, int] = {}  # that compared ranks, by group


class Groups(NamedTuple):
    """Ranks that hold parts of a batch (`tokens`), and ranks that hold shards of the vocabulary; "" for none."""

    tokens: str = ""
    ranks: int = 1  # of the token group: what the gradient is multiplied by
    vocab: str = ""
    first: int = 0  # class of this rank's shard
    num_classes: int = 0  # of all shards
    layout: int = 0  # a number that differs where ranks mean different shards
    sum_hidden: bool = False  # whether backward adds up the gradient of the hidden states


def token_group(group: Group | None, reduction: str) -> Groups | None:
    """The group over which S and M are summed; None where this process is all there is."""
    if group is None:
        return None
    rank_checks.check_group_reduction(reduction)
    resolved = process_group("group", group)
    return None if resolved.size() == 1 else Groups(resolved.group_name, resolved.size())


def add_shards(groups: Groups | None, name: str, rank: int, sizes: Sequence[int], sum_hidden: bool) -> Groups | None:
    """With the ranks that hold `sizes` classes each."""
    if len(sizes) == 1:
        return groups
    layout = 0
    for size in sizes:  # a polynomial hash: torch.compile traces it, and float64 holds it
        layout = (layout * 1_000_003 + size + 1) % (2**32 - 5)
    tokens, ranks = ("", 1) if groups is None else groups[:2]
    return Groups(tokens, ranks, name, sum(sizes[:rank]), sum(sizes), layout, sum_hidden)


def plain_shards(groups: Groups | None, vocab_group: VocabGroup, local: int, sum_hidden: bool) -> Groups | None:
    """Of ordinary tensors: all of one size, or as the caller says."""
    group, sizes = vocab_group if isinstance(vocab_group, tuple) else (vocab_group, None)
    resolved = process_group("vocab_group", group)
    rank, ranks = resolved.rank(), resolved.size()
    sizes = [local] * ranks if sizes is None else list(sizes)
    rank_checks.check_shard_sizes(sizes, rank, ranks, local)
    return add_shards(groups, resolved.group_name, rank, sizes, sum_hidden)


def process_group(name: str, group: Group | None) -> ProcessGroup:
    """The process group that is meant, of which this rank is a member."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        rank_checks.check_mesh(name, group.ndim, group.mesh_dim_names)
        group = group.get_group()
    if not isinstance(group, ProcessGroup):
        rank_checks.fail_group(name, group)
    return group


def group_or_world(group: Group | None) -> tuple[str, str]:
    """The name of the group, or of that of all ranks; and a type of device it reduces on, the same for all of them."""
    resolved: Any = process_group("group", torch.distributed.group.WORLD if group is None else group)
    devices = [device.type for device in resolved._device_types]
    return resolved.group_name, "cpu" if "cpu" in devices else devices[0]


def compare_ranks(name: str, facts: Mapping[str, object]) -> None:
    """FUSED_PPL_DEBUG=1, before the first collective: every rank of the group is here, and means the same loss.

    Through the group's store, which needs no collective: a rank that is not there can be named.
    """
    if torch.compiler.is_compiling():
        return
    group: Any = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    store = torch.distributed.distributed_c10d._get_process_group_store(group)
    rank, ranks = group.rank(), group.size()
    patience = group._get_backend(group._device_types[0]).options._timeout
    call = _calls[name] = _calls.get(name, -1) + 1
    keys = [f"fused_ppl/{name}/{call}/{r}" for r in range(ranks)]
    store.set(keys[rank], json.dumps({fact: str(value) for fact, value in facts.items()}))
    with contextlib.suppress(RuntimeError):
        store.wait(keys, patience)
    rank_checks.check_ranks([json.loads(store.get(key)) if store.check([key]) else None for key in keys])
    if call > 1:
        store.delete_key(f"fused_ppl/{name}/{call - 2}/{rank}")  # all have read it, or they had not come to the last


def reduce(values: Tensor, operation: str, name: str) -> Tensor:
    """The sum ("sum") or maximum ("max") over the group of this name."""
    reduced = torch.ops._c10d_functional.all_reduce(values, operation, name)
    return torch.ops._c10d_functional.wait_tensor(reduced)  # type: ignore[no-any-return]


def logits_forward(
    tensors: Sequence[Any],  # logits, target, weight, token_weight, num_items
    spec: tuple[Any, ...],
    backend: str,
    memory_budget: int | None,
    groups: Groups,
) -> tuple[Tensor, ...]:
    """The nine results of `logits_forward`, of the batch and the vocabulary of all ranks."""
    logits, target, weight, token_weight, num_items = tensors
    if groups.vocab:
        shard = (groups.first, groups.num_classes, groups.layout)
        parts = _OPS.shard_logits(logits, target, weight, *spec, backend, memory_budget, *shard)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        results = _merge(parts, (target, weight, token_weight), spec, dtype, groups)
    else:
        results = _OPS.logits_sums(*tensors[:4], *spec, backend, memory_budget)
    return _finish(results, num_items, spec, groups)


def hidden_forward(
    tensors: Sequence[Any],  # hidden, linear_weight, linear_bias, target, weight, token_weight, num_items
    spec: tuple[Any, ...],
    backend: str,
    dtype: torch.dtype,
    made: Sequence[bool],
    memory_budget: int | None,
    groups: Groups,
) -> tuple[Tensor, ...]:
    """The twelve results of `linear_forward`, of the batch and the vocabulary of all ranks."""
    *local, token_weight, num_items = tensors
    if groups.vocab:
        shard = (groups.first, groups.num_classes, groups.layout)
        parts = _OPS.shard_hidden(*local, *spec, backend, dtype, memory_budget, *shard)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        results = _merge(parts, (*local[3:], token_weight), spec, wide, groups)
        results = (*results, *(local[0].new_empty(0, dtype=wide) for _ in range(3)))
    else:
        results = _OPS.linear_sums(*tensors[:6], *spec, backend, dtype, made, memory_budget)
    return _finish(results, num_items, spec, groups)


def compact_forward(
    tensors: Sequence[Any],  # hidden, linear_weight, linear_bias, target, weight, token_weight, num_items
    spec: tuple[Any, ...],
    how: tuple[Any, ...],  # backend, dtype, grads, memory_budget, gradient_tolerance, gradient_columns, screen
    groups: Groups | None,
) -> tuple[Tensor, ...]:
    """The twelve results of `linear_forward`, of the batch and the vocabulary of all ranks; then `residual` and
    `loss_error`, each rank's own."""
    *local, num_items = tensors
    if groups is None or not groups.vocab:
        return _finish(_OPS.linear_compact(*local, *spec, *how), num_items, spec, groups)
    backend, dtype, _, memory_budget, *asked, _ = how
    shard, wide = (groups.first, groups.num_classes), torch.float64 if dtype == torch.float64 else torch.float32
    parts = _OPS.shard_hidden(*local[:5], *spec, backend, dtype, memory_budget, *shard, groups.layout)
    sums, nll, lse, *others = _merge(parts, local[3:], spec, wide, groups)
    *made, residual = _OPS.linear_compact_shard(*local, lse, nll, *spec, *how[:4], *asked, *shard)
    return _finish((sums, nll, lse, *others, *made, residual, torch.zeros_like(residual)), num_items, spec, groups)


def _merge(
    parts: Sequence[Tensor], tokens: Sequence[Any], spec: tuple[Any, ...], dtype: torch.dtype, groups: Groups
) -> Sequence[Tensor]:
    """The rows of all shards of the vocabulary: a maximum, then sums relative to it."""
    shards, maxima = parts
    maxima = reduce(maxima, "max", groups.vocab)
    added = reduce(_OPS.shard_sums(shards, maxima, *spec), "sum", groups.vocab)
    return _OPS.shard_merge(maxima, added, *tokens, *spec, groups.num_classes, dtype)  # type: ignore[no-any-return]


def _finish(
    results: Sequence[Tensor], num_items: Tensor | None, spec: tuple[Any, ...], groups: Groups | None
) -> tuple[Tensor, ...]:
    sums, nll, *others = results
    if groups is not None and groups.tokens:
        sums = reduce(sums, "sum", groups.tokens)
    ranks = 1 if groups is None else groups.ranks
    return (*_OPS.finish(sums, num_items, *spec, nll.dtype, ranks), nll, *others)


def warn_without_group(
    reduction: str, group: object, vocab_group: object, input: object, linear_weight: object = None
) -> None:
    """Once: the perplexities of ranks do not average to that of the batch. Ranks that hold shards of the vocabulary may
    all have the same tokens."""
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
    """The stack level, seen from `warn_without_group`, of the first frame outside this package and torch."""
    inside = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in (checks, torch))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
