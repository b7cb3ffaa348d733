# SPDX-License-Identifier: Apache-2.0
"""Real text without a download: the standard library of Python as files, tokens and batches, and its unigram model."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
# not every machine has the tests and the packages; encodings and pydoc_data are tables, not prose or code
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
HELD_OUT_EVERY = 10  # one file in ten, or the last tenth of each file when there are fewer than ten


class TextError(ValueError):
    """The text cannot be used. The message gives the reason and a remedy."""


@dataclass(frozen=True)
class Corpus:
    """A text in two splits without common text, in tokens of a vocabulary that was trained on the first split."""

    train: Tensor  # (tokens,) int64; batches are slices of it
    validation: Tensor  # (windows, context) int64; every validation uses all of them
    vocab_size: int
    num_files: int
    num_bytes: int
    bytes_per_token: float  # of the held-out split

    def describe(self) -> str:
        return (
            f"text: {self.num_files:,} files, {self.num_bytes / 1e6:.1f} MB; vocabulary: {self.vocab_size:,}; "
            f"training on {len(self.train):,} tokens, validating on {self.validation.numel():,}"
        )


def load_corpus(paths: Sequence[Path] | None, vocab_size: int, *, context: int, windows: int) -> Corpus:
    """Read the files, hold some out, train a byte-level BPE on the others, and tokenize both.

    The vocabulary is trained without the held-out text, so the validation perplexity is that of unseen text. It is
    smaller than `vocab_size` if the text has too few repeated pairs of tokens to merge.
    """
    paths = standard_library() if paths is None else list(paths)
    documents = [read_document(path) for path in paths]
    train_documents, held_out_documents = split(documents)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        train_documents, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    train, held_out = tokenize(tokenizer, train_documents), tokenize(tokenizer, held_out_documents)
    if min(len(train), len(held_out)) < context:
        raise TextError(
            f"Training and held-out text must each hold one sequence of --context {context} tokens; got {len(train)} "
            f"and {len(held_out)} tokens. Give more --text, or a smaller --context."
        )
    return Corpus(
        train=train,
        validation=even_windows(held_out, context=context, count=windows),
        vocab_size=tokenizer.get_vocab_size(),
        num_files=len(paths),
        num_bytes=count_bytes(documents),
        bytes_per_token=count_bytes(held_out_documents) / len(held_out),
    )


def standard_library() -> list[Path]:
    """Return the sources of the standard library of Python, in an order that does not depend on the machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    if not paths:
        raise TextError(f"The default text is Python's own library, but {root} holds no .py file; use --text.")
    return paths


def read_document(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TextError(f"--text takes readable files; {path} is not one ({error.strerror}).") from error


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return training and held-out documents, which have no part of the text in common."""
    if len(documents) >= HELD_OUT_EVERY:
        held_out = list(documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        return [text for i, text in enumerate(documents) if (i + 1) % HELD_OUT_EVERY], held_out
    cuts = [len(text) - len(text) // HELD_OUT_EVERY for text in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]


def tokenize(tokenizer: ByteLevelBPETokenizer, documents: Sequence[str]) -> Tensor:
    """Return all ids, (tokens,), with the end-of-text token after each document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch(list(documents))
    return torch.tensor([token for encoding in encodings for token in (*encoding.ids, end)], dtype=torch.int64)


def count_bytes(documents: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in documents)


def random_batches(stream: Tensor, batch_size: int, context: int, *, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` batches of (batch_size, context) tokens from random positions, which depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context)
    for _ in range(steps):
        starts = torch.randint(len(stream) - context + 1, (batch_size, 1), generator=generator)
        yield stream[starts + window]


def even_windows(stream: Tensor, *, context: int, count: int) -> Tensor:
    """Return at most `count` windows, (windows, context), spread evenly over the stream and without overlap."""
    windows = stream[: len(stream) // context * context].view(-1, context)
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()]


def unigram_perplexity(train: Tensor, targets: Tensor, vocab_size: int) -> float:
    """Return the perplexity of a model that knows the frequencies of the tokens only.

        p(v) = (count of v in the training split + 1) / (number of its tokens + V)

    A language model with a higher perplexity has learnt less than these frequencies. Negative targets are ignored.
    """
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    log_p = (counts / counts.sum()).log()
    return log_p[targets[targets >= 0]].mean().neg().exp().item()
