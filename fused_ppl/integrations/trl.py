# SPDX-License-Identifier: Apache-2.0
"""The functions of `trl.kernels` of TRL 1.16 with the same arguments and results, computed by fused_ppl.

    trl.trainer.utils._ChunkedLogProbFunction = fused_ppl.integrations.trl.ChunkedLogProbFunction

This line, before training starts, gives the losses of TRL's SFT, DPO, KTO, GRPO and RLOO trainers the fused head.
`trl.trainer.distillation_trainer.ChunkedDivergenceFunction` is that of the DistillationTrainer. This module does not
need TRL. Arguments that fused_ppl does not support raise NotImplementedError.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import linear_cross_entropy_with_stats, linear_kl_divergence_with_stats, linear_log_probs
from fused_ppl.integrations.liger import direction_of

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TokenOutputs(NamedTuple):
    """The five results, each of the shape of the targets, or None if it was not asked for."""

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None  # log sum_v p[v]^2; detached
    mean_logits: Tensor | None  # the mean over the vocabulary of the logits after scale and temperature; detached
    is_top1: Tensor | None  # True where the target is the first of the largest logits


class ChunkedLogProbFunction:
    """Log-probabilities of the targets, and more facts about each token, from hidden states and the head."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> TokenOutputs:
        """Return five values of each token. `log_probs` and `entropy` are differentiable.

            z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature

        `log_sum_sq_probs` and `is_top1` take a second pass over the logits, which needs no gradient.

        Args:
            hidden: (N, D), the hidden states.
            weight: (V, D), the weight of the head.
            bias: (V,), or None.
            targets: (N,), int64 or int32, each in [0, V). No target is ignored.
            temperature, logit_scale: > 0.
            chunk_size: ignored. fused_ppl plans its own chunks.
            final_logit_softcapping: > 0, or None for no cap.
            outputs: the names of what to compute in addition to `log_probs`.

        Raises:
            ValueError: a shape or a name in `outputs` does not fit.
            IndexError: a target is out of range. TRL takes its logit for 0.
            NotImplementedError: `mean_logits` is asked for with a softcap, or DeepSpeed's ZeRO-3 shards the weight.

        Example:
            >>> import torch
            >>> hidden, weight, target = torch.zeros(2, 8), torch.zeros(50, 8), torch.tensor([0, 1])
            >>> out = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32768, outputs=("entropy",))
            >>> out.log_probs, out.is_top1
            (tensor([-3.9120, -3.9120]), None)
        """
        _check(weight, outputs, final_logit_softcapping)
        weight, bias = _in_dtype_of(hidden, weight, bias)
        # the cap comes before the temperature: cap_s(a) / T = cap_(s / T)(a / T)
        scale, cap = logit_scale / temperature, final_logit_softcapping
        cap = None if cap is None else cap / temperature
        values = linear_log_probs(
            hidden, weight, targets, linear_bias=bias, ignore_index=None, logit_scale=scale, softcap=cap
        )
        log_sum_sq_probs = is_top1 = mean_logits = None
        if "log_sum_sq_probs" in outputs or "is_top1" in outputs:
            with torch.no_grad():
                # sum_v p[v]^2 = sum_v exp(2 z[v] - 2 lse), and twice the logits have the same argmax
                doubled = linear_cross_entropy_with_stats(
                    hidden,
                    weight,
                    targets,
                    linear_bias=bias,
                    ignore_index=None,
                    reduction="sum",
                    logit_scale=2 * scale,
                    softcap=None if cap is None else 2 * cap,
                )
                log_sum_sq_probs = doubled.lse - 2 * values.lse
                is_top1 = doubled.predicted == targets
        if "mean_logits" in outputs:
            mean_logits = _mean_logits(hidden, weight, bias) * scale
        return TokenOutputs(
            values.log_prob,
            values.entropy if "entropy" in outputs else None,
            log_sum_sq_probs if "log_sum_sq_probs" in outputs else None,
            mean_logits,
            is_top1 if "is_top1" in outputs else None,
        )


class ChunkedDivergenceFunction:
    """The divergence of a student from a teacher for each token, and the student's entropy, from both heads."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (divergence, entropy), each (N,). Only the divergence is differentiable, and only for the student.

        Args:
            student_hidden, student_weight, student_bias: (N, D), (V, D), and (V,) or None.
            teacher_hidden, teacher_weight, teacher_bias: the same of the teacher, whose D may differ.
            beta: 0 is the forward KL, 1 the reverse KL, and a number between them the teacher's share of the mixture.
            temperature, student_logit_scale, teacher_logit_scale: > 0.
            student_final_logit_softcapping, teacher_final_logit_softcapping: > 0, or None for no cap.

        Raises:
            ValueError: a shape or a number does not fit.
            NotImplementedError: DeepSpeed's ZeRO-3 shards a weight.

        Example:
            >>> import torch
            >>> hidden, weight = torch.zeros(2, 8), torch.zeros(50, 8)
            >>> ChunkedDivergenceFunction.apply(hidden, weight, None, hidden, weight, None, 0.5)
            (tensor([0., 0.]), tensor([3.9120, 3.9120]))
        """
        _check_whole(student_weight)
        _check_whole(teacher_weight)
        student = _in_dtype_of(student_hidden, student_weight, student_bias)
        teacher = _in_dtype_of(teacher_hidden, teacher_weight, teacher_bias)
        # the cap comes before the temperature, as in `ChunkedLogProbFunction`
        caps = (student_final_logit_softcapping, teacher_final_logit_softcapping)
        student_cap, teacher_cap = (None if cap is None else cap / temperature for cap in caps)
        out = linear_kl_divergence_with_stats(
            student_hidden,
            student.weight,
            teacher_hidden,
            teacher.weight,
            linear_bias=student.bias,
            teacher_linear_bias=teacher.bias,
            reduction="none",
            logit_scale=student_logit_scale / temperature,
            teacher_logit_scale=teacher_logit_scale / temperature,
            softcap=student_cap,
            teacher_softcap=teacher_cap,
            **direction_of(beta),
        )
        return out.loss, out.entropy


class _Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def _in_dtype_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Head:
    """cast_lm_head_to_fp32 of TRL casts the hidden states, and leaves the weight in half precision."""
    if hidden.dtype != torch.float32:
        return _Head(weight, bias)
    return _Head(weight.float(), None if bias is None else bias.float())


def _check(weight: Tensor, outputs: tuple[str, ...], softcap: float | None) -> None:
    unknown = sorted(set(outputs) - {"log_probs", *OPTIONAL_OUTPUTS})
    if unknown:
        raise ValueError(f"outputs must be among {', '.join(OPTIONAL_OUTPUTS)}; got {', '.join(unknown)}.")
    if "mean_logits" in outputs and softcap is not None:
        raise NotImplementedError(
            "mean_logits must not be among the outputs with final_logit_softcapping, because the mean of capped logits "
            "is not a product of sums. Leave it out, or use TRL's own function."
        )
    _check_whole(weight)


def _check_whole(weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise NotImplementedError(
            "The weight must not be sharded by DeepSpeed's ZeRO-3, which frees it before the backward of this "
            "function. Use TRL's own function."
        )


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean of the logits of a token is its product with the mean of the rows of the weight."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.to(dtype) @ weight.mean(0, dtype=dtype)
    return mean if bias is None else mean + bias.mean(dtype=dtype)
