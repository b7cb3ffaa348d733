# SPDX-License-Identifier: Apache-2.0
"""Targets for next-token prediction.

They are shifted here, because the usual alternative, slicing the logits, copies the largest tensor of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ppl import checks


def next_token_targets(
    tokens: Tensor, *, steps: int = 1, ignore_index: int = -100, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The token that each position should predict: targets[..., t] = tokens[..., t + steps].

    The last `steps` positions have nothing to predict and get `ignore_index`. If the sequence is sharded over ranks,
    call this function first and shard its result, so that the last token of each shard keeps its target.

    Args:
        tokens: (..., T), int64 or int32. A position that holds `ignore_index` is ignored as a target.
        steps: the number of tokens to predict ahead, >= 1.
        ignore_index: the target of positions that have nothing to predict.
        cu_seqlens: (documents + 1,), the boundaries of packed documents, from 0 to T, for tokens of shape (T,) or
            (1, T). No position predicts a token of another document.

    Returns:
        Targets, with the shape and dtype of `tokens`.

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
        bounds = cu_seqlens.to(tokens.device)
        document = torch.bucketize(position, bounds, right=True)
        target_document = torch.bucketize(position + steps, bounds, right=True)
        targets.masked_fill_(document != target_document, ignore_index)
    return targets
