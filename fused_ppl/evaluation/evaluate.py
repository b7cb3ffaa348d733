# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: the perplexity of texts under a named convention, from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fused_ppl import Options
from fused_ppl.evaluation import models
from fused_ppl.evaluation.asked import Asked, run_of
from fused_ppl.evaluation.records import Document, TokenRow
from fused_ppl.evaluation.result import Evaluation
from fused_ppl.evaluation.run import How
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
    asked = Asked(convention, ctx, stride, min_context, bos, max_tokens)
    how = How(batch_size, options, per_token, alternatives, progress)
    run = run_of(models.of(model), tokenizer, asked, how=how, tries_bos=bos == "auto")
    return run.finish(texts, StateFile(None if state is None else Path(state), run.identity()))
