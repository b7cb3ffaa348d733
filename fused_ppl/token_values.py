# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and entropies of tokens with gradients: what losses of preferences and policies are made of.

The public functions. Nothing is computed here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor

from fused_ppl import checks, prepare
from fused_ppl.prepare import Extras
from fused_ppl.spec import LogProbs, LossSpec, Options

if TYPE_CHECKING:
    from fused_ppl.groups import Group, VocabGroup

P = ParamSpec("P")
R = TypeVar("R")


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

        d log_prob / dz[v] = [v = y] - p[v]             d lse / dz[v] = p[v]
        d entropy / dz[v] = -p[v] * (log p[v] + entropy)

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


def linear_token_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    fn: Callable[..., Tensor],
    *per_token: Tensor,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    options: Options | None = None,
) -> Tensor:
    """The sum or mean over tokens of `fn(log_prob, entropy, *per_token)`, through the LM head in three products.

        loss = sum_i fn(log_prob[i], entropy[i], *(c[i] for c in per_token)),  divided by the counted tokens for "mean"

    This function is experimental: its signature may change in any release.

    `fn` is ordinary PyTorch over the tokens of a chunk. Its derivatives are numbers of a token, so the gradient of the
    logits is made while the chunk is there: 6NVD FLOPs in all, where `linear_log_probs` takes 8NVD. Use this function
    if each token has its own loss and its constants are known: PPO, GRPO and CISPO with an entropy bonus, focal loss,
    unlikelihood. Use `linear_log_probs` where a loss is not a sum over tokens, as that of DPO.

    Args:
        input, linear_weight, target, linear_bias, ignore_index, logit_scale, softcap: as in `linear_log_probs`.
        fn: takes `log_prob` and `entropy`, each float32 of shape (R,), and the entries of `per_token` for the same R
            tokens, and returns the R losses. It must treat each token by itself: how tokens are divided into chunks is
            not defined. It is called once for each chunk. Ignored tokens may be among them, and count as 0. It may use
            no other tensor that requires a gradient.
        per_token: constants of each token, of the shape of `target` and of any dtype: advantages, old
            log-probabilities. They must not require a gradient.
        reduction: "mean" over the counted tokens, or "sum".
        num_items: replaces the number of counted tokens in "mean", as in `cross_entropy`.
        group: the ranks that hold the other parts of the batch, as in `cross_entropy`. Only for "mean".
        options: how the loss is computed, see `Options`. There is no compact plan, and `memory_budget` bounds the
            logits of a chunk, but not the float32 gradient of the weight.

    Returns:
        The loss, of shape (), in float32, or in float64 for float64 input.

    Raises:
        ValueError: a shape, device or option does not fit, or `fn` does not return one loss for each token.
        TypeError, IndexError, NotImplementedError: as in `log_probs`. Under torch.compile this function runs as it is,
            and `fullgraph=True` is refused, because `fn` is differentiated inside of it.

    Example:
        >>> import torch, fused_ppl
        >>> hidden, weight = torch.eye(2), torch.zeros(5, 2, requires_grad=True)
        >>> advantage, old = torch.tensor([1.0, -1.0]), torch.full((2,), -1.6094)
        >>> def ppo(log_prob, entropy, advantage, old):
        ...     ratio = (log_prob - old).exp()
        ...     clipped = ratio.clamp(0.8, 1.2)
        ...     return -torch.minimum(ratio * advantage, clipped * advantage) - 0.01 * entropy
        >>> loss = fused_ppl.linear_token_loss(hidden, weight, torch.tensor([1, 4]), ppo, advantage, old)
        >>> round(loss.item(), 4)
        -0.0161
    """
    checks.check_choice("reduction", reduction, ("mean", "sum"))
    spec = LossSpec.of(
        reduction=reduction, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, stats=True
    )
    return _uncompiled(prepare.token_loss_from_hidden)(
        input,
        linear_weight,
        target,
        spec,
        linear_bias=linear_bias,
        extras=Extras(None, None, num_items=num_items, options=options, group=group, vocab_group=None),
        function=fn,
        per_token=per_token,
    )


# Dynamo leaves it alone, as torch.compiler.disable would mark it, which imports Dynamo for a second
linear_token_loss._torchdynamo_disable = True  # type: ignore[attr-defined]  # functions take any
linear_token_loss._torchdynamo_disable_msg = (  # type: ignore[attr-defined]  # as above
    "fused_ppl.linear_token_loss differentiates fn in its forward. Leave fullgraph out, or use linear_log_probs."
)


def _uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function with all that it calls kept from Dynamo, which sees no frame unless it has been imported."""
    if "torch._dynamo" not in sys.modules:
        return function
    disabled: Callable[P, R] = torch._dynamo.disable(function)
    return disabled


def _spec(ignore_index: int | None, logit_scale: float | Tensor, softcap: float | Tensor | None) -> LossSpec:
    return LossSpec.of(
        reduction="none", ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, stats=True
    )


def _extras(options: Options | None, vocab_group: VocabGroup | None) -> Extras:
    return Extras(None, None, num_items=None, options=options, group=None, vocab_group=vocab_group)
