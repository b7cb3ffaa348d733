# SPDX-License-Identifier: Apache-2.0
"""Two models on the same tokens: how far apart their predictions are, in one pass over the text.

The quantities are those of llama.cpp's KL mode, by its names. It writes the logits of the base model to a file of 2V
bytes for each token; here both models run over the text at the same time, and the logits of a few rows exist at once.
One product with each head gives these logits, and they give the nll of both, KLD and the agreement. The divergence from
hidden states knows both nll only by their difference, so that one of them would cost a third product.

Models with different tokenizers have no tokens in common. Then only their bits per byte are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fused_ppl
from fused_ppl import Options
from fused_ppl.backends.torch_stats import argmax
from fused_ppl.evaluation import models, scoring
from fused_ppl.evaluation import tokens as tokenization
from fused_ppl.evaluation.asked import Asked, run_of
from fused_ppl.evaluation.conventions import windows_of
from fused_ppl.evaluation.models import HiddenModel
from fused_ppl.evaluation.records import BLOCK, Document, EvaluationError, Settings, Tokens, Window
from fused_ppl.evaluation.result import finite
from fused_ppl.evaluation.run import How, Run, documents_of
from fused_ppl.evaluation.statistics import LN2, Interval, bootstrap_ratio, drawn_again, interval_of, power_of_2, ratio

PERCENTILES = (100, 99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1, 0)
CONTEXT = 60  # characters before a token that is shown
LOGITS_BYTES = 256 * 2**20  # of both models, unless `Options.memory_budget` says another number
MOST_ROWS = 1024  # whose logits exist at once
BLOCK_BYTES = 256  # of text, in a block of the bootstrap where the tokens of both models differ


@dataclass(frozen=True)
class Different:
    """A token whose predictions differ much."""

    document: str
    position: int
    before: str  # the text before it
    token: str
    kl: float  # nats
    probability: float  # of the token, by the model
    base_probability: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the same text. Q is the model, "base" is what it is compared with.

    Intervals are 95 %, by a bootstrap over blocks of 64 tokens; that of a difference or a ratio is paired: both models
    are taken from the same blocks. For two tokenizers blocks have 256 bytes, and the fields from `perplexity` on are
    None.
    """

    model: str
    base: str
    settings: Settings
    tokens: int
    num_bytes: int
    bits_per_byte: float
    base_bits_per_byte: float
    bits_per_byte_difference: float  # model less base
    bits_per_byte_difference_interval: Interval | None
    perplexity: float | None = None  # PPL(Q)
    base_perplexity: float | None = None  # PPL(base)
    correlation: float | None = None  # of the nll of both: Cor(ln(PPL(Q)), ln(PPL(base)))
    log_ratio: float | None = None  # ln(PPL(Q) / PPL(base)), nats a token
    log_ratio_interval: Interval | None = None
    kl: float | None = None  # mean KL(base || Q), nats a token
    kl_interval: Interval | None = None
    kl_percentiles: dict[float, float] | None = None
    change: float | None = None  # mean of the target's p(Q) - p(base), "Mean Δp"
    change_rms: float | None = None
    change_percentiles: dict[float, float] | None = None
    same_top: float | None = None  # share of tokens whose most likely class is the same
    same_top_interval: Interval | None = None
    most_different: list[Different] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        whole: dict[str, Any] = finite(dataclasses.asdict(self))
        return whole

    def lines(self) -> list[tuple[str, str]]:
        """Names and values, as llama.cpp prints them."""

        def spread(pair: Interval | None, scale: float = 1.0) -> str:
            return "" if pair is None else f"  [{scale * pair[0]:.6g}, {scale * pair[1]:.6g}]"

        found = [
            ("bits per byte, Q", f"{self.bits_per_byte:.6f}"),
            ("bits per byte, base", f"{self.base_bits_per_byte:.6f}"),
            (
                "bits per byte, Q - base",
                f"{self.bits_per_byte_difference:+.6f}{spread(self.bits_per_byte_difference_interval)}",
            ),
        ]
        if self.kl is None or self.kl_percentiles is None or self.change_percentiles is None:
            return found
        assert self.log_ratio is not None and self.change is not None and self.change_rms is not None
        assert self.same_top is not None
        found += [
            ("Mean PPL(Q)", f"{self.perplexity:.6f}"),
            ("Mean PPL(base)", f"{self.base_perplexity:.6f}"),
            (
                "Cor(ln(PPL(Q)), ln(PPL(base)))",
                "not defined" if self.correlation is None else f"{100 * self.correlation:.2f} %",
            ),
            ("Mean ln(PPL(Q)/PPL(base))", f"{self.log_ratio:+.6f}{spread(self.log_ratio_interval)}"),
            ("Mean PPL(Q)/PPL(base)", f"{power_of_2(self.log_ratio / LN2):.6f}"),
            ("Mean KLD", f"{self.kl:.6f}{spread(self.kl_interval)}"),
        ]
        found += [(f"{_percentile(p)} KLD", f"{v:.6f}") for p, v in self.kl_percentiles.items()]
        found += [("Mean Δp", f"{100 * self.change:+.4f} %"), ("RMS Δp", f"{100 * self.change_rms:.4f} %")]
        found += [(f"{_percentile(p)} Δp", f"{100 * v:+.4f} %") for p, v in self.change_percentiles.items()]
        return [*found, ("Same top p", f"{100 * self.same_top:.3f} %{spread(self.same_top_interval, 100)}")]


