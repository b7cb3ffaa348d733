# SPDX-License-Identifier: Apache-2.0
"""Perplexity that can be quoted: of texts under a named convention, from hidden states and a fused head.

It needs transformers and numpy (`pip install 'fused-ppl[eval]'`), and is not imported by `fused_ppl` itself.
"""

from fused_ppl.evaluation.conventions import CONVENTIONS
from fused_ppl.evaluation.evaluate import evaluate
from fused_ppl.evaluation.models import HiddenModel, load
from fused_ppl.evaluation.records import Document, EvaluationError, Settings, TokenRow
from fused_ppl.evaluation.result import Evaluation
from fused_ppl.evaluation.statistics import Row
from fused_ppl.evaluation.texts import read_texts
from fused_ppl.evaluation.token_file import TokenFile

__all__ = [
    "CONVENTIONS",
    "Document",
    "Evaluation",
    "EvaluationError",
    "HiddenModel",
    "Row",
    "Settings",
    "TokenFile",
    "TokenRow",
    "evaluate",
    "load",
    "read_texts",
]
