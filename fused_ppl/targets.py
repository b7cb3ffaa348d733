# SPDX-License-Identifier: Apache-2.0
"""Targets for next-token prediction: shift the targets, never slice the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl import checks


def next_token_targets(
    tokens: Tensor, *, steps: int = 1, ignore_index: int = -100, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The token that each position should predict: targets[..., t] = tokens[..., t + steps], `ignore_index` at the end.

    Slicing the logits instead, `logits[:, :-1]`, copies them; this moves only the tokens. Call it before tokens are
    sharded along the sequence, so that no token is lost at a shard's edge.

    Args:
        tokens: (..., T), int64 or int32. Positions that already hold `ignore_index` are ignored as targets.
        steps: how far ahead to predict, >= 1.
        ignore_index: put where there is nothing to predict.
        cu_seqlens: (documents + 1,) boundaries of packed documents, 0 first and T last, for tokens of shape (T,) or
            (1, T). No position predicts across a boundary.

    Returns:
        Targets of the shape and dtype of `tokens`.

    Raises:
        TypeError, ValueError: a dtype, shape or `steps` does not fit.

    Example:
        >>> import torch, fused_ppl
        >>> fused_ppl.next_token_targets(torch.tensor([5, 6, 7, 8]), cu_seqlens=torch.tensor([0, 2, 4]))
        tensor([   6, -100,    8, -100])
    """
    checks.check_tokens(tokens)
    checks.check_steps(steps)
    length = tokens.shape[-1]
    targets = torch.full_like(tokens, ignore_index)
    if steps < length:
        targets[..., : length - steps] = tokens[..., steps:]
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, tokens)
        position = torch.arange(length, dtype=torch.int64, device=tokens.device)
        document = torch.bucketize(position, cu_seqlens.to(tokens.device), right=True)
        ahead = torch.bucketize(position + steps, cu_seqlens.to(tokens.device), right=True)
        targets.masked_fill_(document != ahead, ignore_index)
    return targets
