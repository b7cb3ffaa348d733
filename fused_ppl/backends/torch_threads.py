# SPDX-License-Identifier: Apache-2.0
"""Rows of large logits on a CPU that other programs use as well: in threads that do not wait for each other.

PyTorch's own threads meet after every operation on a chunk, and keep their cores busy while they wait. That is fastest
where they have the cores for themselves. If other programs run, a thread that has no core holds up all others, once for
each operation. Then each of our threads walks its rows through all operations, and they meet once for each call.

A call in PyTorch's threads tells which it is: its thread had no core for part of the time. Results have the same bits.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_ppl import plan
from fused_ppl.records import TokenInputs

LEAST_LOGITS = 2**22  # of a call that is worth it
MOST_THREADS = 16  # Python's lock lets one thread start an operation at a time
LEAST_SHARE = 0.7  # of the time: a thread that other programs leave alone has its core for all of it
CALLS = 32  # in our threads, until PyTorch's are tried again

Result = TypeVar("Result")
Values = TypeVar("Values", Tensor, Tensor | None)

# In our threads. Callers in several threads may count one call for two, which changes no result.
_calls_left = 0


class Part(NamedTuple):
    """Some of the rows of logits, or all of them."""

    place: slice | tuple[slice, slice] | None  # in (N, V) or in (B, R, V); None is all
    rows: slice  # of the flat rows
    number: int  # of parts, which share a budget

    def of_logits(self, logits: Tensor) -> Tensor:
        return logits if self.place is None else logits[self.place]

    def of_tokens(self, tokens: TokenInputs) -> TokenInputs:
        return tokens if self.place is None else tokens.of_rows(self.rows)

    def of(self, values: Values) -> Values:
        """The values (N,) of these rows, or a value () of all."""
        return values if self.place is None or values is None or values.ndim == 0 else values[self.rows]

    def budget(self, memory_budget: int | None) -> int | None:
        return None if memory_budget is None else memory_budget // self.number


ALL = Part(None, slice(None), 1)


def in_parts(
    logits: Tensor, of_part: Callable[[Part], Result], *, check: Callable[[], object] | None = None
) -> list[Result]:
    """The results of `of_part`: of all rows at once in the caller's thread, or of one part for each of our threads.

    `check` raises in the place of a part, which would name a position in the part.
    """
    global _calls_left
    if not _worth_it(logits):
        return [of_part(ALL)]
    if _calls_left <= 0:
        wall, own = time.perf_counter(), time.thread_time()
        result = of_part(ALL)
        wall, own = time.perf_counter() - wall, time.thread_time() - own
        if own < LEAST_SHARE * wall:
            _calls_left = CALLS
        return [result]
    _calls_left -= 1
    if check is not None:
        check()
    threads = torch.get_num_threads()
    outer, inner = (1, logits.shape[0]) if logits.ndim == 2 else logits.shape[:2]
    chunks = list(plan.row_chunks(outer, inner, -(-outer * inner // threads)))
    parts = [Part(i if logits.ndim == 2 else (b, r), i, len(chunks)) for b, r, i in chunks]
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def run(part: Part) -> Result:
        with mode():
            return of_part(part)

    futures = [_pool(threads).submit(run, part) for part in parts]
    wait(futures)  # also if one raises: no thread may write into the caller's memory after this call
    return [future.result() for future in futures]


def _worth_it(logits: Tensor) -> bool:
    large = logits.numel() >= LEAST_LOGITS and logits.device.type == "cpu"
    return large and 1 < torch.get_num_threads() <= MOST_THREADS and _uses_openmp()


@functools.cache
def _uses_openmp() -> bool:
    """With other libraries the number of threads belongs to the process, and not to each thread."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch's operations run alone.

    `torch.set_num_threads` says it for its own thread, and for threads that start later. For the latter, the caller
    says again what it was.
    """
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # which reads the setting for new threads once
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, thread_name_prefix=__name__, initializer=start)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):  # a forked child has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
