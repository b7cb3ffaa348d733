# SPDX-License-Identifier: Apache-2.0
"""How memory is walked: pure functions of shape, dtype, budget and device."""

from __future__ import annotations

from collections.abc import Iterator

# bytes of one fp32 buffer of rows that a chunk works on: the second-level cache of a core, and enough to fill a GPU
CPU_CACHE_PER_THREAD = 2**20
GPU_BUFFER = 64 * 2**20


def rows_per_chunk(num_classes: int, itemsize: int, device_type: str, threads: int, memory_budget: int | None) -> int:
    """Rows whose buffer stays in cache, at least one for each thread, and within the budget (never below one row)."""
    row = num_classes * itemsize
    if device_type == "cpu":
        rows = max(threads, CPU_CACHE_PER_THREAD * threads // row)
    else:
        rows = max(1, GPU_BUFFER // row)
    if memory_budget is not None:
        rows = min(rows, memory_budget // row)
    return max(1, rows)


def row_chunks(outer: int, inner: int, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cover (outer, inner) rows by chunks of at most `rows`, each a rectangle and a run of the flat rows.

    Yields (outer slice, inner slice, flat slice): whole outer indices where they are small, parts of one otherwise.
    """
    if inner == 0:
        return
    if inner <= rows:
        step = rows // inner
        for b in range(0, outer, step):
            e = min(b + step, outer)
            yield slice(b, e), slice(0, inner), slice(b * inner, e * inner)
        return
    for b in range(outer):
        for r in range(0, inner, rows):
            e = min(r + rows, inner)
            yield slice(b, b + 1), slice(r, e), slice(b * inner + r, b * inner + e)
