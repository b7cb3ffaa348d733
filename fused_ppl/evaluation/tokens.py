# SPDX-License-Identifier: Apache-2.0
"""Tokens of a text, with the bytes that each of them stands for.

Bits per byte need the bytes of the text itself. A table of the tokenizer's words is wrong where a token is a part of a
character, and a published 0.9485 was 1.1289 for that reason. So every byte of the text belongs to exactly one token
here, or the text is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fused_ppl.evaluation.records import EvaluationError, Tokens


def check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise EvaluationError(
            "tokenizer must be a fast one of transformers (PreTrainedTokenizerFast), which says where each token "
            f"stands in the text; got {type(tokenizer).__name__}."
        )


def tokenize(tokenizer: Any, text: str, name: str = "the text") -> Tokens:
    """The tokens of a text without special tokens around it, and the bytes of each.

    Raises:
        EvaluationError: a part of the text is in no token, so that no number for its bytes would be right.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoding["input_ids"], dtype=np.int64)
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    exact = _bytes_of_words(tokenizer, ids, text)
    warning = "" if exact is not None else _loss(tokenizer, ids, text)
    num_bytes = _bytes_of_spans(offsets, text, tokenizer, ids=ids, name=name) if exact is None else exact
    return Tokens(ids, num_bytes, offsets[:, 0].copy(), warning)


def _loss(tokenizer: Any, ids: NDArray[np.int64], text: str) -> str:
    """A warning if the tokens do not say the whole text: a model then predicts less than its bytes."""
    unknown = 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())
    if unknown:
        name = repr(tokenizer.unk_token)
        return f"{unknown} tokens are {name}, which stands for any text, so the bits per byte are too low."
    decoded = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    if decoded.strip() != text.strip():
        return "The tokenizer changes the text (case, accents or composed characters), so its bits are of another text."
    return ""


def _bytes_of_words(tokenizer: Any, ids: NDArray[np.int64], text: str) -> NDArray[np.int32] | None:
    """The bytes of byte-level tokens, each a string of bytes. None unless they spell the text."""
    added, words = tokenizer.added_tokens_decoder, list[bytes]()
    for token, word in zip(ids.tolist(), tokenizer.convert_ids_to_tokens(ids.tolist()), strict=True):
        spelled = added[token].content.encode() if token in added else bytes_of_word(word)
        if spelled is None:
            return None
        words.append(spelled)
    if b"".join(words) != text.encode():
        return None
    return np.asarray([len(word) for word in words], dtype=np.int32)


def bytes_of_word(word: str) -> bytes | None:
    table = _byte_of_character()
    if any(c not in table for c in word):
        return None
    return bytes(table[c] for c in word)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (Radford et al. 2019): printable bytes are themselves, others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _bytes_of_spans(
    offsets: NDArray[np.int64], text: str, tokenizer: Any, *, ids: NDArray[np.int64], name: str
) -> NDArray[np.int32]:
    """The bytes of each token from its span of characters; tokens of one character share its bytes."""
    sizes = np.asarray([len(c.encode()) for c in text], dtype=np.int64)
    place = np.concatenate(([0], np.cumsum(sizes)))
    ends = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else np.zeros(0, dtype=np.int64)
    _close_gaps(offsets[:, 0], ends, text)
    covered = np.concatenate(([0], ends))  # characters covered before each token, and by all
    gaps = np.flatnonzero(offsets[:, 0] > covered[:-1])
    if len(gaps) or covered[-1] < len(text):
        i = int(gaps[0]) if len(gaps) else len(ids)
        start, stop = int(covered[i]), int(offsets[i, 0]) if i < len(ids) else len(text)
        before = f"after token {i - 1} ({tokenizer.convert_ids_to_tokens(int(ids[i - 1]))!r})" if i else "at its start"
        raise EvaluationError(
            f"The bytes of the tokens must add up to the text, but in {name} {before} the tokenizer drops "
            f"{text[start : min(stop, start + 20)]!r} at byte {place[start]}. Its numbers per byte would be wrong. "
            "Use a tokenizer that keeps all of the text."
        )
    return np.diff(place[covered]).astype(np.int32)


def _close_gaps(starts: NDArray[np.int64], ends: NDArray[np.int64], text: str) -> None:
    """Combining marks that a normaliser has joined with the character before them belong to its token."""
    following = np.append(starts[1:], len(text))
    for i in np.flatnonzero(following > ends).tolist():
        if all(unicodedata.combining(c) for c in text[ends[i] : following[i]]):
            ends[i] = following[i]


def vocabulary_size(ids: NDArray[np.int64]) -> int:
    return int(ids.max()) + 1 if len(ids) else 0


def decoded_bytes(tokenizer: Any, ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """len(decode([id])) in bytes of each token, as nanochat counts; 0 of special tokens."""
    special = set(tokenizer.all_special_ids)
    unique, places = np.unique(ids, return_inverse=True)
    texts = tokenizer.batch_decode(unique.reshape(-1, 1).tolist(), clean_up_tokenization_spaces=False)
    sizes = [0 if i in special else len(t.encode()) for i, t in zip(unique.tolist(), texts, strict=True)]
    return np.asarray(sizes, dtype=np.int32)[places]


def added_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a text by itself."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def tokenizer_hash(tokenizer: Any) -> str:
    """Of everything that decides which tokens a text has; padding and truncation depend on earlier calls."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["padding"] = whole["truncation"] = None
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]
