# SPDX-License-Identifier: Apache-2.0
"""The rows of a record, gathered into one line for each provider; bench/report.py and bench/plots.py show them."""

from __future__ import annotations

from dataclasses import dataclass

from record import Row

AS_ACCURATE = 2.0  # an error up to so many times the other's is no worse: how far roundings scatter
VALUE_FLOOR = 2e-6  # nats: fp32's roundings of a loss of ten
GRADIENT_FLOOR = 2e-6


@dataclass(frozen=True)
class Line:
    """A provider in one table: what it takes on the first kind of inputs and on the second, memory, the worst error."""

    provider: str
    ours: bool
    times: tuple[Row, ...]  # one for each kind
    memory: Row | None

    @property
    def timed(self) -> tuple[Row, ...]:
        """None where it was refused on one kind of inputs."""
        return () if any(row.note for row in self.times) else self.times

    @property
    def note(self) -> str:
        rows = [row for row in (*self.times, self.memory) if row is not None and row.note]
        return rows[0].note if rows else ""

    @property
    def peak(self) -> int | None:
        return None if self.memory is None else self.memory.peak_bytes

    def errors(self) -> tuple[float, float] | None:
        rows = [row for row in (*self.times, self.memory) if row and row.value_error is not None]
        if not rows:
            return None
        return max(r.value_error or 0.0 for r in rows), max(r.gradient_error or 0.0 for r in rows)


Tables = dict[tuple[str, str, str], list[Line]]  # by op, case and dtype


def tables(rows: list[Row], mode: str = "both") -> Tables:
    """The lines of each op, case and dtype, the fastest first."""
    found: dict[tuple[str, str, str], dict[str, Line]] = {}
    for row in rows:
        lines = found.setdefault((row.op, row.case, row.dtype), {})
        line = lines.setdefault(row.provider, Line(row.provider, row.ours, (), None))
        if row.mode == "memory":
            lines[row.provider] = Line(row.provider, row.ours, line.times, row)
        elif row.mode == mode:
            lines[row.provider] = Line(row.provider, row.ours, (*line.times, row), line.memory)
    return {key: sorted(lines.values(), key=_order) for key, lines in found.items()}


def _order(line: Line) -> tuple[bool, float]:
    return line.provider != "bare", line.timed[0].median if line.timed and line.timed[0].median else float("inf")


def as_accurate(peer: Line, ours: Line) -> bool:
    """Whether the errors of a peer are no worse than ours."""
    theirs, own = peer.errors(), ours.errors()
    if theirs is None or own is None:
        return False
    floors = (VALUE_FLOOR, GRADIENT_FLOOR)
    return all(t <= max(AS_ACCURATE * o, floor) for t, o, floor in zip(theirs, own, floors, strict=True))