def _percentile(p: float) -> str:
    names: dict[float, str] = {100: "Maximum", 50: "Median", 0: "Minimum"}
    return names.get(p, f"{p:g}%")


@dataclass
class _PerToken:
    """Of every scored token of the text, in order."""

    nll: list[NDArray[np.float64]] = dataclasses.field(default_factory=list)
    base_nll: list[NDArray[np.float64]] = dataclasses.field(default_factory=list)
    kl: list[NDArray[np.float64]] = dataclasses.field(default_factory=list)
    same_top: list[NDArray[np.bool_]] = dataclasses.field(default_factory=list)
    num_bytes: list[NDArray[np.int32]] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)  # tokens up to the end of each document


def compare(
    model: Any,
    base: Any,
    tokenizer: Any,
    texts: Iterable[str | Document],
    *,
    base_tokenizer: Any = None,
    ctx: int | None = None,
    stride: int | None = None,
    min_context: int | None = None,
    bos: str = "auto",
    max_tokens: int | None = None,
    batch_size: int = 4,
    options: Options | None = None,
    progress: Callable[[int], None] | None = None,
    most_different: int = 20,
) -> Comparison:
    """How a model differs from another one on texts: KL divergence, ratio of perplexities, agreement, both in one pass.

        KLD = KL(base || Q) = sum_v q_v log(q_v / p_v) of a token, p by the model and q by the base, in nats
        Mean ln(PPL(Q)/PPL(base)) = mean of (nll of the model - nll of the base)

    Args:
        model, base: as in `evaluate`. The base is the model before it was quantised, pruned or tuned.
        tokenizer: of both models.
        base_tokenizer: of the base, if it has another. Then only bits per byte are compared.
        texts, and all others: as in `evaluate`, under the convention "strided".
        most_different: how many of the tokens with the largest KLD are kept, with the text before them.

    Raises:
        EvaluationError: as `evaluate`; or the heads have different numbers of classes.
    """
    first, second = models.of(model), models.of(base)
    most = min((m.most_tokens for m in (first, second) if m.most_tokens is not None), default=None)
    first, second = (dataclasses.replace(m, most_tokens=most) for m in (first, second))
    asked = Asked("strided", ctx, stride, min_context, bos, max_tokens)
    how = How(batch_size, options, asked_progress=progress)
    run = run_of(first, tokenizer, asked, how=how)
    if base_tokenizer is not None:
        # with `max_tokens` of the model, the base is given the text that they leave
        base_run = run_of(second, base_tokenizer, asked._replace(max_tokens=None), how=how)
        if tokenization.tokenizer_hash(base_tokenizer) != tokenization.tokenizer_hash(tokenizer):
            return _two_tokenizers(run, base_run, texts)
    if first.linear_weight.shape[0] != second.linear_weight.shape[0]:
        raise EvaluationError(
            f"Both models must have as many classes; {first.name} has {first.linear_weight.shape[0]} and {second.name} "
            f"has {second.linear_weight.shape[0]}. Give the tokenizer of the base, to compare bits per byte."
        )
    if first.device != second.device:
        raise EvaluationError(f"Both models must be on one device; they are on {first.device} and {second.device}.")
    return _Pass(run, second).over(texts, most_different)


