# SPDX-License-Identifier: Apache-2.0
"""Documents ordered by how surprising a model finds them: to filter data, to find anomalies, to choose what to label.

Only numbers of a document are kept, not its text, so that any number of documents can be ranked.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fused_ppl import Options
from fused_ppl.evaluation import models
from fused_ppl.evaluation.asked import Asked, run_of
from fused_ppl.evaluation.records import Document, EvaluationError, Settings, TokenRow
from fused_ppl.evaluation.result import finite
from fused_ppl.evaluation.run import How, documents_of
from fused_ppl.evaluation.state import Progress, StateFile
from fused_ppl.evaluation.statistics import row

BY = ("perplexity", "bits_per_byte", "entropy", "compression")
QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
BINS = 20


@dataclass(frozen=True)
class Ranked:
    """A document and its numbers."""

    name: str
    domain: str
    perplexity: float
    bits_per_byte: float
    entropy: float | None  # nats a token, the mean of the prediction's; None unless it is asked for
    compression: float  # bits per byte / 8: bytes that the model would need for a byte
    zlib_ratio: float  # the same of zlib, which knows no language
    tokens: int  # scored
    num_bytes: int
    quantile: float = 0.0  # share of the documents whose value is lower


@dataclass(frozen=True)
class Ranking:
    """Documents in order, the most surprising first."""

    by: str
    settings: Settings
    model: str
    documents: list[Ranked]
    unscored: list[str]  # names of documents that are too short
    quantiles: dict[int, float]  # percent: value
    histogram: list[int]
    edges: list[float]  # of the bins of the histogram

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        whole: dict[str, Any] = finite(dataclasses.asdict(self))
        return whole


def rank(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str | Document],
    *,
    by: str = "perplexity",
    ctx: int | None = None,
    stride: int | None = None,
    min_context: int | None = None,
    bos: str = "auto",
    max_tokens: int | None = None,
    batch_size: int = 4,
    options: Options | None = None,
    progress: Callable[[int], None] | None = None,
) -> Ranking:
    """Order documents by one number, the highest first.

        perplexity     2^(bits per token)
        bits_per_byte  sum of nll / (ln 2 * bytes of the scored tokens); the fair one over languages and tokenizers
        entropy        mean over scored tokens of the entropy of the prediction, in nats: how unsure the model is,
                       whatever comes next
        compression    bits_per_byte / 8

    Args:
        model, tokenizer, texts, and all others: as in `evaluate`, under the convention "strided".
        by: the number.

    Raises:
        EvaluationError: as `evaluate`; or no document could be scored.
    """
    if by not in BY:
        raise EvaluationError(f"by must be one of {', '.join(BY)}; got {by!r}.")
    of_model, entropies = models.of(model), list[float]()

    def keep(token: TokenRow) -> None:
        entropies.append(token.entropy)

    asked = Asked("strided", ctx, stride, min_context, bos, max_tokens)
    how = How(batch_size, options, keep if by == "entropy" else None, asked_progress=progress)
    run, found, unscored = run_of(of_model, tokenizer, asked, how=how), list[Ranked](), list[str]()
    for document in documents_of(texts):
        entropies.clear()
        group = run.of_document(document, Progress(), StateFile(None, {}))
        if group.score.tokens and group.score.num_bytes:
            found.append(_ranked(document, row(document.name, group, intervals=False), entropies))
        else:
            unscored.append(document.name)
    if not found:
        raise EvaluationError(f"At least one document must have two tokens; {len(unscored)} were given, all shorter.")
    return _in_order(found, by, settings=run.settings, model=of_model.name, unscored=unscored)


def _ranked(document: Document, numbers: Any, entropies: list[float]) -> Ranked:
    data = document.text[: numbers.characters].encode()  # what `max_tokens` leave
    return Ranked(
        name=document.name,
        domain=document.domain,
        perplexity=numbers.perplexity,
        bits_per_byte=numbers.bits_per_byte,
        entropy=float(np.mean(entropies)) if entropies else None,
        compression=numbers.bits_per_byte / 8,
        zlib_ratio=len(zlib.compress(data, 9)) / len(data),
        tokens=numbers.tokens,
        num_bytes=numbers.num_bytes,
    )


def _in_order(found: list[Ranked], by: str, *, settings: Settings, model: str, unscored: list[str]) -> Ranking:
    values = np.asarray([getattr(d, by) for d in found], dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    lower = np.searchsorted(np.sort(values), values) / len(values)
    shown = values[np.isfinite(values)]
    counts, edges = np.histogram(np.log2(shown) if by == "perplexity" else shown, BINS)
    return Ranking(
        by=by,
        settings=settings,
        model=model,
        documents=[dataclasses.replace(found[i], quantile=float(lower[i])) for i in order.tolist()],
        unscored=unscored,
        quantiles={q: float(v) for q, v in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)},
        histogram=counts.tolist(),
        edges=(np.power(2.0, edges) if by == "perplexity" else edges).tolist(),
    )
