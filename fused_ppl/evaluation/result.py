# SPDX-License-Identifier: Apache-2.0
"""What an evaluation returns: its numbers, and the line that pins them."""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch

import fused_ppl
from fused_ppl.evaluation.conventions import CONVENTIONS, Convention
from fused_ppl.evaluation.records import Settings
from fused_ppl.evaluation.statistics import Interval, Row


@dataclass(frozen=True)
class Evaluation:
    """The perplexity of texts, and everything that a reader needs to get the same number."""

    settings: Settings
    total: Row  # of all tokens together (micro)
    rows: list[Row]  # of each domain
    macro_perplexity: float  # the mean over domains
    macro_bits_per_byte: float
    model: str
    dtype: str
    bos: str  # what was done about it
    tokenizer_hash: str
    text_hash: str
    versions: dict[str, str]
    seconds: float  # of this process
    tokens_per_second: float
    peak_memory: int | None  # bytes: of the GPU, or of this process
    replaced: int  # characters that stand for invalid UTF-8
    warnings: list[str]

    @property
    def convention(self) -> Convention:
        return CONVENTIONS[self.settings.convention]

    @property
    def headline(self) -> tuple[str, float]:
        """The number that this convention is quoted by."""
        values = {
            "perplexity": self.total.perplexity,
            "macro perplexity": self.macro_perplexity,
            "bits per byte": self.total.bits_per_byte,
        }
        return self.convention.quoted, values[self.convention.quoted]

    @property
    def headline_interval(self) -> Interval | None:
        """Of the headline, 95 %; None of a mean over domains."""
        of = {"perplexity": self.total.perplexity_interval, "bits per byte": self.total.bits_per_byte_interval}
        return of.get(self.convention.quoted)

    def quote(self) -> str:
        """One line that pins the number."""
        name, value = self.headline
        s, stride = self.settings, ""
        if self.convention.strided:
            stride = f", stride {s.stride}"
        interval = self.headline_interval
        spread = "" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]"
        most = "" if s.max_tokens is None else f", first {s.max_tokens} tokens of each text"
        versions = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        return (
            f"{name} {value:.4f}{spread} ({s.convention}, ctx {s.ctx}{stride}, {self.bos}, {self.dtype}{most}; "
            f"{self.model}, tokenizer {self.tokenizer_hash}, text {self.text_hash}; {versions})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        name, value = self.headline
        whole = dataclasses.asdict(self)
        whole |= {"quote": self.quote(), "formula": self.convention.formula}
        found: dict[str, Any] = finite({"headline": {name: value}, **whole})
        return found


def finite(value: Any) -> Any:
    """JSON has no NaN and no inf: None takes their place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that were allocated on a GPU, or resident in this process; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    found = {"fused_ppl": fused_ppl.__version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        import transformers

        found["transformers"] = transformers.__version__
    except ImportError:
        pass
    return found
