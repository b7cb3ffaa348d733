# SPDX-License-Identifier: Apache-2.0
"""Uninitialised buffers.

A CPU hands out memory in pages of 4 kB and spends more time on doing so, for a gradient of 200 MB, than the loss takes
to compute it. numpy asks Linux for pages of 2 MB, and torch does not (unless THP_MEM_ALLOC_ENABLE=1 is set).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

LARGE = 32 * 2**20  # bytes; what is smaller the allocator keeps and hands out again
ALIGNMENT = 64


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, on huge pages where that pays."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    raw = numpy.empty(size + ALIGNMENT, dtype=numpy.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)
