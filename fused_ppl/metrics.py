# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a data set, streamed: only the two sums S and M are kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_ppl import checks, functional, groups, reduction
from fused_ppl.spec import LossSpec, Options

if TYPE_CHECKING:
    from fused_ppl.groups import Group


class Perplexity:
    """exp(S / M) over everything it was shown, S = sum of nll in nats, M = number of counted tokens, both in float64.

    The order and the sizes of the batches do not matter; perplexities of batches are never averaged. A GPU is not
    waited for until the result is read.

    Args:
        ignore_index, class_dim, logit_scale, softcap, options: as in `fused_ppl.perplexity`.

    Example:
        >>> import torch, fused_ppl
        >>> metric = fused_ppl.Perplexity(class_dim=-1)
        >>> metric.update(torch.zeros(2, 5, 16), torch.zeros(2, 5, dtype=torch.long))
        >>> metric.update(torch.zeros(1, 3, 64), torch.zeros(1, 3, dtype=torch.long))
        >>> round(metric.compute().item(), 4)          # exp((10 ln 16 + 3 ln 64) / 13)
        22.0322
        >>> round(metric.bits_per_token.item(), 4)
        4.4615
    """

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        class_dim: int = 1,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        options: Options | None = None,
    ) -> None:
        self.ignore_index = ignore_index
        self._keywords = {
            "ignore_index": ignore_index,
            "class_dim": class_dim,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "options": options,
        }
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.nll_sum: Tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self.total_weight: Tensor = torch.zeros((), dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def update(self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None) -> None:
        """Add a batch of logits and targets, as `fused_ppl.perplexity` takes them."""
        nll = functional.cross_entropy(input, target, reduction="none", token_weight=token_weight, **self._keywords)  # type: ignore[arg-type]
        weight = torch.ones_like(nll) if token_weight is None else token_weight
        self._add(nll, weight if self.ignore_index is None else torch.where(target.ne(self.ignore_index), weight, 0))

    @torch.no_grad()
    def update_nll(self, nll: Tensor, total_weight: Tensor | float) -> None:
        """Add S and M that are known already, in nats: `out.loss` and `out.total_weight` of reduction="sum".

        Args:
            nll: S, or the parts of it: of any shape, weighted if tokens are, 0 where ignored.
            total_weight: M, or the parts of it: the number of counted tokens, or the sum of their weights.
        """
        checks.check_float_input("nll", nll)
        self._add(nll, torch.as_tensor(total_weight, dtype=reduction.sum_dtype(nll.device), device=nll.device))

    def _add(self, nll: Tensor, weight: Tensor) -> None:
        device, wide = nll.device, reduction.sum_dtype(nll.device)
        self.nll_sum = self.nll_sum.to(device, wide) + nll.sum(dtype=wide)
        self.total_weight = self.total_weight.to(device, wide) + weight.sum(dtype=wide)

    def merge(self, other: Perplexity) -> Perplexity:
        """Add what another metric has seen, of another worker or another part of the data. Returns itself."""
        device = self.nll_sum.device
        self.nll_sum = self.nll_sum + other.nll_sum.to(device)
        self.total_weight = self.total_weight + other.total_weight.to(device)
        return self

    def sync(self, group: Group | None = None) -> Perplexity:
        """Add what all ranks have seen, once, after the last update: each then holds the same sums. Returns itself.

        Args:
            group: a ProcessGroup or one dimension of a DeviceMesh; None for all ranks.
        """
        name, device = groups.group_or_world(group)
        # of all ranks the same device, also of one that has seen nothing yet
        self.nll_sum, self.total_weight = self.nll_sum.to(device), self.total_weight.to(device)
        sums = groups.all_reduce(torch.stack((self.nll_sum, self.total_weight)), "sum", name)
        self.nll_sum, self.total_weight = sums.unbind()
        return self

    def compute(self) -> Tensor:
        """The perplexity, a 0-d float64 tensor; NaN before any counted token."""
        sums = reduction.Sums(self.nll_sum, self.total_weight, None)
        return reduction.finish(sums, LossSpec(), num_items=None, dtype=sums.s.dtype).perplexity

    @property
    def bits_per_token(self) -> Tensor:
        """log2 of the perplexity."""
        return self.nll_sum / self.total_weight / math.log(2)

    def __repr__(self) -> str:
        return f"Perplexity({self.compute().item():.6g} over a total weight of {self.total_weight.item():.6g})"
