# SPDX-License-Identifier: Apache-2.0
"""Checks of what only divergences take: a direction, and a teacher beside the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_ppl import checks, dtensors
from fused_ppl.records import Divergence
from fused_ppl.spec import DIRECTIONS, TAILS, TopK


def check_divergence(direction: str, beta: float, logit_scale: float, softcap: float | None) -> Divergence:
    """The numbers of a divergence; the last two are the teacher's."""
    checks.check_choice("direction", direction, DIRECTIONS)
    hint = "Nearer to 0 use direction='forward', and nearer to 1 direction='reverse'."
    checks.check_number("beta", beta, "in [0.001, 0.999]", lambda a: 0.001 <= a <= 0.999, hint=hint)
    if direction != "jensen_shannon" and beta != 0.5:
        raise ValueError(
            f"beta only has an effect with direction='jensen_shannon'; got beta={beta!r} and direction={direction!r}. "
            "Leave beta out, or use direction='jensen_shannon'."
        )
    rule = "> 0 and finite"
    checks.check_number("teacher_logit_scale", logit_scale, rule, lambda a: 0 < a < float("inf"))
    if softcap is not None:
        checks.check_number("teacher_softcap", softcap, f"{rule}, or None for no cap", lambda a: 0 < a < float("inf"))
    return Divergence(direction, float(beta), float(logit_scale), None if softcap is None else float(softcap))


def check_plain(*tensors: Any) -> None:
    """A divergence takes whole vocabularies: neither DTensors nor shards."""
    if not dtensors.all_plain(*tensors) and any(dtensors.is_distributed(t) for t in tensors if t is not None):
        raise NotImplementedError(
            "a divergence takes plain tensors with all classes; got a DTensor. Pass .full_tensor() of the weights, "
            "and group= for ranks that hold other tokens."
        )


def check_teacher_logits(input: Tensor, teacher: object) -> None:
    logits = checks.check_float_input("teacher_input", teacher)
    if logits.shape != input.shape:
        raise ValueError(
            f"teacher_input must have the shape of input, {tuple(input.shape)}; got {tuple(logits.shape)}. "
            "Both models must have one vocabulary."
        )
    checks.check_device("teacher_input", logits, input)


def check_teacher(
    input: Tensor, linear_weight: Tensor, hidden: Tensor, weight: Tensor | None, *, bias: Tensor | None
) -> None:
    """Check the head of a teacher by itself, and beside the student's: the same tokens, and the same vocabulary."""
    if weight is None:
        raise ValueError(
            "teacher_linear_weight is missing: hidden states need the head that reads them. Pass it, or pass a "
            "fused_ppl.TopK as teacher_input where only the most likely classes are known."
        )
    checks.check_head(hidden, weight, bias, whose="teacher_")
    if weight.shape[0] != linear_weight.shape[0]:
        raise ValueError(
            f"teacher_linear_weight must have {linear_weight.shape[0]} rows, because both heads have one vocabulary; "
            f"got {tuple(weight.shape)}. Slice off the classes that only one of them has."
        )
    if hidden.shape[:-1] != input.shape[:-1]:
        shape = (*input.shape[:-1], hidden.shape[-1])
        raise ValueError(f"teacher_input must have shape {shape}; got {tuple(hidden.shape)}.")
    checks.check_device("teacher_input", hidden, input)


def check_no_second_head(weight: object, bias: object) -> None:
    if weight is not None or bias is not None:
        raise ValueError(
            "a fused_ppl.TopK is the whole teacher; got teacher_linear_weight or teacher_linear_bias beside it. "
            "Leave them out."
        )


def check_top_k(teacher: TopK, asked: Divergence, input: Tensor, *, shape: Sequence[int], stats: bool) -> Divergence:
    """Check all but the values of a top-k teacher for tokens of `shape`. Returns the divergence with its tail."""
    checks.check_choice("tail", teacher.tail, TAILS)
    ids = checks.check_indices("teacher_input.ids", teacher.ids, ".long()")
    log_probs = checks.check_float_input("teacher_input.log_probs", teacher.log_probs)
    if ids.ndim == 0 or tuple(ids.shape[:-1]) != tuple(shape) or not ids.shape[-1]:
        rule = f"({', '.join(str(n) for n in [*shape, 'K'])}), K >= 1"
        raise ValueError(f"teacher_input.ids must have shape {rule}; got {tuple(ids.shape)}.")
    checks.check_constant("teacher_input.log_probs", log_probs, ids.shape, "that of the ids", input=input)
    checks.check_device("teacher_input.ids", ids, input)
    if asked.teacher_logit_scale != 1 or asked.teacher_softcap is not None:
        raise ValueError(
            "teacher_logit_scale and teacher_softcap are of a teacher's logits, and a fused_ppl.TopK has "
            "log-probabilities. Compute them from logits that are scaled and capped already, and leave both out."
        )
    if teacher.tail == "drop" and asked.direction == "reverse":
        raise ValueError(
            "direction='reverse' is infinite with tail='drop', because the student gives probability to classes that "
            "then have none. Use tail='merge' or tail='spread'."
        )
    if stats and teacher.tail == "merge":
        raise ValueError(
            "statistics of every token need a probability for every class, and tail='merge' has none. "
            "Use tail='drop' or tail='spread', or the function without statistics."
        )
    return asked._replace(tail=teacher.tail)
