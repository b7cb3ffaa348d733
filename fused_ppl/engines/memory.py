# SPDX-License-Identifier: Apache-2.0
"""Uninitialised buffers, kept from step to step on a CPU.

A system hands out memory page by page, and may take longer over a gradient of 200 MB than the loss takes to compute
it; torch gives large buffers back at once and asks for them anew. Here they come from numpy, which asks Linux for
pages of 2 MB (torch does not, unless THP_MEM_ALLOC_ENABLE=1 is set), and when their last tensor is gone they wait for
the next step, as they do in torch's allocator for GPUs.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

LARGE = 32 * 2**20  # bytes; what is smaller the allocator keeps and hands out again
IDLE_LIMIT = 2**30  # bytes that wait at most
SLACK = 4  # a buffer serves a request of a quarter of its size: the chunk of forward, then a gradient in backward
ALIGNMENT = 64

_idle: list[numpy.ndarray] = []
_lock = threading.RLock()  # a buffer may come back, by garbage collection, while this thread holds it


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, out of the buffers that wait where that pays."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _take(size)
    lent = buffer[:size]  # an object of its own, which lives as long as the tensors over it
    weakref.finalize(lent, _give_back, buffer).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def _take(size: int) -> numpy.ndarray:
    """The smallest buffer that fits. Where none does the others make room, so that waiting raises no peak."""
    with _lock:
        fits = [i for i, buffer in enumerate(_idle) if size <= buffer.nbytes <= SLACK * size]
        if fits:
            return _idle.pop(min(fits, key=lambda i: _idle[i].nbytes))
        _idle.clear()
    raw = numpy.empty(size + ALIGNMENT, dtype=numpy.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def _give_back(buffer: numpy.ndarray) -> None:
    with _lock:
        if sum(b.nbytes for b in _idle) + buffer.nbytes <= IDLE_LIMIT:
            _idle.append(buffer)
