# SPDX-License-Identifier: Apache-2.0
"""Chunk sizes, bytes and FLOPs: pure functions of shape, dtype, budget and device.

A chunk is as large as a cache or a budget allows, because small chunks read the weight more often.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fused_ppl.records import Compact, Needed

# Bytes of the buffer of a chunk of rows. On a CPU the buffer stays in the shared cache. Smaller buffers cost more
# barriers between threads, which are slow if other programs use the cores. On a GPU the buffer fills the device.
CPU_BUFFER_PER_THREAD = 2 * 2**20
CPU_BUFFER = 16 * 2**20
GPU_BUFFER = 64 * 2**20


def rows_per_chunk(
    num_classes: int, itemsize: int, device_type: str, *, threads: int, memory_budget: int | None
) -> int:
    """The rows of a chunk: the buffer stays in cache and within the budget, and every thread gets as many rows.

    A chunk has at least one row.
    """
    row = num_classes * itemsize
    if device_type == "cpu":
        rows = min(CPU_BUFFER_PER_THREAD * threads, CPU_BUFFER) // row
        rows = max(1, rows // threads) * threads
    else:
        rows = max(1, GPU_BUFFER // row)
    if memory_budget is not None:
        rows = min(rows, memory_budget // row)
    return max(1, rows)


def row_chunks(outer: int, inner: int, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cover (outer, inner) rows by chunks of at most `rows`. A chunk is a rectangle, and consecutive in the flat rows.

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


# Each chunk of the fused LM head reads the weight once, and reads and writes its gradient once. Chunks of fewer rows
# spend too much of their time on that. The keys are bytes per element: bf16 products are faster and need more rows.
MIN_ROWS = {"cpu": {2: 512, 4: 128, 8: 128}, "gpu": {2: 1024, 4: 1024, 8: 1024}}
MAX_ROWS = {"cpu": 1024, "gpu": 8192}
CHUNK_BYTES = {"cpu": 256 * 2**20, "gpu": 512 * 2**20}
COLUMNS = 8192  # of a slice of the vocabulary, at most
LEAST_COLUMNS = 256
CONVERTED = 4096  # classes of the weight that float32 products convert at once: they stay in cache


# Maximum rows in a group. Smaller groups keep fewer columns, but read and write the weight more often. Products of
# larger groups are slow in bf16 on a CPU.
GROUP_ROWS = {"cpu": 640, "gpu": 1024}
MOST_COLUMNS = 4  # a group keeps at most 1 / 4 of the vocabulary, because more columns save little time


def kept_columns(compact: Compact, num_classes: int) -> int:
    """The largest number of columns that a group keeps."""
    columns = compact.gradient_columns
    if columns is None:
        return max(1, num_classes // MOST_COLUMNS)
    return max(1, min(num_classes, int(columns if columns >= 1 else columns * num_classes)))


@dataclass(frozen=True)
class LinearCase:
    """What a plan of the fused LM head depends on."""

    num_tokens: int  # N
    num_classes: int  # V
    hidden_size: int  # D
    itemsize: int  # of the dtype of the products
    device_type: str
    grads: Needed  # whether hidden states, weight and bias need a gradient
    memory_budget: int | None = None
    compact: Compact | None = None
    converts: bool = False  # whether the products have another dtype than the weight, as under autocast
    teacher_size: int = 0  # hidden size of a second head whose logits of a chunk exist at the same time, else 0
    teacher_itemsize: int = 0

    @property
    def converted_bytes(self) -> int:
        """Bytes of the converted weight, or of the part that is converted at once; 0 if it needs no conversion."""
        if not self.converts:
            return 0
        columns = converted_columns(self.num_classes, self.hidden_size, self.itemsize, self.memory_budget)
        return columns * self.hidden_size * self.itemsize

    @property
    def place(self) -> str:
        return "cpu" if self.device_type == "cpu" else "gpu"

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of the float32 gradients of weight and bias."""
        _, grad_weight, grad_bias = self.grads
        return max(4, self.itemsize) * self.num_classes * ((self.hidden_size if grad_weight else 0) + int(grad_bias))


