# SPDX-License-Identifier: Apache-2.0
"""Uninitialised buffers that a CPU reuses from step to step.

A system hands out memory page by page, and may take longer over a gradient of 200 MB than the loss takes to compute
it; torch gives large buffers back at once and asks for them anew. Here they come from the system itself, which Linux is
asked to do in pages of 2 MB (torch does not ask, unless THP_MEM_ALLOC_ENABLE=1 is set), and when their last tensor is
gone they wait for the next step, as they do in torch's allocator for GPUs.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 32 * 2**20  # bytes; the C library itself reuses smaller blocks
IDLE_LIMIT = 2**31  # bytes of idle buffers that are kept at most
IDLE_REQUESTS = 16  # a buffer that was not reused for so many requests is freed

_idle: list[tuple[int, memoryview]] = []  # (number of the last request before it was idle, buffer), oldest first
_requests = 0
_lock = threading.RLock()  # reentrant: garbage collection may return a buffer while this thread holds the lock


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, least: int | None = None, brief: bool = False
) -> Tensor:
    """`torch.empty`, but from LARGE bytes on, or `least`, a CPU takes an idle buffer if one fits.

    `brief` says that the tensor lives for one call only, so that it may lie in a buffer that is much larger.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < (LARGE if least is None else least):
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _take(size, brief)
    lent = buffer[:size]  # a new object, which lives as long as the tensors over it
    weakref.finalize(lent, _give_back, buffer).atexit = False
    return torch.frombuffer(lent, dtype=dtype).view(shape)


def _take(size: int, brief: bool) -> memoryview:
    """The smallest idle buffer that fits, else a new one. Unless `brief`, it is at most a quarter larger."""
    global _requests
    with _lock:
        _requests += 1
        _idle[:] = [(since, buffer) for since, buffer in _idle if _requests - since <= IDLE_REQUESTS]
        fits = [
            i
            for i, (_, buffer) in enumerate(_idle)
            if size <= buffer.nbytes and (brief or buffer.nbytes <= size * 5 // 4)
        ]
        if fits:
            return _idle.pop(min(fits, key=lambda i: _idle[i][1].nbytes))[1]
    return memoryview(_pages(size))


def _pages(size: int) -> mmap.mmap:
    """New memory, which begins with a page."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _give_back(buffer: memoryview) -> None:
    with _lock:
        # it only appends, because garbage collection may call it inside _take, which holds indices
        if sum(b.nbytes for _, b in _idle) + buffer.nbytes <= IDLE_LIMIT:
            _idle.append((_requests, buffer))


def _after_fork() -> None:
    """A forked child starts with an empty pool and a lock that nobody holds."""
    global _lock
    _lock = threading.RLock()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
