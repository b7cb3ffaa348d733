# SPDX-License-Identifier: Apache-2.0
"""Checks of what only divergences take: a direction, and a teacher beside the student."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_ppl import checks, dtensors
from fused_ppl.records import Divergence, Teacher
from fused_ppl.spec import DIRECTIONS


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


def check_teacher(input: Tensor, linear_weight: Tensor, teacher: Teacher) -> None:
    """Check the head of a teacher by itself, and beside the student's: the same tokens, and the same vocabulary."""
    hidden, weight, bias = teacher
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
