# SPDX-License-Identifier: Apache-2.0
"""A page that shows an evaluation: its number, and the text coloured by the bits of its tokens.

The page is one file without a network. All that comes from the text is JSON, which a script of the page puts into text
nodes; nothing of it is read as HTML. The charts are drawn here, from sums that are kept of all scored tokens.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fused_ppl.evaluation import tokens as tokenization
from fused_ppl.evaluation.records import BLOCK, Document, EvaluationError, TokenRow, Tokens
from fused_ppl.evaluation.result import Evaluation
from fused_ppl.evaluation.run import SEPARATOR, documents_of
from fused_ppl.evaluation.statistics import LN2, Interval, power_of_2

COLOURS = 16  # one for each bit, the last for all above
POINTS = 512  # of the running perplexity, at least
STRETCHES, LEAST_STRETCH = 64, 16  # of the text, whose perplexity is drawn; tokens of each
BARS = 32  # of the histogram
FINE, MOST_BITS = 4, 64  # counts a bit that are kept for it, and where they end
REPLACEMENT = "\ufffd"  # what decodes in the place of a part of a character
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Report:
    """Collects the tokens of an evaluation while it runs, then writes the page.

    Example::

        report = Report(tokenizer)
        evaluation = evaluate(model, tokenizer, texts, per_token=report.add, alternatives=5)
        report.write("report.html", evaluation, texts)
    """

    def __init__(self, tokenizer: Any, most_bytes: int = 65536) -> None:
        """`most_bytes` of the text are shown, from its beginning. The numbers and charts are about all of it.

        Raises:
            EvaluationError: Jinja2 is missing.
        """
        self.template = _template()
        self.tokenizer, self.most_bytes = tokenizer, most_bytes
        self.kept: list[list[TokenRow]] = []  # of each document with a scored token, up to `most_bytes`
        self.running, self.counts = Running(), np.zeros(FINE * MOST_BITS, dtype=np.int64)
        self.num_with_bytes = 0
        self.before, self.fits = 0, True  # characters before this document, at least; whether it goes on the page
        self.last: TokenRow | None = None

    def add(self, row: TokenRow) -> None:
        """Take a scored token; give this to `evaluate` as `per_token`."""
        last, self.last = self.last, row
        new = last is None or row.document != last.document or row.position <= last.position
        if new:
            self.before += 0 if last is None else last.start + 1
        # characters are never more than bytes, so this keeps enough; the page is cut where its bytes end
        self.fits = (new or self.fits) and self.before + row.start < self.most_bytes
        if self.fits:
            if new:
                self.kept.append([])
            self.kept[-1].append(row)
        self.running.add(row.nll)
        self.counts[min(int(row.nll / LN2 * FINE), FINE * MOST_BITS - 1)] += 1
        self.num_with_bytes += row.num_bytes > 0

    def write(self, path: str | Path, evaluation: Evaluation, texts: Iterable[str | Document]) -> None:
        """Write the page of an evaluation, whose texts are read once more.

        Raises:
            EvaluationError: the tokens or the texts are not those of the evaluation.
        """
        # special tokens do not count there
        count = self.num_with_bytes if evaluation.convention.decoded else self.running.count
        if count != evaluation.total.tokens:
            raise EvaluationError(
                f"The report must have all {evaluation.total.tokens} tokens of the evaluation; it has {count}. Give "
                "report.add of a new Report to evaluate as per_token, and no state file."
            )
        shown, num_bytes = self.shown(evaluation, texts)
        words = Words()
        content = [text.to_dict(words) for text in shown]
        page = self.template.render(
            e=evaluation,
            headline=evaluation.headline,
            interval=evaluation.headline_interval,
            data={"texts": content, **words.to_dict(self.tokenizer)},
            shown_bytes=num_bytes,
            running=self.running.chart(),
            histogram=histogram(self.counts),
            colours=COLOURS,
            block=BLOCK,
        )
        # a file name that is not UTF-8 must not lose the page
        Path(path).write_text(page, encoding="utf-8", errors="replace", newline="\n")

    def shown(self, evaluation: Evaluation, texts: Iterable[str | Document]) -> tuple[list[Shown], int]:
        """The texts up to `most_bytes`, cut into tokens, and how many bytes they have."""
        text_hash, segments, found, room = hashlib.sha256(), list(self.kept), list[Shown](), self.most_bytes
        for document in documents_of(texts):
            text_hash.update(document.text.encode() + SEPARATOR)
            if room <= 0:
                continue
            tokens = tokenization.tokenize(self.tokenizer, document.text, document.name)
            if evaluation.settings.max_tokens is not None:
                tokens = tokens.first(evaluation.settings.max_tokens)
            rows: dict[int, TokenRow] = {}
            if segments and belongs(segments[0], document, tokens):
                rows = {row.position: row for row in segments.pop(0)}
            text = cells_of(document, tokens, room)
            text.rows = [rows.get(i) for i in range(len(text.ids))]
            room = 0 if text.cut else room - text.num_bytes
            if text.cells:
                found.append(text)
        if text_hash.hexdigest()[:12] != evaluation.text_hash:
            raise EvaluationError("The texts of the report must be those of the evaluation; their hashes differ.")
        return found, sum(text.num_bytes for text in found)


def belongs(rows: list[TokenRow], document: Document, tokens: Tokens) -> bool:
    """Whether these are the scored tokens of a document. Two documents may have one name."""
    where = [row.position for row in rows]
    if rows[0].document != document.name or where[-1] >= len(tokens.ids):
        return False
    return bool((tokens.ids[where] == [row.id for row in rows]).all())


# --- the text --------------------------------------------------------------------------------------------------------


class Words:
    """The tokens that the page names, each once."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}

    def place(self, token: int) -> int:
        return self.places.setdefault(token, len(self.places))

    def to_dict(self, tokenizer: Any) -> dict[str, Any]:
        ids = list(self.places)
        if not ids:
            return {"ids": [], "words": []}
        decoded = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        raw = tokenizer.convert_ids_to_tokens(ids)
        return {"ids": ids, "words": [word(*pair) for pair in zip(raw, decoded, strict=True)]}


