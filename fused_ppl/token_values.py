# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and entropies of tokens with gradients: what losses of preferences and policies are made of.

The two public functions. Nothing is computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fused_ppl import prepare
from fused_ppl.prepare import Extras
from fused_ppl.spec import LogProbs, LossSpec, Options

if TYPE_CHECKING:
    from fused_ppl.groups import VocabGroup


def log_probs(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = -100,
    class_dim: int = 1,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> LogProbs:
    """The log-probability of each target, the entropy of each prediction, and lse, from logits, all differentiable.

        z[i,v] = cap(logit_scale * input[i,v])          cap(a) = softcap * tanh(a / softcap), or a without softcap
        lse[i] = log sum_v exp z[i,v]                   log_prob[i] = z[i, y_i] - lse[i]
        entropy[i] = -sum_v p[i,v] * log p[i,v]         p[i,v] = exp(z[i,v] - lse[i])

        d log_prob / dz[v] = [v = y] - p[v]     d lse / dz[v] = p[v]     d entropy / dz[v] = -p[v] * (log p[v] + entropy)

    Any of the three may have an upstream gradient, and one that has none costs nothing. The only buffer of the size of
    the logits is their gradient. DPO, KTO, PPO and GRPO are sums of such values: docs/per_token_losses.md.

    Args:
        input: (C,), (N, C) or (N, C, d1, ...), or with the classes at `class_dim`. float16, bfloat16, float32 or
            float64, with any strides.
        target: the shape of `input` without the classes. int64 or int32, each in [0, C) or equal to `ignore_index`.
        ignore_index: tokens with this target are ignored. Their values are 0 and have no gradient. With None, no token
            is ignored.
        class_dim: the dimension of the classes. Use -1 for logits of shape (B, T, V).
        logit_scale: > 0, a factor of the logits (1 / temperature). A number, or a tensor of shape ().
        softcap: > 0, or None for no cap. A number, or a tensor of shape ().
        vocab_group: the ranks that hold the other classes, as in `cross_entropy`.
        options: how the values are computed, see `Options`. `inplace_backward` must be False.

    Returns:
        `LogProbs` of tensors in nats, of the shape of `target`, in float32, or in float64 for float64 input.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype is not supported.
        IndexError: a target is out of range. On a GPU its values are NaN instead, unless FUSED_PPL_DEBUG=1 is set.
        NotImplementedError: a named backend cannot run here, or the gradient is asked for in torch.export or in a
            transform of torch.func under torch.compile.

    Example:
        >>> import torch, fused_ppl
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> values = fused_ppl.log_probs(logits, torch.tensor([0, 2]))
        >>> values.log_prob
        tensor([-0.2395, -1.0986], grad_fn=<LogitsTokensBackward>)
        >>> values.entropy.detach()
        tensor([0.6656, 1.0986])
    """
    spec = _spec(ignore_index, logit_scale, softcap)
    return prepare.log_probs_from_logits(input, target, spec, class_dim=class_dim, extras=_extras(options, vocab_group))


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> LogProbs:
    """`log_probs` from hidden states and the weight of the LM head: logits of size N x V are never in memory.

        logits = input @ linear_weight.T + linear_bias

    Forward takes 2NVD FLOPs, and backward 6NVD: it computes the logits again, by slices of the vocabulary, because the
    upstream gradients are known only then.

    Args:
        input: (..., D), hidden states in float16, bfloat16, float32 or float64.
        linear_weight: (V, D), the weight of the head.
        target: the shape of `input` without D. int64 or int32, each in [0, V) or equal to `ignore_index`.
        linear_bias: (V,), or None.
        ignore_index, logit_scale, softcap: as in `log_probs`.
        vocab_group: the ranks that hold the other rows of `linear_weight`, as in `linear_cross_entropy`.
        options: how the values are computed, see `Options`. `memory_budget` bounds the buffers. There is no compact
            plan.

    Returns:
        `LogProbs` as of `log_probs`. The gradients of `input`, `linear_weight` and `linear_bias` are exact.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: as in `log_probs`.

    Example:
        >>> import torch, fused_ppl
        >>> hidden, weight = torch.eye(2), torch.zeros(5, 2)
        >>> fused_ppl.linear_log_probs(hidden, weight, torch.tensor([1, 4])).entropy
        tensor([1.6094, 1.6094])
    """
    spec = _spec(ignore_index, logit_scale, softcap)
    return prepare.log_probs_from_hidden(
        input, linear_weight, target, spec, linear_bias=linear_bias, extras=_extras(options, vocab_group)
    )


def _spec(ignore_index: int | None, logit_scale: float | Tensor, softcap: float | Tensor | None) -> LossSpec:
    return LossSpec.of(
        reduction="none", ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, stats=True
    )


def _extras(options: Options | None, vocab_group: VocabGroup | None) -> Extras:
    return Extras(None, None, num_items=None, options=options, group=None, vocab_group=vocab_group)
