# SPDX-License-Identifier: Apache-2.0
"""A language model that learns in seconds on two cores, and its text: windows of tokens of Python's own sources."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

FILES = 120


@dataclass(frozen=True)
class Windows:
    """Windows (n, context + 1) of tokens: a context, and the token after it."""

    train: Tensor
    held_out: Tensor

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random contexts (size, context) and targets (size,)."""
        chosen = self.train[torch.randint(len(self.train), (size,))]
        return chosen[:, :-1], chosen[:, -1]


def sources() -> list[str]:
    """Texts of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(errors="replace") for path in sorted(folder.glob("*.py"))[:FILES]]


def windows(num_classes: int, *, context: int, held_out: int) -> Windows:
    """Every tenth file is held out; the vocabulary is trained on the others."""
    from tokenizers import ByteLevelBPETokenizer

    texts = sources()
    seen = [text for i, text in enumerate(texts) if i % 10]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(seen, num_classes, show_progress=False)
    parts = []
    for chosen in (seen, texts[::10]):
        ids = torch.tensor(tokenizer.encode("".join(chosen)).ids)
        parts.append(ids.unfold(0, context + 1, 1))
    step = max(1, len(parts[1]) // held_out)
    return Windows(parts[0], parts[1][::step][:held_out])


class WindowModel(nn.Module):
    """The hidden state before the next token, from the last `context` tokens; `head` gives the logits."""

    def __init__(self, num_classes: int, *, context: int, size: int = 64) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(num_classes, size), nn.Linear(size, num_classes, bias=False)
        self.body = nn.Sequential(nn.Linear(context * size, 2 * size), nn.GELU(), nn.Linear(2 * size, size), nn.GELU())

    def forward(self, contexts: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embedding(contexts).flatten(1))
        return hidden