def word(raw: str | None, decoded: str) -> str | list[int] | None:
    """A token as text, or as bytes if it is a part of a character; None if the tokenizer does not know it."""
    if raw is None:
        return None
    if REPLACEMENT in decoded and REPLACEMENT not in raw:
        byte = BYTE_TOKEN.fullmatch(raw)
        spelled = bytes([int(byte[1], 16)]) if byte else tokenization.bytes_of_word(raw)
        return decoded if spelled is None else list(spelled)
    # a decoder drops the space before the first word
    return " " + decoded if raw.startswith("▁") and not decoded.startswith(" ") else decoded


@dataclass
class Shown:
    """A text on the page. A cell is one token, or the tokens that share a character."""

    name: str
    domain: str
    cells: list[str]  # their join is the text
    counts: list[int]  # tokens of each cell
    ids: list[int]  # of each token
    num_bytes: int
    cut: bool  # the text goes on
    rows: list[TokenRow | None]  # None where a token is not scored

    def to_dict(self, words: Words) -> dict[str, Any]:
        """Columns; `parts` has the cells of several tokens. Bits, and probabilities in 1/10000."""
        rows = self.rows
        return {
            "name": self.name,
            "domain": self.domain,
            "cells": self.cells,
            "parts": [[i, count] for i, count in enumerate(self.counts) if count > 1],
            "word": [words.place(i) for i in self.ids],
            "bits": [None if r is None else max(0.0, round(r.nll / LN2, 4)) for r in rows],
            "entropy": [None if r is None or not math.isfinite(r.entropy) else round(r.entropy / LN2, 3) for r in rows],
            "rank": [None if r is None else r.rank for r in rows],
            "likely": [[] if r is None else likely(r, words) for r in rows],
        }


def likely(row: TokenRow, words: Words) -> list[int | None]:
    """The most likely tokens, each followed by its probability if that is known."""
    if not row.alternatives:
        return [words.place(row.predicted), None]
    return [x for token, p in row.alternatives for x in (words.place(token), round(10000 * p))]


