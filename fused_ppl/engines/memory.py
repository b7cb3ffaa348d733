# SPDX-License-Identifier: Apache-2.0
"""Uninitialised buffers, kept from step to step on a CPU.

A system hands out memory page by page, and may take longer over a gradient of 200 MB than the loss takes to compute
it; torch gives large buffers back at once and asks for them anew. Here they come from numpy, which asks Linux for
pages of 2 MB (torch does not, unless THP_MEM_ALLOC_ENABLE=1 is set), and when their last tensor is gone they wait for
the next step, as they do in torch's allocator for GPUs.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

LARGE = 32 * 2**20  # bytes; what is smaller the allocator may keep and hand out again
IDLE_LIMIT = 2**31  # bytes that wait at most; more is given back
IDLE_REQUESTS = 16  # after so many others a buffer that fitted none is given back
ALIGNMENT = 64

_idle: list[tuple[int, numpy.ndarray]] = []  # (request that it began to wait after, buffer), oldest first
_requests = 0
_lock = threading.RLock()  # a buffer may come back, by garbage collection, while this thread holds it


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, least: int | None = None, brief: bool = False
) -> Tensor:
    """`torch.empty`, out of the buffers that wait where that pays: from LARGE on, or `least`. What lives for the length
    of a call is `brief`, and may lie in a buffer that is much larger."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < (LARGE if least is None else least):
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _take(size, brief)
    lent = buffer[:size]  # an object of its own, which lives as long as the tensors over it
    weakref.finalize(lent, _give_back, buffer).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def _take(size: int, brief: bool) -> numpy.ndarray:
    """The smallest buffer that fits, and is not much larger where it may be kept for long."""
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
    raw = numpy.empty(size + ALIGNMENT, dtype=numpy.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def _give_back(buffer: numpy.ndarray) -> None:
    with _lock:
        # appends only: collection may call it in the midst of _take, whose indices must hold
        if sum(b.nbytes for _, b in _idle) + buffer.nbytes <= IDLE_LIMIT:
            _idle.append((_requests, buffer))


def _after_fork() -> None:
    """In a child the lock may be held for ever, and to write to what waits would copy it."""
    global _lock
    _lock = threading.RLock()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
