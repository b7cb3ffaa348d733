# SPDX-License-Identifier: Apache-2.0
"""Perplexity that can be quoted: of texts under a named convention, from hidden states and a fused head.

It needs transformers and numpy (`pip install 'fused-ppl[eval]'`), and is not imported by `fused_ppl` itself.
"""

from fused_ppl.evaluation.comparison import Comparison, compare
from fused_ppl.evaluation.conventions import CONVENTIONS
from fused_ppl.evaluation.evaluate import evaluate
from fused_ppl.evaluation.models import HiddenModel, load
from fused_ppl.evaluation.ranking import Ranked, Ranking, rank
from fused_ppl.evaluation.records import Document, EvaluationError, Settings, TokenRow
from fused_ppl.evaluation.report import Report
from fused_ppl.evaluation.result import Evaluation
from fused_ppl.evaluation.statistics import Row
from fused_ppl.evaluation.texts import read_texts
from fused_ppl.evaluation.token_file import TokenFile

__all__ = [
    "CONVENTIONS",
    "Comparison",
    "Document",
    "Evaluation",
    "EvaluationError",
    "HiddenModel",
    "Ranked",
    "Ranking",
    "Report",
    "Row",
    "Settings",
    "TokenFile",
    "TokenRow",
    "compare",
    "evaluate",
    "load",
    "rank",
    "read_texts",
]
