# SPDX-License-Identifier: Apache-2.0
"""Fused perplexity and cross-entropy losses over large vocabularies, for PyTorch, in Triton and in plain PyTorch."""

from fused_ppl.accumulate import PerplexityAccumulator
from fused_ppl.divergences import (
    kl_divergence,
    kl_divergence_with_stats,
    linear_kl_divergence,
    linear_kl_divergence_with_stats,
)
from fused_ppl.functional import (
    cross_entropy,
    cross_entropy_with_stats,
    linear_cross_entropy,
    linear_cross_entropy_with_stats,
    linear_perplexity,
    perplexity,
)
from fused_ppl.metrics import Perplexity
from fused_ppl.modules import CrossEntropyLoss, LinearCrossEntropyLoss, LinearPerplexityLoss, PerplexityLoss
from fused_ppl.spec import DivergenceOutput, LogProbs, LossOutput, Options, TopK
from fused_ppl.targets import next_token_targets
from fused_ppl.token_values import linear_log_probs, linear_token_loss, log_probs

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "DivergenceOutput",
    "LinearCrossEntropyLoss",
    "LinearPerplexityLoss",
    "LogProbs",
    "LossOutput",
    "Options",
    "Perplexity",
    "PerplexityAccumulator",
    "PerplexityLoss",
    "TopK",
    "cross_entropy",
    "cross_entropy_with_stats",
    "kl_divergence",
    "kl_divergence_with_stats",
    "linear_cross_entropy",
    "linear_cross_entropy_with_stats",
    "linear_kl_divergence",
    "linear_kl_divergence_with_stats",
    "linear_log_probs",
    "linear_perplexity",
    "linear_token_loss",
    "log_probs",
    "next_token_targets",
    "perplexity",
]