@dataclass(frozen=True)
class LinearPlan:
    """The chunk sizes of the fused LM head, with its bytes and FLOPs."""

    kind: str  # "rows", "compact", "vocab" or "forward"
    rows: int  # in a chunk of logits in forward
    columns: int  # in a slice of the vocabulary in backward, or kept by "compact"; else 0
    temporary_bytes: int  # buffers of forward or of backward, whichever holds more
    saved_bytes: int  # kept from forward to backward
    flops: int
    reason: str
    peak_bytes: int  # the most that is held at once, including the returned gradients
    cheap_flops: int = 0  # of the screen, in low precision
    group: int = 0  # rows that share their kept columns
    cache_bytes: int = 0  # at most, beside peak_bytes: a CPU's threads convert rows in buffers that stay in cache

    def explain(self) -> str:
        """Say the choice in words and numbers. Memory is a range where it depends on the number of threads."""
        walk = f"{self.rows} rows at a time"
        if self.group:
            walk += f", at most {self.columns} columns kept for each {self.group} of them"
        elif self.columns:
            walk += f", backward in slices of {self.columns} columns"
        peak = f"at most {self.peak_bytes / 2**20:.0f}"
        if self.cache_bytes:
            peak = f"{self.peak_bytes / 2**20:.0f} to {(self.peak_bytes + self.cache_bytes) / 2**20:.0f}"
        cheap = f" and {self.cheap_flops / 1e9:.1f} GFLOP of the screen" if self.cheap_flops else ""
        return (
            f"plan {self.kind}: {walk}; {self.reason}. {self.temporary_bytes / 2**20:.0f} MiB temporary, "
            f"{self.saved_bytes / 2**20:.0f} MiB from forward to backward, {peak} MiB with the gradients, "
            f"{self.flops / 1e9:.1f} GFLOP{cheap}."
        )


