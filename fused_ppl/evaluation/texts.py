# SPDX-License-Identifier: Apache-2.0
"""Reads texts, one after another: files, folders, standard input, fields of .jsonl and .parquet."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fused_ppl.evaluation.records import Document, EvaluationError

ERRORS = ("strict", "replace")
SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".json", ".jsonl", ".parquet")  # of the files taken from a folder


def read_texts(
    paths: Sequence[str], *, field: str = "text", domain_field: str | None = None, errors: str = "strict"
) -> Iterator[Document]:
    """Every document of the paths, in their order; "-" is standard input. Empty documents are left out.

    Args:
        field: of a record of .jsonl or .parquet: its text.
        domain_field: of a record: the name of its domain. Without it a file is a domain.
        errors: "strict" refuses bytes that are not UTF-8; "replace" puts U+FFFD in their place and counts them.

    Raises:
        EvaluationError: a path does not exist, or is not text, or a field is missing.
    """
    for path in _files(paths):
        if path.suffix == ".jsonl":
            yield from _records(path.name, _json_lines(path, errors), field, domain_field=domain_field)
        elif path.suffix == ".parquet":
            yield from _records(path.name, _parquet(path), field, domain_field=domain_field)
        else:
            name = "stdin" if str(path) == "-" else str(path)
            data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
            text, replaced = decode(data, name, errors)
            if text:
                yield Document(name, text, name, replaced)


def decode(data: bytes, name: str, errors: str) -> tuple[str, int]:
    """The text, and the number of characters that stand for bytes that are not UTF-8."""
    if b"\0" in data[:8192]:
        raise EvaluationError(f"{name} must be a text; its beginning has a zero byte, as binary files have.")
    try:
        return data.decode(), 0
    except UnicodeDecodeError as error:
        if errors == "strict":
            raise EvaluationError(
                f"{name} must be UTF-8; byte {error.start} (0x{data[error.start]:02x}) is not. "
                'Convert it, or replace such bytes with errors="replace" (--errors replace).'
            ) from None
    text = data.decode(errors="replace")
    return text, text.count("�") - data.count("�".encode())


def _files(paths: Sequence[str]) -> Iterator[Path]:
    if not paths:
        raise EvaluationError("There must be at least one text; got none.")
    for name in paths:
        path = Path(name)
        if name == "-" or path.is_file():
            yield path
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
            if not found:
                raise EvaluationError(f"{name} must hold texts ({', '.join(SUFFIXES)}); it holds none.")
            yield from found
        else:
            raise EvaluationError(f"{name} must be a file, a folder, or - for standard input; it does not exist.")


def _json_lines(path: Path, errors: str) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(decode(line, f"{path.name}, line {number},", errors)[0])
                except json.JSONDecodeError as error:
                    raise EvaluationError(f"{path.name}, line {number}, must be JSON: {error}.") from None


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise EvaluationError(f"{path.name} needs pyarrow (pip install pyarrow).") from None
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(256):
        for record in batch.to_pylist():
            number += 1
            yield number, record


def _records(
    name: str, records: Iterator[tuple[int, object]], field: str, *, domain_field: str | None
) -> Iterator[Document]:
    for number, record in records:
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise EvaluationError(
                f"Record {number} of {name} must have a text in its field {field!r}; it has {keys}. Use --field."
            )
        if domain_field is not None and domain_field not in record:
            raise EvaluationError(
                f"Record {number} of {name} must have a field {domain_field!r}; it has {', '.join(record)}."
            )
        if record[field]:
            domain = name if domain_field is None else str(record[domain_field])
            yield Document(f"{name}:{number}", record[field], domain)
