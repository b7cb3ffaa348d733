# SPDX-License-Identifier: Apache-2.0
"""From what a caller of `evaluate`, `compare` or `rank` asks to a run: defaults filled in, and everything checked."""

from __future__ import annotations

from typing import Any, NamedTuple

from fused_ppl.evaluation import tokens as tokenization
from fused_ppl.evaluation.conventions import check_settings, convention_of
from fused_ppl.evaluation.models import HiddenModel
from fused_ppl.evaluation.records import BOS, EvaluationError, Settings
from fused_ppl.evaluation.run import How, Run, bos_id

CTX = 512  # unless the model takes less


class Asked(NamedTuple):
    """The windows that a caller asks for; `evaluate` describes each."""

    convention: str
    ctx: int | None
    stride: int | None
    min_context: int | None
    bos: str
    max_tokens: int | None


def run_of(model: HiddenModel, tokenizer: Any, asked: Asked, *, how: How, tries_bos: bool = False) -> Run:
    """A run over texts.

    Raises:
        EvaluationError: the settings, the tokenizer and the model do not fit.
    """
    tokenization.check_tokenizer(tokenizer)
    if how.batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1; got {how.batch_size}.")
    ctx, stride = _sizes(model, asked)
    settings = Settings(asked.convention, ctx, stride, _uses_bos(tokenizer, asked), asked.max_tokens)
    check_settings(settings)
    return Run(model, tokenizer, settings, how, tries_bos=tries_bos)


def _sizes(model: HiddenModel, asked: Asked) -> tuple[int, int]:
    """The context and the stride. The longest window fits the model."""
    if asked.stride is not None and asked.min_context is not None:
        raise EvaluationError("stride and min_context say the same: stride = ctx - min_context + 1. Give one of them.")
    most, longest_of = model.most_tokens, convention_of(asked.convention).longest
    ctx = min(CTX, most or CTX) if asked.ctx is None else asked.ctx
    longest = longest_of(ctx, _stride(ctx, asked))
    if most is not None and longest > most:
        if asked.ctx is not None:
            raise EvaluationError(
                f"A window must have at most as many tokens as the model takes, {most}; under the convention "
                f"{asked.convention} and ctx {ctx} it has {longest}. Use a smaller ctx."
            )
        ctx -= longest - most
    return ctx, _stride(ctx, asked)


def _stride(ctx: int, asked: Asked) -> int:
    if asked.min_context is not None:
        return ctx - asked.min_context + 1
    return max(1, ctx // 2) if asked.stride is None else asked.stride


def _uses_bos(tokenizer: Any, asked: Asked) -> bool:
    """Whether a BOS is used under this convention."""
    if asked.bos not in BOS:
        raise EvaluationError(f"bos must be one of {', '.join(BOS)}; got {asked.bos!r}.")
    convention = convention_of(asked.convention)
    wants = convention.prefix or asked.bos == "yes" or (asked.bos == "auto" and tokenization.added_bos(tokenizer))
    if wants and bos_id(tokenizer, convention) is None:
        raise EvaluationError(
            f"{'bos=yes' if asked.bos == 'yes' else 'convention ' + convention.name} needs a BOS token, and the "
            "tokenizer has none. Use bos='no' with the convention strided, or set tokenizer.bos_token."
        )
    return wants