def _within(wanted: int, room: int, size: int, least: int) -> int:
    """How many items of `size` bytes fit into `room`, at most `wanted`.

    If not even one fits, the budget cannot be met; use `least`, because smaller chunks are much slower.
    """
    return min(wanted, room // size) if room >= size else min(wanted, least)


def converted_columns(num_classes: int, hidden_size: int, itemsize: int, memory_budget: int | None) -> int:
    """The classes of the weight that are converted at once.

    All are, because every chunk of rows needs them, unless they take over half of the budget. Conversion to float32 is
    fast: there only as many are converted as stay in cache.
    """
    column = max(1, hidden_size * itemsize)
    most = num_classes if itemsize == 2 else min(num_classes, CONVERTED)
    if memory_budget is None or 2 * most * column <= memory_budget:
        return most
    return _within(min(most, CONVERTED), memory_budget // 4, column, LEAST_COLUMNS)


def _even(rows: int, n: int) -> int:
    """The rows of n / ceil(n / rows) equal chunks, so that the last chunk is as large as the others."""
    return math.ceil(n / math.ceil(n / rows)) if n else rows


def linear_kind(case: LinearCase, per_token: bool) -> str:
    """The kind of plan. It never depends on N, which torch.compile may not know.

    `per_token`: the upstream gradient of a token is known only in backward.
    """
    if not any(case.grads):
        return "forward"
    if per_token:
        return "vocab"
    if case.memory_budget is not None:
        chunk = MIN_ROWS[case.place][case.itemsize] * case.num_classes * case.itemsize
        if case.accumulator_bytes + chunk + case.converted_bytes > case.memory_budget:
            return "vocab"
    return "rows" if case.compact is None else "compact"


def linear_plan(case: LinearCase, kind: str) -> LinearPlan:
    """The chunk sizes of a kind of plan, within the budget if that is possible."""
    n, v, d, size = case.num_tokens, case.num_classes, case.hidden_size, case.itemsize
    wide, product = max(4, size), 2 * n * v * d
    least, most = MIN_ROWS[case.place][size], MAX_ROWS[case.place]
    screened = kind == "compact" and case.compact is not None and case.compact.screen is not None
    logit = (2 if screened else size) + case.teacher_itemsize
    rows = CHUNK_BYTES[case.place] // (v * logit)
    if case.place == "cpu":
        # A buffer over half of the size of the weight's float32 gradient costs more memory than it saves time. With a
        # screen a larger buffer is worth it, and so it is for the buffers of two heads.
        rows = min(rows, int(wide * d / (logit * (1 if screened else 1.5 if case.teacher_itemsize else 2))))
    elif case.grads[1] and kind == "rows":
        # Each chunk reads and writes the weight's gradient. A buffer of half of its size is worth it.
        rows = max(rows, wide * d // (2 * logit))
    rows = min(max(rows, least), most)
    made_in_forward = kind in ("rows", "compact")
    saved = case.accumulator_bytes + wide * n * d * case.grads[0] if made_in_forward else 2 * wide * n
    reasons = {
        "forward": "nothing requires a gradient",
        "rows": "one upstream gradient for all tokens, so the gradients are made in forward",
        "compact": "the gradient of the logits is its largest columns and a product of sums for the rest",
        "vocab": "backward recomputes the logits: per-token upstream gradients, or too little memory for the "
        "fp32 gradient of the weight",
    }
    weight = case.converted_bytes
    reason, columns, backward, fixed = reasons[kind], 0, 0, wide * n * d * case.grads[0] + weight
    if kind == "vocab":
        column = n * size + d * size * (case.converts and case.grads[1])  # a product that is rounded into dW
        columns = max(1, min(COLUMNS, v, CHUNK_BYTES[case.place] // max(1, n * size)))
        if case.memory_budget is not None:
            columns = _within(columns, case.memory_budget - fixed, max(1, column), LEAST_COLUMNS)
        backward = fixed + columns * column
    if case.memory_budget is not None:
        rows = _within(rows, case.memory_budget - weight - (saved if made_in_forward else 0), v * logit, least)
    rows = max(1, min(rows, n))
    if case.place == "cpu":
        rows = _even(rows, n)
    temporary = max(rows * v * logit + weight, backward)
    # an accumulator of the right dtype is returned itself; another one is held until the gradient is there
    gradients = size * d * (n * case.grads[0] + v * case.grads[1]) if not made_in_forward or wide != size else 0
    if kind == "compact":
        return _compact_plan(case, rows, saved=saved, handed_over=gradients, reason=reason)
    at_once = max(rows * v * logit + weight, backward + gradients)
    if kind == "vocab":  # backward reuses the buffer of forward if it is large enough
        at_once = fixed + max(rows * v * logit, columns * column) + gradients
    products = {"forward": 1, "rows": 1, "vocab": 2}[kind] + case.grads[0] + case.grads[1]
    reason += _over(case, temporary + saved)
    flops = product * products + 2 * n * v * case.teacher_size
    # float32 logits are overwritten by their gradient, and need no such buffer
    copies = case.place == "cpu" and (size == 2 or kind == "forward")
    cache = min(CPU_BUFFER, rows * v * wide) if copies else 0
    return LinearPlan(kind, rows, columns, temporary, saved, flops, reason, saved + at_once, cache_bytes=cache)


def _over(case: LinearCase, size: int) -> str:
    if case.memory_budget is None or size <= case.memory_budget:
        return ""
    return f", over the budget of {case.memory_budget / 2**20:.0f} MiB: its fixed part alone does not fit"


def _compact_plan(case: LinearCase, rows: int, *, saved: int, handed_over: int, reason: str) -> LinearPlan:
    """The chunks of plan "rows", cut into equal groups of about GROUP_ROWS: 2NVD FLOPs, and 2NKD for each gradient."""
    assert case.compact is not None
    n, v, d, size = case.num_tokens, case.num_classes, case.hidden_size, case.itemsize
    gradients, screened = case.grads[0] + case.grads[1], case.compact.screen is not None
    group = math.ceil(rows / math.ceil(rows / GROUP_ROWS[case.place]))
    count = kept_columns(case.compact, v)
    if case.compact.gradient_tolerance is None:
        count = max(count, min(group, v))  # the targets are kept
    # the chunk of logits; the kept columns of the weight, of the group's logits and of the product for dW; column sums
    buffers = rows * v * (2 if screened else size) + count * (d + group * (1 + screened)) * size
    buffers += max(4, size) * v * (math.ceil(n / group) + 4) + case.converted_bytes
    flops = 2 * n * count * d * (gradients + screened)
    dense = 2 * n * v * d
    if screened:
        saved += v * d * (2 if case.compact.screen == "bf16" else 1)
    peak = saved + max(buffers, handed_over)
    reason += _over(case, buffers + saved)  # the chunk is the one of "rows", so the loss has the same bits
    flops, cheap = (flops, dense) if screened else (dense + flops, 0)
    return LinearPlan("compact", rows, count, buffers, saved, flops, reason, peak, cheap, group)


def whole_chunks(group: int, row_bytes: int, case: LinearCase, threads: int) -> int:
    """The next multiple of the backend's chunk: the result of a row then does not depend on its group."""
    step = rows_per_chunk(
        case.num_classes, row_bytes, case.device_type, threads=threads, memory_budget=case.memory_budget
    )
    return math.ceil(group / step) * step
