# SPDX-License-Identifier: Apache-2.0
"""What ranks run in test_token_loss.py."""

from __future__ import annotations

from typing import Any

import distributed_cases as cases
import torch
import torch.distributed as dist
from torch import Tensor

from fused_ppl import linear_token_loss


def rank_of_a_batch(group: dist.ProcessGroup, kind: str, reduction: dict[str, Any]) -> None:
    """Loss and averaged gradients of ranks are those of one process with the whole batch."""
    tokens, targets = cases.batch(kind, group.size())
    generator = torch.Generator().manual_seed(9)
    advantages = torch.randn(sum(map(len, targets)), generator=generator).split([len(t) for t in targets])

    def loss(model: cases.Model, tokens: Tensor, target: Tensor, advantage: Tensor, **keywords: Any) -> Tensor:
        def fn(log_prob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
            return -advantage * log_prob.exp() - 0.1 * entropy

        return linear_token_loss(
            model.hidden(tokens), model.head.weight, target, fn, advantage, linear_bias=model.head.bias, **keywords
        )

    whole = cases.Model(torch.float64)
    want = loss(
        whole, *(torch.cat(parts) for parts in (tokens, targets, advantages)), options=cases.REFERENCE, **reduction
    )
    want.backward()
    rank, model = group.rank(), cases.Model()
    got = loss(model, tokens[rank], targets[rank], advantages[rank], group=group, **reduction)
    cases.assert_close_to(got, want.detach(), "loss")
    got.backward()
    cases.average(list(model.parameters()), group)
    cases.assert_gradients(model, {n: p.grad for n, p in whole.named_parameters()}, 2e-6)
