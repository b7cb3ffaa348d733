# SPDX-License-Identifier: Apache-2.0
"""A language model that learns in seconds on two cores, and its texts: Python's sources, and prose of its reference."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILES = 120
PARTS = 60  # of the prose


@dataclass(frozen=True)
class Windows:
    """Windows (n, context + 1) of tokens: a context, and the token after it."""

    train: Tensor
    held_out: Tensor
    tokenizer: Any

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random contexts (size, context) and targets (size,)."""
        chosen = self.train[torch.randint(len(self.train), (size,))]
        return chosen[:, :-1], chosen[:, -1]


def source(name: str) -> str:
    return (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text(errors="replace")


def sources(without: Collection[str] = ()) -> list[str]:
    """Texts of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(folder.glob("*.py")) if path.stem not in without]
    return [path.read_text(errors="replace") for path in paths[:FILES]]


def prose() -> list[str]:
    """Python's reference in English, in parts of whole lines."""
    lines = re.sub(r"\\n'\n\s*'|\\n\"\n\s*\"", "\n", source("pydoc_data/topics")).split("\n")
    size = len(lines) // PARTS
    return ["\n".join(lines[i * size : (i + 1) * size]) for i in range(PARTS)]


def tokenizer_of(texts: Sequence[str], num_classes: int) -> Any:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, num_classes, show_progress=False)
    return tokenizer


def context_windows(tokenizer: Any, text: str, context: int) -> Tensor:
    """(n, context + 1)"""
    return torch.tensor(tokenizer.encode(text).ids).unfold(0, context + 1, 1)


def windows_of(texts: Sequence[str], tokenizer: Any, *, context: int, held_out: int) -> Windows:
    """Every tenth text is held out."""
    train = context_windows(tokenizer, "".join(t for i, t in enumerate(texts) if i % 10), context)
    held = context_windows(tokenizer, "".join(texts[::10]), context)
    return Windows(train, held[:: max(1, len(held) // held_out)][:held_out], tokenizer)


def windows(num_classes: int, *, context: int, held_out: int, without: Collection[str] = ()) -> Windows:
    """Python's sources; the vocabulary is trained without what is held out."""
    texts = sources(without)
    tokenizer = tokenizer_of([t for i, t in enumerate(texts) if i % 10], num_classes)
    return windows_of(texts, tokenizer, context=context, held_out=held_out)


class WindowModel(nn.Module):
    """The hidden state before the next token, from the last `context` tokens; `head` gives the logits."""

    def __init__(self, num_classes: int, *, context: int, size: int = 64) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(num_classes, size), nn.Linear(size, num_classes, bias=False)
        self.body = nn.Sequential(nn.Linear(context * size, 2 * size), nn.GELU(), nn.Linear(2 * size, size), nn.GELU())

    def forward(self, contexts: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embedding(contexts).flatten(1))
        return hidden
