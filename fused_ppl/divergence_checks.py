# SPDX-License-Identifier: Apache-2.0
"""Checks of what only divergences take: a teacher, a direction, and what cannot be asked of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ppl import checks, dtensors
from fused_ppl.records import Divergence, Teacher
from fused_ppl.spec import DIRECTIONS, Options


def check_divergence(direction: str, beta: float, logit_scale: float, softcap: float | None) -> Divergence:
    """The numbers of a divergence; the last two are the teacher's. Its dtype is decided later."""
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
    cap = None if softcap is None else float(softcap)
    return Divergence(direction, float(beta), float(logit_scale), cap, torch.float32)


def check_options(options: Options) -> None:
    if options.inplace_backward:
        raise ValueError(
            "inplace_backward=True is for cross_entropy and perplexity; got it for a divergence. "
            "Use Options(inplace_backward=False)."
        )
    asked = (options.gradient_tolerance, options.gradient_columns, options.screen)
    if any(value is not None for value in asked):
        raise ValueError(
            "gradient_tolerance, gradient_columns and screen belong to the compact plan, which a divergence does not "
            f"have; got {asked}. Leave them None."
        )


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
    """Check hidden states (..., D of the teacher), a weight (V, D of the teacher) and a bias (V,)."""
    hidden = checks.check_float_input("teacher_input", teacher.teacher_hidden)
    weight = checks.check_float_input("teacher_linear_weight", teacher.teacher_weight)
    num_classes = linear_weight.shape[0]
    if weight.ndim != 2 or weight.shape[0] != num_classes or weight.shape[1] == 0:
        raise ValueError(
            f"teacher_linear_weight must have shape ({num_classes}, D of the teacher), because both heads have one "
            f"vocabulary; got {tuple(weight.shape)}. Slice off the classes that only one of them has."
        )
    shape = (*input.shape[:-1], weight.shape[1])
    if tuple(hidden.shape) != shape:
        raise ValueError(f"teacher_input must have shape {shape}; got {tuple(hidden.shape)}.")
    tensors = {"teacher_input": hidden, "teacher_linear_weight": weight}
    if teacher.teacher_bias is not None:
        bias = tensors["teacher_linear_bias"] = checks.check_float_input("teacher_linear_bias", teacher.teacher_bias)
        if tuple(bias.shape) != (num_classes,):
            raise ValueError(f"teacher_linear_bias must have shape ({num_classes},); got {tuple(bias.shape)}.")
    for name, tensor in tensors.items():
        checks.check_device(name, tensor, input)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 and not checks.autocast(input.device.type):
        raise TypeError(
            "teacher_input, teacher_linear_weight and teacher_linear_bias must have one dtype outside autocast; "
            f"got {', '.join(sorted(str(d) for d in dtypes))}. Convert one of them, or use torch.autocast."
        )
