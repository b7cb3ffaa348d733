# SPDX-License-Identifier: Apache-2.0
"""The six public loss functions: their signatures, their documentation, and the call of the implementation.

Each function spells out its arguments, so that `help` and editors show them. Nothing is computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fused_ppl import checks, groups
from fused_ppl.prepare import Extras, from_hidden, from_logits
from fused_ppl.spec import LossOutput, LossSpec, Options

if TYPE_CHECKING:
    from fused_ppl.groups import Group, VocabGroup


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_dim: int = 1,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    z_loss: float | Tensor = 0.0,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> Tensor:
    """Cross-entropy of logits and class indices, like `torch.nn.functional.cross_entropy`, in one pass over the logits.

        z[i,v] = cap(logit_scale * input[i,v])          cap(a) = softcap * tanh(a / softcap), or a without softcap
        lse[i] = log sum_v exp z[i,v]                   nll[i] = lse[i] - z[i, y_i]
        l[i]   = u_i * ((1-a) * w[y_i] * nll[i] + a/V * sum_v w[v] * (lse[i] - z[i,v]) + z_loss * w[y_i] * lse[i]^2)
        S      = sum_i l[i]                             M = sum_i u_i * w[y_i]
        "sum"  = S                                      "mean" = S / M

    The sums run over the counted tokens, which are those that are not ignored. a = label_smoothing, w = weight and
    u = token_weight. The only buffer of the size of the logits is their gradient. Sums are computed in float64. `input`
    is not modified.

    Args:
        input: (C,), (N, C) or (N, C, d1, ...), or with the classes at `class_dim`. float16, bfloat16, float32 or
            float64, with any strides.
        target: the shape of `input` without the classes. int64 or int32, each in [0, C) or equal to `ignore_index`.
        weight: (C,), a weight for each class. It is a constant, and so are `token_weight` and `num_items`.
        ignore_index: tokens with this target are ignored. They do not change the loss, and their gradient is exactly
            zero, even if their logits are NaN. With None, no token is ignored.
        reduction: "mean", "sum", "none" (one loss per token) or "sequence" (the mean over the last dimension of
            `target`).
        label_smoothing: in [0, 1].
        class_dim: the dimension of the classes. Use -1 for logits of shape (B, T, V).
        logit_scale: > 0, a factor of the logits (1 / temperature). `logit_scale`, `softcap`, `z_loss` and `max_nll` may
            be 0-d float tensors, which get no gradient. torch.compile then compiles once for all values. Keep these
            tensors on the CPU: to read one from a GPU, the host waits for the GPU.
        softcap: > 0, or None for no cap. Gemma 2 uses 30.
        token_weight: the shape of `target`, a weight for each token, of any sign.
        z_loss: >= 0, the factor of lse^2. PaLM (arXiv:2204.02311) uses 1e-4.
        num_items: replaces M in "mean". Use it to add up the losses of several micro-batches (`num_items_in_batch` of
            Hugging Face), or if the weights may add up to 0.
        group: the ranks that hold the other parts of the batch (data, context or sequence parallel), as a ProcessGroup
            or one dimension of a DeviceMesh. S and M are summed over these ranks, so each of them returns the loss of
            the whole batch. The gradient is multiplied by the number of ranks, because DDP and FSDP average gradients.
            Only for "mean". See docs/distributed.md.
        vocab_group: the ranks that hold the other classes, if `input` is a shard of the vocabulary. Shards are in the
            order of ranks and have one size; for other sizes pass (group, sizes). Targets and `weight`, which covers
            all classes, must be the same on each rank. A DTensor that is sharded over the classes needs no
            `vocab_group`.
        options: how the loss is computed, see `Options`.

    Returns:
        The loss in nats, in float32, or in float64 for float64 input. Its shape is () for "mean" and "sum",
        `target.shape` for "none", and `target.shape[:-1]` for "sequence". If M = 0, for example because no token is
        counted, the mean is NaN and every gradient is exactly zero. `num_items` avoids this.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype is not supported. For class probabilities use `torch.nn.functional.cross_entropy`.
        IndexError: a target is out of range. On a GPU its loss is NaN instead, unless FUSED_PPL_DEBUG=1 is set.
        NotImplementedError: a named backend cannot run here.

    Example:
        >>> import torch, fused_ppl
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> fused_ppl.cross_entropy(logits, torch.tensor([0, 2]), reduction="none")
        tensor([0.2395, 1.0986])
    """
    spec = LossSpec.of(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        softcap=softcap,
        z_loss=z_loss,
    )
    extras = Extras(
        weight=weight,
        token_weight=token_weight,
        num_items=num_items,
        options=options,
        group=group,
        vocab_group=vocab_group,
    )
    return from_logits(input, target, spec, class_dim=class_dim, extras=extras).loss


def perplexity(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_dim: int = 1,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    max_nll: float | Tensor | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> Tensor:
    """Perplexity of logits and class indices, `cross_entropy(...).exp()`, as a differentiable loss.

        PPL = exp(S / M) = 2 ** (S / M / ln 2),    S and M as in `cross_entropy`
        d PPL / d z[i,v] = PPL / M * u_i * w[y_i] * (softmax(z[i])[v] - [v = y_i])    (without label smoothing)

    The gradient is PPL times the gradient of the cross-entropy, and PPL is about V at initialisation. Clip gradients by
    their norm, or use an optimizer that does not depend on the length of the gradient.

    Perplexities of micro-batches or ranks cannot be added or averaged. Use `group` to combine S and M of ranks, and
    `PerplexityAccumulator` to combine S and M of micro-batches.

    Args:
        reduction: "mean", or "none" and "sequence" for the exp of the loss of each token or sequence. An ignored token
            has perplexity 1 and no gradient. "sum" raises ValueError.
        max_nll: a limit c in nats for the mean L, or None. Above it, the perplexity continues along its tangent,
            exp(c) * (1 + L - c), so value and gradient stay finite. Without a limit the value is inf above 88.7 nats.

    All other arguments and errors are those of `cross_entropy`. The result has no unit: it is the number of equally
    likely classes that would give the same loss.

    Example:
        >>> import torch, fused_ppl
        >>> logits = torch.zeros(4, 32, requires_grad=True)
        >>> loss = fused_ppl.perplexity(logits, torch.tensor([1, 2, -100, 31]))
        >>> round(loss.item(), 4)
        32.0
        >>> loss.backward()
        >>> round(logits.grad[0, 1].item(), 4)         # 32 / 3 * (1 / 32 - 1)
        -10.3333
    """
    checks.check_reduction_for_perplexity(reduction)
    groups.warn_without_group(reduction, group, vocab_group, input)
    spec = LossSpec.of(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        softcap=softcap,
        max_nll=max_nll,
    )
    extras = Extras(
        weight=weight,
        token_weight=token_weight,
        num_items=None,
        options=options,
        group=group,
        vocab_group=vocab_group,
    )
    return from_logits(input, target, spec, class_dim=class_dim, extras=extras).perplexity


def cross_entropy_with_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_dim: int = 1,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    z_loss: float | Tensor = 0.0,
    num_items: float | Tensor | None = None,
    max_nll: float | Tensor | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> LossOutput:
    """Loss and perplexity together with M and with nll, lse, entropy and argmax of each token, from the same pass.

    The arguments are those of `cross_entropy` and `perplexity`. With reduction="sum", `loss` is S and `total_weight` is
    M. These two numbers can be added up over micro-batches and ranks. `perplexity` is exp(S / M) for "sum" too.
    `z_loss` and `num_items` change `loss` only.

    Returns:
        `LossOutput`. `loss` and `perplexity` are differentiable, alone or together. All other fields are detached.

    Example:
        >>> import torch, fused_ppl
        >>> out = fused_ppl.cross_entropy_with_stats(torch.zeros(2, 8), torch.tensor([3, -100]), reduction="sum")
        >>> out.loss, out.total_weight, out.predicted
        (tensor(2.0794), tensor(1., dtype=torch.float64), tensor([ 0, -1]))
    """
    spec = LossSpec.of(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        softcap=softcap,
        z_loss=z_loss,
        max_nll=max_nll,
        stats=True,
    )
    extras = Extras(
        weight=weight,
        token_weight=token_weight,
        num_items=num_items,
        options=options,
        group=group,
        vocab_group=vocab_group,
    )
    return from_logits(input, target, spec, class_dim=class_dim, extras=extras)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    z_loss: float | Tensor = 0.0,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> Tensor:
    """`cross_entropy` of input @ linear_weight.T + linear_bias, without storing all logits at once.

    The logits of one chunk of rows are computed, replaced in place by their gradient, and multiplied by the weight and
    the hidden states. This needs three matrix products and no N x V buffer. Per-token results recompute the logits in
    backward instead, which makes four products. `fused_ppl.plan` chooses the chunk sizes.

    For every dtype, the logit of the target is a dot product in fp32, and sums and the gradients of weight and bias are
    accumulated in fp32. Under autocast the matrix products use the dtype of autocast.

    Args:
        input: (..., D), hidden states.
        linear_weight: (V, D), as in `torch.nn.Linear`. It may be tied to an embedding.
        target: (...), int64 or int32.
        linear_bias: (V,).

    All other arguments, the result and the errors are those of `cross_entropy`. Options.memory_budget limits the memory
    for temporary buffers, if that is possible. On a CPU, ignored rows need no matrix products. On a GPU they do, so
    leave out the rows of a prompt before the call.

    Example:
        >>> import torch, fused_ppl
        >>> hidden, head = torch.zeros(2, 3, 8), torch.zeros(50, 8)
        >>> loss = fused_ppl.linear_cross_entropy(hidden, head, torch.zeros(2, 3, dtype=torch.long))
        >>> round(loss.item(), 4)                      # ln 50
        3.912
    """
    spec = LossSpec.of(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        softcap=softcap,
        z_loss=z_loss,
    )
    extras = Extras(
        weight=weight,
        token_weight=token_weight,
        num_items=num_items,
        options=options,
        group=group,
        vocab_group=vocab_group,
    )
    return from_hidden(input, linear_weight, target, spec, linear_bias=linear_bias, extras=extras).loss


def linear_perplexity(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    max_nll: float | Tensor | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> Tensor:
    """`perplexity` of input @ linear_weight.T + linear_bias, without storing all logits at once.

    `linear_cross_entropy` documents the arguments and the method, and `perplexity` documents the loss.

    Example:
        >>> import torch, fused_ppl
        >>> hidden, head = torch.zeros(2, 3, 8), torch.zeros(50, 8)
        >>> round(fused_ppl.linear_perplexity(hidden, head, torch.zeros(2, 3, dtype=torch.long)).item(), 3)
        50.0
    """
    checks.check_reduction_for_perplexity(reduction)
    groups.warn_without_group(reduction, group, vocab_group, input, linear_weight=linear_weight)
    spec = LossSpec.of(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        softcap=softcap,
        max_nll=max_nll,
    )
    extras = Extras(
        weight=weight,
        token_weight=token_weight,
        num_items=None,
        options=options,
        group=group,
        vocab_group=vocab_group,
    )
    return from_hidden(input, linear_weight, target, spec, linear_bias=linear_bias, extras=extras).perplexity


def linear_cross_entropy_with_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    z_loss: float | Tensor = 0.0,
    num_items: float | Tensor | None = None,
    max_nll: float | Tensor | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> LossOutput:
    """`cross_entropy_with_stats` of input @ linear_weight.T + linear_bias, without storing all logits at once.

    Example:
        >>> import torch, fused_ppl
        >>> hidden, head = torch.zeros(2, 8), torch.zeros(50, 8)
        >>> out = fused_ppl.linear_cross_entropy_with_stats(hidden, head, torch.tensor([3, -100]))
        >>> round(out.perplexity.item(), 3), out.total_weight.item()
        (50.0, 1.0)
    """
    spec = LossSpec.of(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        softcap=softcap,
        z_loss=z_loss,
        max_nll=max_nll,
        stats=True,
    )
    extras = Extras(
        weight=weight,
        token_weight=token_weight,
        num_items=num_items,
        options=options,
        group=group,
        vocab_group=vocab_group,
    )
    return from_hidden(input, linear_weight, target, spec, linear_bias=linear_bias, extras=extras)
