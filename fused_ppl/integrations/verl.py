# SPDX-License-Identifier: Apache-2.0
"""`verl.utils.kernel.linear_cross_entropy.linear_cross_entropy` with the same arguments, computed by fused_ppl.

    verl.utils.kernel.linear_cross_entropy.linear_cross_entropy = fused_ppl.integrations.verl.linear_cross_entropy

This module does not need verl. Arguments that fused_ppl does not support raise NotImplementedError.
"""

from __future__ import annotations

from torch import Tensor

from fused_ppl import linear_log_probs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: object = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and entropies of the predictions, both differentiable.

        logits = hidden @ weight.T / temperature

    Args:
        hidden: (..., D), the hidden states.
        weight: (V, D), the weight of the head.
        labels: (...), int64 or int32, each in [0, V). No label is ignored.
        temperature: > 0. None means 1.
        reduction: "none", "sum" or "mean" of the log-probabilities. None means "none". It does not change the entropy.
        dist_process_group: must be None.

    Returns:
        The log-probabilities, of shape (N,) for N labels or () with a reduction, and the entropies, of shape (N,). Both
        are float32 and in nats. The first is the log-probability itself, although the name of the function is that of
        its negative.

    Raises:
        ValueError: a shape, the temperature or the reduction does not fit.
        IndexError: a label is out of range. verl takes its logit for 0.
        NotImplementedError: `dist_process_group` is set.

    Example:
        >>> import torch
        >>> log_prob, entropy = linear_cross_entropy(torch.zeros(1, 2, 8), torch.zeros(50, 8), torch.tensor([[0, 1]]))
        >>> log_prob, entropy
        (tensor([-3.9120, -3.9120]), tensor([3.9120, 3.9120]))
    """
    if dist_process_group is not None:
        raise NotImplementedError(
            "dist_process_group must be None. Pass the shard of the weight to fused_ppl.linear_log_probs with "
            "vocab_group=, which also sums the gradient of the hidden states over the ranks."
        )
    name = "none" if reduction is None else reduction.lower()
    if name not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean'; got {reduction!r}.")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be > 0; got {temperature}.")
    values = linear_log_probs(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        ignore_index=None,
        logit_scale=1.0 if temperature is None else 1 / temperature,
    )
    log_prob = values.log_prob
    if name != "none":
        log_prob = log_prob.sum() if name == "sum" else log_prob.mean()
    return log_prob, values.entropy
