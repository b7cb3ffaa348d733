# SPDX-License-Identifier: Apache-2.0
"""The conventions under which perplexity is quoted: which tokens are scored, with how much context before them.

One model and one text give other perplexities under each (docs/evaluation.md). A convention is a function from the
number of tokens to windows, with the formula of its number. Sources: lm-eval 0.4.13
(`utils.get_rolling_token_windows`), llama.cpp (`tools/perplexity/perplexity.cpp`), the page "Perplexity of
fixed-length models" of transformers, Paloma (arXiv 2312.10523), nanochat (`loss_eval.py`), uncheatable_eval
(`evaluator.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fused_ppl.evaluation.records import EvaluationError, Settings, Window


@dataclass(frozen=True)
class Convention:
    """How a text is cut into windows, and what its number is."""

    name: str
    formula: str
    windows: Callable[[int, Settings], Iterator[Window]]
    prefix: bool = False  # always a BOS, or EOS where there is none; else as the tokenizer does it, or as asked
    in_stream: bool = False  # a BOS is a token of the text, before its first one, and no window adds another
    strided: bool = False  # has a stride
    least_windows: int = 1  # of `ctx` tokens that a text must fill
    longest: Callable[[int, int], int] = lambda ctx, stride: ctx  # tokens of its longest window
    one_less: bool = False  # windows are averaged by one token less than they score
    decoded: bool = False  # bytes are those of decode([id]), and tokens without bytes do not count
    quoted: str = "perplexity"  # or "macro perplexity", "bits per byte"


def longer_by_half_a_stride(ctx: int, stride: int) -> int:
    return ctx + stride // 2


def strided(num_tokens: int, settings: Settings) -> Iterator[Window]:
    room = settings.ctx - settings.bos
    bos, first = ("before", 0) if settings.bos else ("", 1)
    stop = min(num_tokens, room + 1)
    while first < num_tokens:
        yield Window(max(0, stop - 1 - room), stop, first, bos)
        first, stop = stop, min(num_tokens, stop + settings.stride)


def disjoint(num_tokens: int, settings: Settings) -> Iterator[Window]:
    size, bos = settings.ctx, "before" if settings.bos else ""
    for start in range(0, num_tokens, size):
        stop = min(num_tokens, start + size)
        first = start if bos else start + 1
        if first < stop:
            yield Window(start, stop, first, bos)


def rolling(num_tokens: int, settings: Settings) -> Iterator[Window]:
    """A prefix before the first window; the others have the last token of the window before, the last one more."""
    size = settings.ctx
    if num_tokens:
        yield Window(0, min(size, num_tokens), 0, "before")
    for first in range(size, num_tokens, size):
        stop = min(num_tokens, first + size)
        yield Window(stop - size - 1, stop, first)


def half_windows(num_tokens: int, settings: Settings) -> Iterator[Window]:
    size, half = settings.ctx, settings.ctx // 2
    for start in range(0, num_tokens - size + 1, size):
        yield Window(start, start + size, start + half + 1, "over" if settings.bos else "")


def llama_strided(num_tokens: int, settings: Settings) -> Iterator[Window]:
    size = longer_by_half_a_stride(settings.ctx, settings.stride)
    for start in range(0, max(0, num_tokens - size), settings.stride):
        yield Window(start, start + size, start + size - settings.stride)


def hf_strided(num_tokens: int, settings: Settings) -> Iterator[Window]:
    before = 0
    for start in range(0, num_tokens, settings.stride):
        stop = min(start + settings.ctx, num_tokens)
        first = max(before, start + 1)
        if first < stop:
            yield Window(start, stop, first)
        before = stop
        if stop == num_tokens:
            break


def stream(num_tokens: int, settings: Settings) -> Iterator[Window]:
    """Rows of `ctx` inputs of one stream, and the token after each as its target."""
    for start in range(0, num_tokens - 1, settings.ctx):
        yield Window(start, min(num_tokens, start + settings.ctx + 1), start + 1)


_ALL_BYTES = "bits per byte = sum nll / (ln 2 * bytes of the text)"
CONVENTIONS = {
    c.name: c
    for c in (
        Convention(
            "strided",
            "exp(mean nll); every token once, with more than ctx - stride tokens before it after the first window",
            strided,
            strided=True,
        ),
        Convention(
            "disjoint",
            "exp(mean nll); windows that do not overlap; without BOS the first token of each is not scored",
            disjoint,
        ),
        Convention(
            "lm-eval",
            f"loglikelihood_rolling: every token once, windows share one token. {_ALL_BYTES}; "
            "byte perplexity = exp(sum nll / bytes), word perplexity = exp(sum nll / words)",
            rolling,
            prefix=True,
        ),
        Convention(
            "llama.cpp",
            "exp(mean nll) of the second half of each window; BOS replaces its first token; the tail is dropped",
            half_windows,
            in_stream=True,
            least_windows=2,
        ),
        Convention(
            "llama.cpp-strided",
            "exp(mean nll) of the last `stride` tokens of windows of ctx + stride / 2; the tail is dropped; no BOS "
            "but that of the text",
            llama_strided,
            in_stream=True,
            strided=True,
            least_windows=2,
            longest=longer_by_half_a_stride,
        ),
        Convention(
            "hf-strided",
            "exp(sum over windows of (n - 1) * mean nll / sum of (n - 1)), n the labels of a window: the code of "
            "transformers' page, whose weights are one too small after the first window",
            hf_strided,
            in_stream=True,
            strided=True,
            one_less=True,
        ),
        Convention(
            "paloma",
            "exp(mean nll) of each domain, windows as lm-eval; the mean of the domains' perplexities",
            rolling,
            prefix=True,
            quoted="macro perplexity",
        ),
        Convention(
            "nanochat",
            "bits per byte = sum nll / (ln 2 * sum of len(decode([id])) in bytes), over tokens that are not special; "
            "BOS before each text, rows of ctx tokens. A token that is a part of a character counts as U+FFFD, 3 bytes",
            stream,
            prefix=True,
            in_stream=True,
            decoded=True,
            quoted="bits per byte",
        ),
        Convention(
            "uncheatable",
            f"chunks of ctx tokens with BOS before each; {_ALL_BYTES}; compression rate = bits per byte / 8. "
            "Its logits are not rounded to bf16 here",
            disjoint,
            prefix=True,
            quoted="bits per byte",
        ),
    )
}


def convention_of(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise EvaluationError(f"convention must be one of {', '.join(CONVENTIONS)}; got {name!r}.")
    return CONVENTIONS[name]


def check_settings(settings: Settings) -> Convention:
    """The convention of the settings, if they fit it."""
    convention = convention_of(settings.convention)
    if settings.ctx < 2:
        raise EvaluationError(f"ctx must be at least 2, because a token is predicted from another; got {settings.ctx}.")
    if convention.strided and not 1 <= settings.stride <= settings.ctx:
        raise EvaluationError(
            f"stride must be between 1 and the context, {settings.ctx}; got {settings.stride}. "
            "A larger stride would leave tokens out."
        )
    if settings.max_tokens is not None and settings.max_tokens < 2:
        raise EvaluationError(f"max_tokens must be at least 2; got {settings.max_tokens}.")
    return convention


def windows_of(num_tokens: int, settings: Settings, what: str) -> list[Window]:
    """The windows of a text, or a reason why it has none."""
    convention = check_settings(settings)
    least = convention.least_windows * convention.longest(settings.ctx, settings.stride)
    if convention.least_windows > 1 and num_tokens < least:
        raise EvaluationError(
            f"convention {settings.convention} needs at least {least} tokens for a context of {settings.ctx}; "
            f"{what} has {num_tokens}. Use a smaller context, or another convention."
        )
    return list(convention.windows(num_tokens, settings))
