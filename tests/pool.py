# SPDX-License-Identifier: Apache-2.0
"""Four worker processes that stay, with a gloo group of the first 1, 2, 3 and 4 of them, and run functions by name.

A function runs in each rank as `function(group, *arguments)` and asserts for itself; what it returns comes back.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

MOST = 4
NEEDS_FSDP2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"),
    reason="FSDP2 of this torch needs a GPU: its streams of the CPU record no event",
)
FSDP = pytest.param("fsdp", marks=NEEDS_FSDP2)
NEEDS_UNEVEN_FSDP = pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="before torch 2.8, FSDP2 shards a tensor-parallel weight into even parts only"
)
FSDP_OVER_SHARDS = pytest.param("fsdp", marks=[NEEDS_FSDP2, NEEDS_UNEVEN_FSDP])
PATIENCE = 60.0  # seconds; a collective that hangs ends by the group's timeout before


class WorkerError(AssertionError):
    """What a rank raised, with its traceback."""


def gloo_averages(group: dist.ProcessGroup) -> bool:
    """Up to torch 2.8 gloo sums where FSDP2 asks for an average, which makes its gradients as many times too large."""
    out = torch.zeros(1)
    dist.reduce_scatter_tensor(out, torch.ones(group.size()), op=dist.ReduceOp.AVG, group=group)
    return out.item() == 1


def gloo_was_mended(group: dist.ProcessGroup) -> bool:
    return dist.reduce_scatter_tensor.__module__ == __name__


def _average() -> None:
    original = dist.reduce_scatter_tensor

    def reduce_scatter_tensor(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):  # type: ignore[no-untyped-def]
        assert not async_op
        original(output, input, op, group)
        if op == dist.ReduceOp.AVG:
            output.div_(dist.get_world_size(group))

    dist.reduce_scatter_tensor = reduce_scatter_tensor


def _serve(rank: int, rendezvous: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=MOST,
        timeout=datetime.timedelta(seconds=PATIENCE - 10),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST)}
    groups[MOST] = dist.group.WORLD
    if not gloo_averages(groups[MOST]):
        _average()
    with contextlib.suppress(EOFError):
        while True:
            function, size, arguments, environment = connection.recv()
            os.environ.update(environment)
            torch.manual_seed(0)
            try:
                connection.send((True, function(groups[size], *arguments)))
            except BaseException as error:
                connection.send((False, f"rank {rank} of {size}: {error!r}\n{traceback.format_exc()}"))
            for name in environment:
                del os.environ[name]
    os._exit(0)  # without the goodbyes of groups whose other members have gone


class Pool:
    """The processes; `run` sends a function to the first `size` of them."""

    def __init__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor", "fused_ppl"])
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(MOST):
            mine, theirs = context.Pipe()
            arguments = (rank, os.path.join(self._folder.name, "rendezvous"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._connections.append(mine)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, **environment: str) -> list[Any]:
        """The results of all ranks, or the error of the first that failed."""
        waiting = self._connections[:size]
        for connection in waiting:
            connection.send((function, size, arguments, environment))
        replies: dict[Any, tuple[bool, Any]] = {}
        while len(replies) < size:
            ready = wait([c for c in waiting if c not in replies], timeout=PATIENCE)
            if not ready:
                raise WorkerError(f"{size - len(replies)} of {size} ranks did not answer in {PATIENCE:g} s")
            replies.update((connection, connection.recv()) for connection in ready)  # type: ignore[attr-defined]
        results = [replies[c] for c in waiting]
        failed = [text for passed, text in results if not passed]
        if failed:
            raise WorkerError("\n".join(failed))
        return [value for _, value in results]

    def close(self) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.close()
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