class _Pass:
    """The pass of both models over the texts."""

    def __init__(self, run: Run, base: HiddenModel) -> None:
        self.run, self.base = run, base
        self.found, self.kept = _PerToken(), list[Different]()

    def over(self, texts: Iterable[str | Document], most_different: int) -> Comparison:
        for document in documents_of(texts):
            self.document(document, most_different)
        if not self.found.nll:
            raise EvaluationError("No token was scored. A text needs two tokens, or one and a BOS.")
        return self.result()

    def document(self, document: Document, most_different: int) -> None:
        tokens, document = self.run.tokens(document)
        windows = windows_of(len(tokens.ids), self.run.settings, document.name)
        batches = list(scoring.batches(windows, self.run.how.batch_size))
        first, found = len(self.found.nll), self.found
        for _, batch in scoring.reported(batches, len(document.text.encode()), self.run.how.progress):
            self.batch(tokens, batch)
        if not batches:
            return
        where = np.concatenate([np.arange(w.first, w.stop) for w in windows])
        found.num_bytes.append(tokens.num_bytes[where])
        found.ends.append((found.ends[-1] if found.ends else 0) + len(where))
        kl, nll, base = (np.concatenate(column[first:]) for column in (found.kl, found.nll, found.base_nll))
        for i in np.argsort(-kl, kind="stable")[:most_different].tolist():
            self.kept.append(self.different(document, tokens, int(where[i]), values=(kl[i], nll[i], base[i])))
        self.kept = sorted(self.kept, key=lambda d: -d.kl)[:most_different]

    @torch.no_grad()
    def batch(self, tokens: Tokens, batch: list[Window]) -> None:
        model, base, options = self.run.model, self.base, self.run.how.options
        of_model, of_base = (scoring.rows_of(m, tokens.ids, batch, self.run.bos) for m in (model, base))
        budget = LOGITS_BYTES if options is None or options.memory_budget is None else options.memory_budget
        step = max(1, min(MOST_ROWS, budget // (8 * model.linear_weight.shape[0])))
        how: dict[str, Any] = {"ignore_index": None, "reduction": "none", "options": options}
        p, q = ({**how, "logit_scale": m.logit_scale, "softcap": m.softcap} for m in (model, base))
        both = {**p, "teacher_logit_scale": base.logit_scale, "teacher_softcap": base.softcap}
        for part in (slice(i, i + step) for i in range(0, len(of_model.target), step)):
            x, base_x = (scoring.logits_of(m, r.hidden[part]) for m, r in ((model, of_model), (base, of_base)))
            y = of_model.target[part]
            nll, base_nll = fused_ppl.cross_entropy(x, y, **p), fused_ppl.cross_entropy(base_x, y, **q)
            kl = fused_ppl.kl_divergence(x, base_x, **both)
            for name, value in (("kl", kl), ("base_nll", base_nll), ("nll", nll)):
                values = value.cpu().double().numpy()
                if not np.isfinite(values).all():
                    raise EvaluationError(f"Both models must give finite logits; the {name} of a token is not finite.")
                getattr(self.found, name).append(values)
            self.found.same_top.append((argmax(x) == argmax(base_x)).cpu().numpy())

    def different(
        self, document: Document, tokens: Tokens, at: int, *, values: tuple[float, float, float]
    ) -> Different:
        kl, nll, base_nll = values
        start = int(tokens.starts[at])
        return Different(
            document=document.name,
            position=at,
            before=document.text[max(0, start - CONTEXT) : start],
            token=self.run.tokenizer.decode([int(tokens.ids[at])], clean_up_tokenization_spaces=False),
            kl=float(kl),
            probability=power_of_2(-nll / LN2),
            base_probability=power_of_2(-base_nll / LN2),
        )

    def result(self) -> Comparison:
        found = self.found
        nll, base, kl = (np.concatenate(column) for column in (found.nll, found.base_nll, found.kl))
        same, num_bytes = np.concatenate(found.same_top), np.concatenate(found.num_bytes)
        change = np.power(2.0, -nll / LN2) - np.power(2.0, -base / LN2)
        blocks = _blocks(found.ends)
        tokens = np.ones(len(nll))
        constant = nll.std() == 0 or base.std() == 0
        bits = [float(v.sum()) / LN2 / float(num_bytes.sum()) for v in (nll, base)]
        return Comparison(
            model=self.run.model.name,
            base=self.base.name,
            settings=self.run.settings,
            tokens=len(nll),
            num_bytes=int(num_bytes.sum()),
            bits_per_byte=bits[0],
            base_bits_per_byte=bits[1],
            bits_per_byte_difference=bits[0] - bits[1],
            bits_per_byte_difference_interval=_interval((nll - base) / LN2, num_bytes, blocks),
            perplexity=power_of_2(float(nll.mean()) / LN2),
            base_perplexity=power_of_2(float(base.mean()) / LN2),
            correlation=None if constant else float(np.corrcoef(nll, base)[0, 1]),
            log_ratio=float((nll - base).mean()),
            log_ratio_interval=_interval(nll - base, tokens, blocks),
            kl=float(kl.mean()),
            kl_interval=_interval(kl, tokens, blocks),
            kl_percentiles=_percentiles(kl),
            change=float(change.mean()),
            change_rms=float(np.sqrt(np.square(change).mean())),
            change_percentiles=_percentiles(change),
            same_top=float(same.mean()),
            same_top_interval=_interval(same.astype(np.float64), tokens, blocks),
            most_different=self.kept,
        )


def _percentiles(values: NDArray[np.float64]) -> dict[float, float]:
    return {p: float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _blocks(ends: list[int]) -> NDArray[np.int64]:
    """The first token of each block of neighbours; no block crosses the end of a document."""
    starts = [0, *ends[:-1]]
    return np.concatenate([np.arange(a, b, BLOCK) for a, b in zip(starts, ends, strict=True)])


def _interval(
    values: NDArray[np.float64], sizes: NDArray[np.float64] | NDArray[np.int32], blocks: NDArray[np.int64]
) -> Interval | None:
    return bootstrap_ratio(np.add.reduceat(values, blocks), np.add.reduceat(sizes.astype(np.float64), blocks))


def _two_tokenizers(run: Run, base_run: Run, texts: Iterable[str | Document]) -> Comparison:
    """Bits per byte of both. Blocks of the same bytes pair them, because the tokens are not the same.

    Each number is over the bytes of its own scored tokens: without a BOS the first token of a text is not scored.
    """
    parts, tokens = list[NDArray[np.float64]](), 0  # (4, blocks) of each text
    for document in documents_of(texts):
        data, columns = len(document.text.encode()), list[NDArray[np.float64]]()
        for one, share in ((run, data // 2), (base_run, data - data // 2)):
            found, document = one.tokens(document)
            nll = _nll(one, found, document, share)
            size, first = len(document.text.encode()), len(found.ids) - len(nll)
            count = -(-size // BLOCK_BYTES)
            block = np.minimum((np.cumsum(found.num_bytes) - found.num_bytes) // BLOCK_BYTES, count - 1)[first:]
            columns += [np.bincount(block, w, count).astype(np.float64) for w in (nll / LN2, found.num_bytes[first:])]
            tokens += len(nll) if one is run else 0
        parts.append(np.stack(columns))
    blocks = np.concatenate(parts, axis=1) if parts else np.zeros((4, 0))
    bits, num_bytes, base_bits, base_bytes = (float(column.sum()) for column in blocks)
    if not num_bytes or not base_bytes:
        raise EvaluationError("No token was scored by both models. A text needs two tokens, or one and a BOS.")
    drawn = drawn_again(list(blocks))
    return Comparison(
        model=run.model.name,
        base=base_run.model.name,
        settings=run.settings,
        tokens=tokens,
        num_bytes=int(num_bytes),
        bits_per_byte=bits / num_bytes,
        base_bits_per_byte=base_bits / base_bytes,
        bits_per_byte_difference=bits / num_bytes - base_bits / base_bytes,
        bits_per_byte_difference_interval=None if drawn is None else interval_of(ratio(*drawn[:2]) - ratio(*drawn[2:])),
    )


def _nll(run: Run, tokens: Tokens, document: Document, share: int) -> NDArray[np.float64]:
    """(n,): nats of the scored tokens, which are the last ones of the document."""
    windows, nll = windows_of(len(tokens.ids), run.settings, document.name), [np.zeros(0)]
    batches = list(scoring.batches(windows, run.how.batch_size))
    for _, batch in scoring.reported(batches, share, run.how.progress):
        nll += [scored.nll for scored in run.score(tokens, batch)]
    return np.concatenate(nll)
