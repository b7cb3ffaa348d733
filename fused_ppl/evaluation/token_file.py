# SPDX-License-Identifier: Apache-2.0
"""A file with a line for every scored token, which a killed and resumed run continues."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from fused_ppl.evaluation.records import EvaluationError, TokenRow

SUFFIXES = (".jsonl", ".parquet")


class TokenFile:
    """Writes `TokenRow`s as JSON lines, and at its end as Parquet if the name says so.

    Use it as a context manager, and give it to `evaluate` as `per_token`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise EvaluationError(f"The file of the tokens must end in {' or '.join(SUFFIXES)}; got {self.path.name}.")
        if self.path.suffix == ".parquet":
            _pyarrow(self.path)
        self.lines = self.path if self.path.suffix == ".jsonl" else self.path.with_name(self.path.name + ".lines")
        if self.path.suffix == ".parquet" and self.path.exists() and not self.lines.exists():
            _from_parquet(self.path, self.lines)  # a finished run that is run again
        # a line is written at once, so that a killed run has it
        self.file = self.lines.open("a+", buffering=1, encoding="utf-8")

    def keep(self, count: int) -> None:
        """Drop all but the first `count` lines, which an earlier run had handed over when it saved its state."""
        self.file.seek(0)
        for number in range(count):
            if not self.file.readline().endswith("\n"):
                raise EvaluationError(
                    f"{self.lines} must have the {count} tokens that the state file knows; it has {number}. Delete the "
                    "state file to start from the beginning."
                )
        self.file.truncate(self.file.tell())
        self.file.seek(0, 2)

    def __call__(self, row: TokenRow) -> None:
        self.file.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.file.close()
        if kind is None and self.path.suffix == ".parquet":
            _to_parquet(self.lines, self.path)
            self.lines.unlink()


def _to_parquet(lines: Path, path: Path) -> None:
    arrow, parquet = _pyarrow(path)
    writer = None
    with lines.open(encoding="utf-8") as file:
        while batch := [json.loads(line) for line in itertools.islice(file, 65536)]:
            table = arrow.Table.from_pylist(batch)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    if writer is not None:
        writer.close()


def _from_parquet(path: Path, lines: Path) -> None:
    _, parquet = _pyarrow(path)
    with lines.open("w", encoding="utf-8") as file:
        for batch in parquet.ParquetFile(path).iter_batches():
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise EvaluationError(f"{path.name} needs pyarrow (pip install pyarrow). A .jsonl file does not.") from None
    return pyarrow, pyarrow.parquet
