# SPDX-License-Identifier: Apache-2.0
"""The divergence from a teacher that names only its K most likely classes of each token, by chunks of rows.

What such a teacher says of all classes stands in `backends.top_k`. With the tail merged, a copy of the student's logits
becomes a prediction over K + 1 classes, and then the gradient. With the tail dropped that is so, too: all classes that
the teacher excludes have together what they have one by one, sum p log(p / m) with m = (1 - beta) p. With the tail
spread, and for statistics, a chunk of the teacher's logits is written, and compared as those of any teacher are.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from fused_ppl import plan, reduction
from fused_ppl.backends.top_k import Named, gradient_of_all, merge, named_classes, write_logits
from fused_ppl.backends.torch_chunks import chain, transform
from fused_ppl.engines import memory
from fused_ppl.engines.comparison import Comparison
from fused_ppl.records import Divergence, DivergenceStats, Teacher, TokenInputs
from fused_ppl.spec import LossSpec

TEACHER_BUFFER = 64 * 2**20  # bytes of the teacher's logits that are written at once
_IGNORED = -100

Rows: TypeAlias = tuple[Tensor, Tensor]  # ids and log-probabilities, (N, K)


def rows_of(teacher: Teacher) -> Rows:
    ids, log_probs = teacher.teacher_ids, teacher.teacher_log_probs
    assert ids is not None and log_probs is not None
    return ids.reshape(-1, ids.shape[-1]), log_probs.reshape(-1, ids.shape[-1])


def named_by(teacher: Rows, tokens: TokenInputs, how: Comparison, *, num_classes: int, dtype: torch.dtype) -> Named:
    """The named classes of all rows.

    A sum of rounded probabilities may be 1, and a KL(p || q) with nothing in the tail would be inf. So there the tail
    has at least as much as the rounding of such a sum.
    """
    ids, log_probs = teacher
    least = torch.finfo(dtype).eps if how.asked.direction == "reverse" else 0.0
    named = named_classes(ids, log_probs.to(dtype), tokens, how.spec, num_classes=num_classes, least=least)
    if how.asked.tail == "drop":
        return named._replace(log_rest=torch.full_like(named.log_rest, -torch.inf))
    return named


def compare_named(
    logits: Tensor, named: Named, tokens: TokenInputs, how: Comparison, *, upstream: Tensor | None, out: Tensor | None
) -> DivergenceStats:
    """As `Comparison.of_logits`, with the named classes in the place of the teacher's logits."""
    shape, v, dtype = (1, *logits.shape)[-3:-1], logits.shape[-1], reduction.wide_dtype(logits.dtype)
    step = _Written if how.asked.tail == "spread" or how.spec.stats else _Merged
    rows = min(step.rows(v, dtype, how, logits.device), max(1, shape[0] * shape[1]))
    chunk = step(memory.empty((rows, v), dtype, logits.device), how)
    parts = []
    for b, r, i in plan.row_chunks(shape[0], shape[1], rows):
        place = i if logits.ndim == 2 else (b, r)
        weight = tokens.token_weight
        here = TokenInputs(tokens.target[i], None, None if weight is None else weight[i])
        of_rows = upstream if upstream is None or upstream.ndim == 0 else upstream[i]
        into = None if out is None else out[place]
        parts.append(chunk.compare(logits[place], named.of(i), here, upstream=of_rows, out=into))
    if not parts:
        none = logits.new_zeros(0, dtype=dtype)
        return DivergenceStats(none, none.clone(), none.clone(), none.bool(), none.clone())
    return DivergenceStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Written:
    """The teacher's logits over all classes."""

    def __init__(self, buffer: Tensor, how: Comparison) -> None:
        self.buffer, self.how = buffer, how

    @staticmethod
    def rows(v: int, dtype: torch.dtype, how: Comparison, device: torch.device) -> int:
        size = TEACHER_BUFFER if how.memory_budget is None else min(TEACHER_BUFFER, how.memory_budget)
        return max(1, size // (v * dtype.itemsize))

    def compare(
        self, logits: Tensor, named: Named, tokens: TokenInputs, *, upstream: Tensor | None, out: Tensor | None
    ) -> DivergenceStats:
        teacher = self.buffer[: tokens.target.shape[0]]
        write_logits(teacher, named)
        return self.how.of_logits(logits, teacher.view(logits.shape), tokens, upstream=upstream, out=out)


class _Merged:
    """The named classes, and one class for all others."""

    def __init__(self, buffer: Tensor, how: Comparison) -> None:
        self.buffer, self.spec = buffer, how.spec
        self.slope = torch.empty_like(buffer) if how.spec.softcap is not None else None
        ignore_index = None if how.spec.ignore_index is None else _IGNORED
        asked = Divergence(how.asked.direction, how.asked.beta, 1.0, None)
        plain = LossSpec(reduction="none", ignore_index=ignore_index)  # z needs no transform
        self.of_classes = Comparison(plain, asked, how.backend, how.memory_budget)

    @staticmethod
    def rows(v: int, dtype: torch.dtype, how: Comparison, device: torch.device) -> int:
        row, threads = dtype.itemsize * (1 if how.spec.softcap is None else 2), torch.get_num_threads()
        return plan.rows_per_chunk(v, row, device.type, threads=threads, memory_budget=how.memory_budget)

    def compare(
        self, logits: Tensor, named: Named, tokens: TokenInputs, *, upstream: Tensor | None, out: Tensor | None
    ) -> DivergenceStats:
        n = tokens.target.shape[0]
        z, slope = self.buffer[:n], None if self.slope is None else self.slope[:n]
        z.view(logits.shape).copy_(logits)
        transform(z, self.spec, slope)
        merged = merge(z, named)
        gradient = None if upstream is None else torch.empty_like(merged.logits)
        of_class = torch.zeros_like(tokens.target)  # over K + 1 classes it says only which tokens count
        if self.spec.ignore_index is not None:
            of_class = of_class.masked_fill_(tokens.target == self.spec.ignore_index, _IGNORED)
        found = self.of_classes.of_logits(
            merged.logits,
            torch.cat((named.log_q, named.log_rest.unsqueeze(1)), 1),
            TokenInputs(of_class, None, tokens.token_weight),
            upstream=upstream,
            out=gradient,
        )
        if gradient is None or out is None:
            return found
        of_all = gradient_of_all(merged, gradient, named)
        chain(of_all, self.spec, slope)
        if self.spec.ignore_index is not None:  # the logits of an ignored row may be NaN
            of_all.masked_fill_((of_class == _IGNORED).unsqueeze(1), 0)
        out.copy_(of_all.view(out.shape))
        return found
