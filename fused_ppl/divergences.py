# SPDX-License-Identifier: Apache-2.0
"""The divergence of two predictions over one vocabulary: for distillation, and to compare two models.

The public functions. Nothing is computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fused_ppl import prepare
from fused_ppl.divergence_checks import check_divergence
from fused_ppl.prepare import DivergenceExtras, Extras, TeacherGiven
from fused_ppl.spec import DivergenceOutput, LossSpec, Options, TopK

if TYPE_CHECKING:
    from fused_ppl.groups import Group


def kl_divergence(
    input: Tensor,
    teacher_input: Tensor | TopK,
    target: Tensor | None = None,
    *,
    direction: str = "forward",
    beta: float = 0.5,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    class_dim: int = 1,
    logit_scale: float | Tensor = 1.0,
    teacher_logit_scale: float = 1.0,
    softcap: float | Tensor | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    options: Options | None = None,
) -> Tensor:
    """The divergence of a student's prediction p from a teacher's prediction q, from the logits of both, in nats.

        p = softmax(cap(logit_scale * input)),  q = softmax(cap(teacher_logit_scale * teacher_input)), over the classes

        forward         KL(q || p) = sum_v q log(q / p)                          d/dz = p - q
        reverse         KL(p || q) = sum_v p log(p / q)                          d/dz = p (log(p / q) - KL)
        jensen_shannon  beta KL(q || m) + (1 - beta) K,  K = KL(p || m)          d/dz = (1 - beta) p (log(p / m) - K)
                        with the mixture m = beta q + (1 - beta) p

    "forward" is the KL of knowledge distillation (Hinton et al. 2015), "jensen_shannon" that of generalised knowledge
    distillation (Agarwal et al. 2024), with the meaning of `beta` that TRL and Liger have. The teacher is a constant.

    Args:
        input: logits of the student, as in `cross_entropy`.
        teacher_input: logits of the teacher, of the same shape. Its dtype may be another. Or a `TopK`, where only the
            most likely classes of each token are known.
        target: only says which tokens count: those that differ from `ignore_index`. None counts all of them.
        direction: "forward", "reverse" or "jensen_shannon".
        beta: in [0.001, 0.999], only for "jensen_shannon": the teacher's share of the mixture.
        ignore_index, reduction, class_dim, token_weight, num_items, group, options: as in `cross_entropy`.
            `inplace_backward` and the options of the compact plan are refused.
        logit_scale, softcap, teacher_logit_scale, teacher_softcap: of the logits of each. A temperature T of
            distillation is a scale of 1 / T; a factor of T^2 is yours to multiply.

    Returns:
        The loss, of shape () for "mean" and "sum", else of the shape that `reduction` says, in float32, or in float64
        for float64 input. It is inf where the second distribution of a KL gives no mass to a class of the first.

    Raises:
        ValueError: a shape, device, number or option does not fit.
        TypeError: a dtype is not supported.
        IndexError: a target is out of range.
        NotImplementedError: a DTensor is given, a named backend cannot run here, or the gradient is asked for in
            torch.export or in a transform of torch.func under torch.compile.

    Example:
        >>> import torch, fused_ppl
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[8.0, 0.0, 0.0, 0.0]])
        >>> round(fused_ppl.kl_divergence(student, teacher).item(), 4)
        1.3772
        >>> round(fused_ppl.kl_divergence(student, teacher, direction="jensen_shannon").item(), 4)
        0.3767
    """
    asked = check_divergence(direction, beta, teacher_logit_scale, teacher_softcap)
    spec = LossSpec.of(
        reduction=reduction, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, stats=False
    )
    extras = DivergenceExtras(asked, Extras(None, token_weight, num_items, options, group, None))
    return prepare.divergence_from_logits(input, teacher_input, target, spec, class_dim=class_dim, extras=extras).loss


def kl_divergence_with_stats(
    input: Tensor,
    teacher_input: Tensor | TopK,
    target: Tensor | None = None,
    *,
    direction: str = "forward",
    beta: float = 0.5,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    class_dim: int = 1,
    logit_scale: float | Tensor = 1.0,
    teacher_logit_scale: float = 1.0,
    softcap: float | Tensor | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    options: Options | None = None,
) -> DivergenceOutput:
    """`kl_divergence` with what the same pass says of every token: docs/divergence.md compares two models by it.

    Args:
        input, teacher_input, and all keywords: as in `kl_divergence`.
        target: the classes at which `log_prob_difference` compares both log-probabilities. None takes class 0.

    Returns:
        `DivergenceOutput`. Only `loss` is differentiable.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: as in `kl_divergence`.

    Example:
        >>> import torch, fused_ppl
        >>> out = fused_ppl.kl_divergence_with_stats(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1]))
        >>> out.divergence.item(), out.agrees.item(), round(out.entropy.item(), 4)
        (0.0, True, 0.6931)
    """
    asked = check_divergence(direction, beta, teacher_logit_scale, teacher_softcap)
    spec = LossSpec.of(
        reduction=reduction, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, stats=True
    )
    extras = DivergenceExtras(asked, Extras(None, token_weight, num_items, options, group, None))
    return prepare.divergence_from_logits(input, teacher_input, target, spec, class_dim=class_dim, extras=extras)


def linear_kl_divergence(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor | TopK,
    teacher_linear_weight: Tensor | None = None,
    *,
    target: Tensor | None = None,
    linear_bias: Tensor | None = None,
    teacher_linear_bias: Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    logit_scale: float | Tensor = 1.0,
    teacher_logit_scale: float = 1.0,
    softcap: float | Tensor | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    options: Options | None = None,
) -> Tensor:
    """`kl_divergence` from the hidden states and heads of two models: logits of size N x V are never in memory.

        logits = input @ linear_weight.T + linear_bias, and the same of the teacher

    Both heads have one vocabulary; hidden sizes may differ. A chunk of rows has the logits of both at the same time.
    With gradients, a mean or sum takes four matrix products: the logits of each head, and the gradients of `input` and
    `linear_weight`. Reductions "none" and "sequence" compute the logits of both heads again in backward.

    Args:
        input: hidden states of the student, (..., D).
        linear_weight: (V, D), the weight of the student's head.
        teacher_input: hidden states of the teacher, (..., D of the teacher), with the same leading dimensions. Or a
            `TopK`, where only the most likely classes of each token are known.
        teacher_linear_weight: (V, D of the teacher). None beside a `TopK`.
        target: (...), only says which tokens count, as in `kl_divergence`.
        linear_bias, teacher_linear_bias: (V,) or None.
        All others: as in `kl_divergence`. `Options.memory_budget` bounds the logits of a chunk, but not the float32
            gradient of the weight.

    Returns:
        The loss, as `kl_divergence`.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: as in `kl_divergence`.

    Example:
        >>> import torch, fused_ppl
        >>> student = torch.nn.Linear(3, 5, bias=False)
        >>> hidden, teacher_hidden, teacher_weight = torch.randn(2, 3), torch.randn(2, 7), torch.randn(5, 7)
        >>> loss = fused_ppl.linear_kl_divergence(hidden, student.weight, teacher_hidden, teacher_weight)
        >>> loss.backward()
        >>> student.weight.grad.shape
        torch.Size([5, 3])
    """
    asked = check_divergence(direction, beta, teacher_logit_scale, teacher_softcap)
    spec = LossSpec.of(
        reduction=reduction, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, stats=False
    )
    extras = DivergenceExtras(asked, Extras(None, token_weight, num_items, options, group, None))
    teacher = TeacherGiven(teacher_input, teacher_linear_weight, teacher_linear_bias)
    return prepare.divergence_from_hidden(
        input, linear_weight, teacher, spec, target=target, linear_bias=linear_bias, extras=extras
    ).loss


def linear_kl_divergence_with_stats(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor | TopK,
    teacher_linear_weight: Tensor | None = None,
    *,
    target: Tensor | None = None,
    linear_bias: Tensor | None = None,
    teacher_linear_bias: Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    logit_scale: float | Tensor = 1.0,
    teacher_logit_scale: float = 1.0,
    softcap: float | Tensor | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    options: Options | None = None,
) -> DivergenceOutput:
    """`linear_kl_divergence` with what the same pass says of every token.

    Args:
        input, linear_weight, teacher_input, teacher_linear_weight, and all keywords: as in `linear_kl_divergence`.
        target: also the classes at which `log_prob_difference` compares both log-probabilities. None takes class 0.

    Returns:
        `DivergenceOutput`. Only `loss` is differentiable.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: as in `kl_divergence`.

    Example:
        >>> import torch, fused_ppl
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> out = fused_ppl.linear_kl_divergence_with_stats(hidden, weight, hidden, 2 * weight)
        >>> out.agrees.tolist()
        [True, True]
    """
    asked = check_divergence(direction, beta, teacher_logit_scale, teacher_softcap)
    spec = LossSpec.of(
        reduction=reduction, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, stats=True
    )
    extras = DivergenceExtras(asked, Extras(None, token_weight, num_items, options, group, None))
    teacher = TeacherGiven(teacher_input, teacher_linear_weight, teacher_linear_bias)
    return prepare.divergence_from_hidden(
        input, linear_weight, teacher, spec, target=target, linear_bias=linear_bias, extras=extras
    )
