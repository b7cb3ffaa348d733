# SPDX-License-Identifier: Apache-2.0
"""Reads texts, one after another: files, folders, standard input, fields of .jsonl and .parquet."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fused_ppl.evaluation.records import Document, EvaluationError

ERRORS = ("strict", "replace")
_Numbered = tuple[int, object, int]  # the number of a record, the record, and replaced characters
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
            yield from _records(str(path), _json_lines(path, errors), field, domain_field=domain_field, errors=errors)
        elif path.suffix == ".parquet":
            yield from _records(str(path), _parquet(path), field, domain_field=domain_field, errors=errors)
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


def _json_lines(path: Path, errors: str) -> Iterator[_Numbered]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                text, replaced = decode(line, f"{path}, line {number},", errors)
                try:
                    yield number, json.loads(text), replaced
                except json.JSONDecodeError as error:
                    raise EvaluationError(f"{path}, line {number}, must be JSON: {error}.") from None


def _parquet(path: Path) -> Iterator[_Numbered]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise EvaluationError(f"{path.name} needs pyarrow (pip install pyarrow).") from None
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(256):
        for record in batch.to_pylist():
            number += 1
            yield number, record, 0


def _records(
    name: str, records: Iterator[_Numbered], field: str, *, domain_field: str | None, errors: str
) -> Iterator[Document]:
    for number, record, replaced in records:
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise EvaluationError(
                f"Record {number} of {name} must have a text in its field {field!r}; it has {keys}. Use --field."
            )
        if domain_field is not None and domain_field not in record:
            raise EvaluationError(
                f"Record {number} of {name} must have a field {domain_field!r}; it has {', '.join(record)}."
            )
        text, surrogates = _without_surrogates(record[field], f"Record {number} of {name}", errors)
        if text:
            domain = name if domain_field is None else str(record[domain_field])
            yield Document(f"{name}:{number}", text, domain, replaced + surrogates)


def _without_surrogates(text: str, name: str, errors: str) -> tuple[str, int]:
    """JSON may hold halves of surrogate pairs, which are no characters and have no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise EvaluationError(
                f"{name} must be text; character {error.start} is half of a surrogate pair. Mend it, or replace it "
                'with errors="replace" (--errors replace).'
            ) from None
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return clean, clean.count("\ufffd") - text.count("\ufffd")
    return text, 0