def cells_of(document: Document, tokens: Tokens, most_bytes: int) -> Shown:
    """The cells of a text, as many as fit. A cell ends where a character and a token end."""
    data = document.text.encode()
    leads = np.append((np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80, True)  # a character begins at this byte
    ends = np.cumsum(tokens.num_bytes)
    # a token without bytes goes with the one before it
    whole = leads[ends] & (np.append(tokens.num_bytes[1:], 1) > 0) & (ends > 0)
    whole[-1] = True  # the last of `max_tokens` may end within a character
    last = np.flatnonzero(whole)
    stops = [int(ends[i] + np.argmax(leads[ends[i] :])) for i in last[ends[last] <= most_bytes]]
    if stops and stops[-1] > most_bytes:
        stops.pop()
    last = last[: len(stops)]
    count = int(last[-1]) + 1 if len(last) else 0
    return Shown(
        document.name,
        document.domain,
        cells=[data[i:j].decode() for i, j in zip([0, *stops], stops, strict=False)],
        counts=np.diff(last, prepend=-1).tolist(),
        ids=tokens.ids[:count].tolist(),
        num_bytes=stops[-1] if stops else 0,
        cut=count < len(tokens.ids),
        rows=[],
    )


# --- charts ----------------------------------------------------------------------------------------------------------


class Tick(NamedTuple):
    at: float  # percent of the axis, from the left or from the top
    label: str


@dataclass
class Running:
    """Sums of the nll along the text, at places that grow further apart."""

    count: int = 0
    total: float = 0.0
    step: int = 1

    def __post_init__(self) -> None:
        self.sums: list[float] = []  # after each `step` tokens

    def add(self, nll: float) -> None:
        self.count += 1
        self.total += nll
        if self.count % self.step == 0:
            self.sums.append(self.total)
            if len(self.sums) == 2 * POINTS:
                self.sums, self.step = self.sums[1::2], 2 * self.step

    def chart(self) -> dict[str, Any]:
        """Two lines over the tokens: the perplexity up to a place, and of each stretch. The scale is logarithmic."""
        counts = self.step * np.arange(1, len(self.sums) + 1)
        sums = np.asarray(self.sums)
        if self.count % self.step:
            counts, sums = np.append(counts, self.count), np.append(sums, self.total)
        # the first tokens alone tell little, and would fill the axis
        start = int(np.argmax(counts >= min(self.count, LEAST_STRETCH)))
        bits = sums / counts / LN2
        every = max(math.ceil(LEAST_STRETCH / self.step), math.ceil(len(self.sums) / STRETCHES))
        edges, at_edges = np.append(0, counts[every - 1 :: every]), np.append(0, sums[every - 1 :: every])
        of_stretch = np.diff(at_edges) / np.diff(edges) / LN2
        seen = np.concatenate([bits[start:], of_stretch]).clip(0, 1000)
        margin = max(0.05, 0.05 * float(np.ptp(seen)))
        low, high = float(seen.min()) - margin, float(seen.max()) + margin

        def path(x: NDArray[Any], y: NDArray[np.float64]) -> str:
            across, down = 1000 * x / self.count, 1000 * (high - y.clip(0, 1000)) / (high - low)
            points = [f"{a:.5g},{d:.5g}" for a, d in zip(across.tolist(), down.tolist(), strict=True)]
            return "M" + "L".join(points)

        steps = path(np.repeat(edges, 2)[1:-1], np.repeat(of_stretch, 2)) if len(of_stretch) > 1 else ""
        return {
            "line": path(counts[start:], bits[start:]),
            "start": int(counts[start]),
            "steps": steps,
            "stretch": every * self.step,
            "x": [Tick(100 * x / self.count, f"{x:,.0f}") for x in even(0, self.count, smallest=1)],
            "y": [Tick(100 * (high - math.log2(v)) / (high - low), f"{v:,.6g}") for v in perplexities(low, high)],
        }


def histogram(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Bars of tokens by bits. The last one has all tokens above."""
    for most in (8, 16, 32, MOST_BITS):  # bits on the axis; at most a hundredth of the tokens is above
        if counts[most * FINE :].sum() <= 0.01 * counts.sum():
            break
    bars = counts[: most * FINE].reshape(BARS, -1).sum(1)
    bars[-1] += counts[most * FINE :].sum()
    width, top = most / BARS, 1.05 * float(bars.max())
    found = []
    for i, count in enumerate(bars.tolist()):
        upper = "or more bits" if i == BARS - 1 else f"to {width * (i + 1):g} bits"
        label = f"{width * i:g} {upper}: {count:,} tokens"
        found.append((100 * i / BARS, 100 * count / top, min(int(width * i), COLOURS - 1), label))
    return {
        "bars": found,
        "width": 100 / BARS,
        "x": [Tick(100 * x / most, f"{x:g}") for x in range(0, most, most // 8)],
        "y": [Tick(100 - 100 * v / top, f"{v:,.0f}") for v in even(0, top, smallest=1)],
    }


def even(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """Up to six round numbers in a range, a step of 1, 2 or 5 times a power of ten apart."""
    least = max((high - low) / 5, smallest)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def perplexities(low: float, high: float) -> Sequence[float]:
    """Round perplexities between 2^low and 2^high: 1, 2 and 5 times powers of ten, or fewer, or more."""
    first, last = power_of_2(low), power_of_2(high)
    decades = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if first <= m * 10.0**d <= last]
    if len(fine) < 3:
        return even(first, last)
    if len(fine) <= 8:
        return fine
    coarse = [10.0**d for d in decades if first <= 10.0**d <= last]
    return coarse[:: math.ceil(len(coarse) / 8)]


# --- the page --------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Four digits after the point, or four in all of a large number."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.4f}" if value < 1e6 else f"{value:.3e}"


def spread(interval: Interval | None) -> str:
    """An interval in four digits."""
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    digits = max(0, 3 - math.floor(math.log10(max(interval[1], 1))))
    return " to ".join(f"{v:,.{digits}f}" if interval[1] < 1e6 else f"{v:.3e}" for v in interval)


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise EvaluationError("The HTML report needs Jinja2 (pip install 'fused-ppl[eval]').") from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"number": number, "spread": spread}
    source = importlib.resources.files("fused_ppl.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
