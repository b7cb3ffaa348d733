# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: the perplexity of texts under a named convention, from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fused_ppl import Options
from fused_ppl.evaluation import models
from fused_ppl.evaluation import tokens as tokenization
from fused_ppl.evaluation.conventions import check_settings, convention_of
from fused_ppl.evaluation.models import HiddenModel
from fused_ppl.evaluation.records import BOS, Document, EvaluationError, Settings, TokenRow
from fused_ppl.evaluation.result import Evaluation
from fused_ppl.evaluation.run import How, Run, bos_id
from fused_ppl.evaluation.state import StateFile


def evaluate(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str | Document],
    *,
    convention: str = "strided",
    ctx: int | None = None,
    stride: int | None = None,
    min_context: int | None = None,
    bos: str = "auto",
    max_tokens: int | None = None,
    batch_size: int = 4,
    options: Options | None = None,
    per_token: Callable[[TokenRow], None] | None = None,
    alternatives: int = 0,
    state: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """The perplexity of texts under a named convention, without logits of all tokens.

        perplexity = 2^(bits per token),    bits per token = sum of nll / (ln 2 * number of scored tokens)
        bits per byte = sum of nll / (ln 2 * bytes of the scored tokens)

    `fused_ppl.evaluation.CONVENTIONS` has the conventions and their formulas.

    Args:
        model: a causal language model of transformers, patched or not, or a `HiddenModel` of any other.
        tokenizer: a fast tokenizer of transformers.
        texts: strings, or `Document`s with a name and a domain. They are read one after another.
        convention: a name of `CONVENTIONS`. The default scores every token once, with context before it.
        ctx: the most tokens that the model is given at once; 512, or what the model takes.
        stride: tokens scored in a window, where windows overlap; half of `ctx`. `min_context` says the same by the
            least number of tokens before a scored one, after the first window: ctx - stride + 1.
        bos: "auto" as the tokenizer does it; "yes" and "no". A convention with a rule of its own keeps it.
        max_tokens: of each text, from its beginning.
        batch_size: windows at once. It changes no number beyond rounding.
        options: of the fused head, as in `fused_ppl.linear_cross_entropy`.
        per_token: is called with each scored token, in order. If it has a method `keep`, that is called first, with
            the number of tokens that an earlier run had handed over (`TokenFile`).
        alternatives: of each token for `per_token`: its rank, and so many of the most likely tokens. This costs a
            second product with the head.
        state: a file that keeps what is done. A killed evaluation that is called again goes on from it.
        progress: is called with the number of bytes of text that were finished since its last call.

    Raises:
        EvaluationError: a ValueError, in a sentence: the settings, a text, the tokenizer or the model do not fit.

    Example (docs/evaluation.md has more)::

        result = evaluate(model, tokenizer, ["The cat sat on the mat."], ctx=128)
        print(result.total.perplexity, result.quote())
    """
    of_model = models.of(model)
    tokenization.check_tokenizer(tokenizer)
    check_batch_size(batch_size)
    ctx, stride = sizes_of(of_model, ctx, stride, min_context=min_context, convention=convention)
    settings = Settings(convention, ctx, stride, uses_bos(tokenizer, convention, bos), max_tokens)
    check_settings(settings)
    how = How(batch_size, options, per_token, alternatives, progress or (lambda num_bytes: None))
    run = Run(of_model, tokenizer, settings, how, bos_asked=bos)
    return run.finish(texts, StateFile(None if state is None else Path(state), run.identity()))


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1; got {batch_size}.")


def sizes_of(
    model: HiddenModel, ctx: int | None, stride: int | None, *, min_context: int | None, convention: str = "strided"
) -> tuple[int, int]:
    """The context and the stride, with their defaults filled in."""
    asked, most = ctx, model.most_tokens
    if ctx is None:
        ctx = min(512, most or 512)
        if convention == "llama.cpp-strided" and most is not None:
            ctx = min(ctx, most - most // 4)  # its windows are longer by half a stride
    given = ctx + ((ctx // 2 if stride is None else stride) // 2 if convention == "llama.cpp-strided" else 0)
    if most is not None and given > most:
        words = f"ctx + stride / 2 is {given}" if convention == "llama.cpp-strided" else f"got {asked}"
        raise EvaluationError(f"ctx must be at most what the model takes, {most}; {words}.")
    if stride is not None and min_context is not None:
        raise EvaluationError("stride and min_context say the same: stride = ctx - min_context + 1. Give one of them.")
    if min_context is not None:
        stride = ctx - min_context + 1
    return ctx, max(1, ctx // 2) if stride is None else stride


def uses_bos(tokenizer: Any, name: str, bos: str) -> bool:
    """Whether a BOS is used under this convention."""
    if bos not in BOS:
        raise EvaluationError(f"bos must be one of {', '.join(BOS)}; got {bos!r}.")
    convention = convention_of(name)
    wants = convention.prefix != "" or bos == "yes" or (bos == "auto" and tokenization.added_bos(tokenizer))
    if wants and bos_id(tokenizer, convention) is None:
        raise EvaluationError(
            f"{'bos=yes' if bos == 'yes' else 'convention ' + name} needs a BOS token, and the tokenizer has none. "
            "Use bos='no' with the convention strided, or set tokenizer.bos_token."
        )
    return wants
