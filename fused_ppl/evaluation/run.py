# SPDX-License-Identifier: Apache-2.0
"""One evaluation, document by document.

A document is tokenized, and the convention cuts its tokens into windows. Batches of windows run through the model, and
the fused head gives the nll of the scored tokens. Only sums are kept of a finished document.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fused_ppl import Options
from fused_ppl.evaluation import scoring, statistics
from fused_ppl.evaluation import tokens as tokenization
from fused_ppl.evaluation.conventions import CONVENTIONS, Convention, windows_of
from fused_ppl.evaluation.models import HiddenModel
from fused_ppl.evaluation.records import Document, EvaluationError, Group, Settings, TokenRow, Tokens, Window
from fused_ppl.evaluation.result import Evaluation, peak_memory, versions
from fused_ppl.evaluation.state import Progress, StateFile

BOS_DIFFERENCE = 0.02  # of the perplexity, above which a warning names both
BOS_TOKENS = 128  # that are scored both ways
SEPARATOR = b"\0"


@dataclass(frozen=True)
class How:
    """What does not change the number, beyond rounding."""

    batch_size: int
    options: Options | None = None
    per_token: Callable[[TokenRow], None] | None = None
    alternatives: int = 0
    asked_progress: Callable[[int], None] | None = None

    def progress(self, num_bytes: int) -> None:
        if self.asked_progress is not None:
            self.asked_progress(num_bytes)


def bos_id(tokenizer: Any, convention: Convention) -> int | None:
    """The token before a text: BOS, or EOS where the convention takes it in its place."""
    if tokenizer.bos_token_id is None and convention.prefix:
        found = tokenizer.eos_token_id
    else:
        found = tokenizer.bos_token_id
    return None if found is None else int(found)


class Run:
    """One evaluation: it walks over the documents and keeps their sums."""

    def __init__(self, model: HiddenModel, tokenizer: Any, settings: Settings, how: How, *, tries_bos: bool) -> None:
        self.model, self.tokenizer, self.settings, self.how = model, tokenizer, settings, how
        self.convention, self.tries_bos = CONVENTIONS[settings.convention], tries_bos
        found = bos_id(tokenizer, self.convention) if settings.bos else None
        self.bos = -1 if found is None else found
        self.num_scored = 0  # by this process

    def identity(self) -> dict[str, Any]:
        """What a state file must have in common with this run. The size of a batch changes the last bits."""
        return {
            **dataclasses.asdict(self.settings),
            "model": self.model.name,
            "head": self.model.fingerprint(),
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "batch_size": self.how.batch_size,
            "options": str(self.how.options or Options()),
            "per_token": self.how.per_token is not None,
            "tokenizer": tokenization.tokenizer_hash(self.tokenizer),
            **versions(),
        }

    def finish(self, texts: Iterable[str | Document], file: StateFile) -> Evaluation:
        begin, done = time.perf_counter(), file.load()
        text_hash, resumed, given, kept = hashlib.sha256(), len(done.documents), 0, False
        for number, document in enumerate(documents_of(texts)):
            given += 1
            data = document.text.encode()
            text_hash.update(data + SEPARATOR)
            own_hash = hashlib.sha256(document.domain.encode() + SEPARATOR + data).hexdigest()[:16]
            known = done.documents[number] if number < resumed else done.at_work if number == resumed else ""
            if known and known != own_hash:
                raise EvaluationError(
                    f"{document.name} is not the text that the state file {file.path} knows. Delete the file to start "
                    "from the beginning."
                )
            if number < resumed:
                self.how.progress(len(data))
                continue
            if not kept:
                self.keep(done)
                kept = True
            done.at_work = own_hash
            group = self.of_document(document, done, file)
            done.groups.setdefault(document.domain, Group()).add(group)
            done.documents.append(own_hash)
            done.replaced += document.replaced
            done.batches, done.nll, done.at_work = 0, [], ""
            file.save(done, wait=True)
        if not kept:
            self.keep(done)
        file.save(done)
        if given < resumed:
            raise EvaluationError(f"The state file {file.path} knows {resumed} texts; only {given} were given.")
        if not given:
            raise EvaluationError("There must be at least one text that is not empty; got none.")
        return self.result(done, text_hash.hexdigest()[:12], time.perf_counter() - begin)

    def keep(self, done: Progress) -> None:
        """Tell the receiver of tokens how many of them an earlier run had handed over."""
        keep = getattr(self.how.per_token, "keep", None)
        if keep is not None:
            keep(done.handed_over)
        elif self.how.per_token is not None and done.handed_over:
            raise EvaluationError(
                "A run that goes on from a state must not hand tokens over twice, so per_token needs a method keep(n), "
                "as TokenFile has. Or delete the state file to start from the beginning."
            )

    def of_document(self, document: Document, done: Progress, file: StateFile) -> Group:
        """The sums of one document. Batches that `done` knows are not computed again."""
        tokens, document = self.tokens(document)
        windows = windows_of(len(tokens.ids), self.settings, document.name)
        batches = list(scoring.batches(windows, self.how.batch_size))
        for number, batch in scoring.reported(batches, len(document.text.encode()), self.how.progress):
            if number >= done.batches:
                for scored in self.score(tokens, batch):
                    done.nll.extend(scored.nll.tolist())
                    self.num_scored += len(scored.nll)
                    done.handed_over += self.hand_over(document, tokens, scored)
                done.batches = number + 1
                file.save(done, wait=True)
        nll = np.asarray(done.nll, dtype=np.float64)
        if not done.documents:
            done.warnings += self.bos_warnings(tokens, nll)
        if tokens.warning:
            done.warnings.append(f"{document.name}: {tokens.warning}")
        return self.sums(document, tokens, windows, nll=nll)

    def tokens(self, document: Document) -> tuple[Tokens, Document]:
        """The tokens of a document, both cut to `max_tokens`; with a BOS before them if that is a token of the text."""
        found = tokenization.tokenize(self.tokenizer, document.text, document.name)
        size = self.model.linear_weight.shape[0]
        if tokenization.vocabulary_size(found.ids) > size or self.bos >= size:
            i = int(np.argmax(found.ids >= size)) if len(found.ids) else 0
            raise EvaluationError(
                f"The model has {size} classes, and the tokenizer gives {int(max(found.ids.max(), self.bos))}: token "
                f"{i} of {document.name} is none of them. They do not belong together."
            )
        most = self.settings.max_tokens
        if most is not None and most < len(found.ids):
            found = found.first(most)
            # a token may end within a character, whose other bytes are left out
            data = document.text.encode()[: int(found.num_bytes.sum())]
            document = document._replace(text=data.decode(errors="ignore"))
        if self.convention.decoded:
            found = found._replace(num_bytes=tokenization.decoded_bytes(self.tokenizer, found.ids))
        if self.convention.in_stream and self.settings.bos:
            found = found.after(self.bos)
        return found, document

    def score(self, tokens: Tokens, batch: list[Window]) -> list[scoring.Scored]:
        return scoring.score(
            self.model,
            tokens.ids,
            batch,
            bos=self.bos,
            stats=self.how.per_token is not None,
            alternatives=self.how.alternatives,
            options=self.how.options,
        )

    def hand_over(self, document: Document, tokens: Tokens, scored: scoring.Scored) -> int:
        """Give the scored tokens of a window to the caller. Returns their number."""
        if self.how.per_token is None or scored.entropy is None or scored.predicted is None:
            return 0
        ranked, before = scored.ranked, int(self.convention.in_stream and self.settings.bos)
        for i, nll in enumerate(scored.nll.tolist()):
            at = scored.window.first + i
            self.how.per_token(
                TokenRow(
                    document=document.name,
                    position=at - before,
                    start=int(tokens.starts[at]),
                    id=int(tokens.ids[at]),
                    num_bytes=int(tokens.num_bytes[at]),
                    nll=nll,
                    entropy=float(scored.entropy[i]),
                    predicted=int(scored.predicted[i]),
                    rank=None if ranked is None else int(ranked.rank[i]),
                    alternatives=() if ranked is None else alternatives_of(ranked, i),
                )
            )
        return len(scored.nll)

    def sums(self, document: Document, tokens: Tokens, windows: list[Window], *, nll: NDArray[np.float64]) -> Group:
        """The sums of a document from the nll of its scored tokens, by windows."""
        where = [np.arange(w.first, w.stop) for w in windows]
        num_bytes = tokens.num_bytes[np.concatenate(where)] if where else np.zeros(0, dtype=np.int32)
        text, group = document.text, Group()
        s = group.score
        if self.convention.decoded:  # special tokens have no bytes and do not count
            nll, num_bytes = nll[num_bytes > 0], num_bytes[num_bytes > 0]
        group.blocks.add(nll, num_bytes)
        s.nll, s.tokens, s.num_bytes = float(nll.sum()), len(nll), int(num_bytes.sum())
        s.mean_nll, s.mean_tokens = s.nll, s.tokens
        if self.convention.one_less:
            s.mean_nll, s.mean_tokens = _hf_sums(nll, windows)
        s.total_tokens = len(tokens.ids) - int(self.convention.in_stream and self.settings.bos)
        s.total_bytes, s.characters, s.words = len(text.encode()), len(text), len(re.split(r"\s+", text))
        if self.settings.max_tokens is not None and not self.convention.decoded:
            s.total_bytes = int(tokens.num_bytes.sum())
        s.documents = 1
        return group

    def bos_warnings(self, tokens: Tokens, nll: NDArray[np.float64]) -> list[str]:
        """A warning if a BOS changes the beginning of the first text by much. Models may need one, or not know it.

        The beginning is scored the other way as well, and compared with what the evaluation found.
        """
        bos = self.tokenizer.bos_token_id
        own_rule = self.convention.prefix or self.convention.in_stream
        if not self.tries_bos or own_rule or bos is None or bos >= self.model.linear_weight.shape[0]:
            return []
        own, other = self.settings.bos, not self.settings.bos
        settings = dataclasses.replace(self.settings, bos=other)
        windows = windows_of(min(len(tokens.ids), self.settings.ctx, BOS_TOKENS), settings, "the text")[:1]
        if not windows:
            return []
        (scored,) = scoring.score(self.model, tokens.ids, windows, bos=int(bos), options=self.how.options)
        # the first token has no prediction without a BOS
        found = {own: nll[int(own) :], other: scored.nll[int(other) :]}
        size = min(len(values) for values in found.values())
        if not size:
            return []
        with_bos, without = (statistics.power_of_2(float(found[k][:size].mean()) / np.log(2)) for k in (True, False))
        if abs(with_bos - without) <= BOS_DIFFERENCE * min(with_bos, without):
            return []
        does = "The tokenizer adds one, and so does this evaluation."
        if not self.settings.bos:
            does = "The tokenizer adds none, and neither does this evaluation."
        return [
            f"The first {size} tokens have a perplexity of {with_bos:.4g} with a BOS before each window and "
            f"{without:.4g} without. {does} Choose by bos='yes' or 'no' (--bos)."
        ]

    def result(self, done: Progress, text_hash: str, seconds: float) -> Evaluation:
        total = Group()
        for group in done.groups.values():
            total.add(group)
        if not total.score.tokens:
            raise EvaluationError(
                f"No token was scored: the texts have {total.score.total_tokens} tokens. A text needs two tokens, or "
                "one and a BOS."
            )
        rows = [statistics.row(name, group) for name, group in done.groups.items()]
        counted = [row for row in rows if row.tokens]
        replaced = [f"{done.replaced} characters are U+FFFD (3 bytes) in the place of bytes that were not UTF-8."]
        return Evaluation(
            settings=self.settings,
            total=statistics.row("all", total),
            rows=rows,
            macro_perplexity=float(np.mean([r.perplexity for r in counted])),
            macro_bits_per_byte=float(np.mean([r.bits_per_byte for r in counted])),
            model=self.model.name,
            dtype=str(self.model.dtype).removeprefix("torch."),
            bos=self.bos_words(),
            tokenizer_hash=tokenization.tokenizer_hash(self.tokenizer),
            text_hash=text_hash,
            versions=versions(),
            seconds=seconds,
            tokens_per_second=self.num_scored / seconds,
            peak_memory=peak_memory(self.model.device),
            replaced=done.replaced,
            warnings=done.warnings + (replaced if done.replaced else []),
        )

    def bos_words(self) -> str:
        if not self.settings.bos:
            return "no BOS"
        return "BOS" if self.tokenizer.bos_token_id is not None else "EOS as BOS"


def alternatives_of(ranked: scoring.Ranked, i: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ranked.ids[i].tolist(), ranked.probabilities[i].tolist(), strict=True))


def _hf_sums(nll: NDArray[np.float64], windows: list[Window]) -> tuple[float, int]:
    """transformers' page multiplies the mean of a window by one token less than it has labels."""
    total, count, at, before = 0.0, 0, 0, 0
    for window in windows:
        size = window.stop - window.first
        # a label at the beginning of its window has no prediction, and is the one that is taken off
        weight = size if window.start == before else size - 1
        total += float(nll[at : at + size].mean()) * weight
        count, at, before = count + weight, at + size, window.stop
    return total, count


def documents_of(texts: Iterable[str | Document]) -> Iterator[Document]:
    if isinstance(texts, str):
        raise EvaluationError("texts must be several texts, as in [text]; got one string.")
    for number, text in enumerate(texts):
        document = Document(f"text {number}", text, "texts") if isinstance(text, str) else text
        if not isinstance(document, Document):
            raise EvaluationError(f"texts must be strings or Documents; text {number} is a {type(document).__name__}.")
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            raise EvaluationError(
                f"{document.name} must be text; its character {error.start} is half of a surrogate pair."
            ) from None
        if document.text:
            yield document
