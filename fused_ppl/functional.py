# SPDX-License-Identifier: Apache-2.0
"""The public functions: signature, docstring, and the call."""

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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> Tensor:
    """Cross-entropy of logits against class indices, as `torch.nn.functional.cross_entropy`, in one pass.

        z[i,v] = cap(logit_scale * input[i,v])          cap(a) = softcap * tanh(a / softcap), or a without softcap
        lse[i] = log sum_v exp z[i,v]                   nll[i] = lse[i] - z[i, y_i]
        l[i]   = u_i * ((1-a) * w[y_i] * nll[i] + a/V * sum_v w[v] * (lse[i] - z[i,v]) + z_loss * w[y_i] * lse[i]^2)
        M      = sum_i u_i * w[y_i]                     "mean" = sum_i l[i] / M

    over the counted tokens (those that are not ignored), a = label_smoothing, w = weight, u = token_weight.
    Nothing of the size of the logits is made beyond their gradient; sums are float64; `input` is not modified.

    Args:
        input: (C,), (N, C) or (N, C, d1, ...), or the classes at `class_dim`; float16, bfloat16, float32 or float64,
            of any strides.
        target: the shape of `input` without the classes; int64 or int32, each in [0, C) or equal to `ignore_index`.
        weight: (C,), a weight for each class. A constant, as `token_weight` and `num_items` are.
        ignore_index: tokens with this target count for nothing and get a gradient of exactly zero, whatever their
            logits hold. None ignores nothing.
        reduction: "mean", "sum", "none" (per token) or "sequence" (the mean over the last dimension of `target`).
        label_smoothing: in [0, 1].
        class_dim: where the classes are; -1 for logits of shape (B, T, V).
        logit_scale: > 0, multiplies the logits (1 / temperature).
        softcap: > 0, or None for no cap (Gemma 2 uses 30).
        token_weight: the shape of `target`, a weight for each token, of any sign.
        z_loss: >= 0, the factor of lse^2 (PaLM, arXiv:2204.02311, uses 1e-4).
        num_items: replaces M in "mean", for sums over several micro-batches (`num_items_in_batch` of Hugging Face), and
            for weights that may add up to 0.
        group: the ranks that hold the other parts of the batch (data, context or sequence parallel): a ProcessGroup,
            or one dimension of a DeviceMesh. S and M are those of all of them, on each, and so is the loss; see
            docs/distributed.md. The gradient is multiplied by the number of ranks, so that DDP and FSDP, which
            average it, give that of the whole batch. For "mean".
        vocab_group: the ranks that hold the other classes, if these tensors are shards of the vocabulary in the order
            of ranks, all of one size; or (group, sizes). Targets, and `weight` of all classes, are the same on each.
            A DTensor that is sharded over the classes says so by itself.
        options: how it runs, see `Options`.

    Returns:
        Nats, float32 (float64 for float64 input), of shape () for "mean" and "sum", of `target` for "none", of
        `target.shape[:-1]` for "sequence". With no counted token the mean is NaN and every gradient exactly zero; so it
        is where M = 0 for other reasons, unless `num_items` stands in its place.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype is not supported; float targets belong to `torch.nn.functional.cross_entropy`.
        IndexError: a target is out of range (on a GPU its loss is NaN instead, and FUSED_PPL_DEBUG=1 raises).
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    max_nll: float | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> Tensor:
    """Perplexity of logits against class indices: `cross_entropy(...).exp()`, differentiable.

        PPL = exp(S / M) = 2 ** (S / M / ln 2),    S and M as in `cross_entropy`
        d PPL / d z[i,v] = PPL / M * u_i * w[y_i] * (softmax(z[i])[v] - [v = y_i])    (without label smoothing)

    Its gradient is PPL times that of the cross-entropy, about V times at initialisation: clip gradients by norm, or
    train with an optimizer that does not see the length of the gradient. Perplexities of micro-batches and ranks
    do not add up or average: `group` combines S and M of ranks, `PerplexityAccumulator` those of micro-batches.

    Args:
        reduction: "mean"; "none" and "sequence" are exp of each token's and each sequence's loss. An ignored token
            has perplexity 1 and no gradient.
        max_nll: above this mean of c nats the perplexity goes on along its tangent, exp(c) * (1 + L - c), so that
            value and gradient stay finite. Without it the value is inf above 88.7 nats. Default: no limit.

    The other arguments, what is returned (no unit: the number of equally likely choices) and what is raised are
    those of `cross_entropy`; reduction="sum" is a ValueError.

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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    max_nll: float | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> LossOutput:
    """Loss and perplexity with what the same pass knows of each token: nll, lse, entropy, argmax; and M.

    Arguments as in `cross_entropy` and `perplexity`. With reduction="sum", `loss` is S and `total_weight` is M, the
    two numbers that add up over micro-batches and ranks; `perplexity` is exp(S / M) all the same. `z_loss` and
    `num_items` enter `loss` only.

    Returns:
        `LossOutput`. `loss` and `perplexity` are differentiable, also together; all else is detached.

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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> Tensor:
    """`cross_entropy` of the logits input @ linear_weight.T + linear_bias, which are never made as a whole.

    The logits of a chunk of rows are turned into their gradient in place and multiplied on, so that three matrix
    products and no N x V buffer are needed; per-token results recompute the logits in backward instead (four
    products). `fused_ppl.plan` has the model. The logit of the target is an fp32 dot product, and all sums and the
    gradients of weight and bias are accumulated in fp32, whatever the dtype. Under autocast the products run in its
    dtype.

    Args:
        input: (..., D), hidden states.
        linear_weight: (V, D), as in `torch.nn.Linear`; may be tied to an embedding.
        target: (...), int64 or int32.
        linear_bias: (V,).

    All other arguments, what is returned and what is raised: `cross_entropy`. Options.memory_budget sets the chunk
    sizes to hold no more beyond inputs and gradients, where that is possible. Rows that are not counted cost no
    products on a CPU; on a GPU leave the rows of a prompt out before the call.

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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    max_nll: float | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> Tensor:
    """`perplexity` of the logits input @ linear_weight.T + linear_bias, which are never made as a whole.

    See `linear_cross_entropy` for the arguments and how it runs, `perplexity` for what it means as a loss.

    Example:
        >>> import torch, fused_ppl
        >>> hidden, head = torch.zeros(2, 3, 8), torch.zeros(50, 8)
        >>> round(fused_ppl.linear_perplexity(hidden, head, torch.zeros(2, 3, dtype=torch.long)).item(), 3)
        50.0
    """
    checks.check_reduction_for_perplexity(reduction)
    groups.warn_without_group(reduction, group, vocab_group, input, linear_weight)
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    max_nll: float | None = None,
    group: Group | None = None,
    vocab_group: VocabGroup | None = None,
    options: Options | None = None,
) -> LossOutput:
    """`cross_entropy_with_stats` of the logits input @ linear_weight.T + linear_bias, which are never made as a whole.

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
