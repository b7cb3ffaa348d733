# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a data set from batches.

The metric keeps two sums, S and M, because an average of the perplexities of batches is not the perplexity of the data.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_ppl import checks, functional, groups, reduction
from fused_ppl.spec import LossSpec, Options

if TYPE_CHECKING:
    from fused_ppl.groups import Group


class Perplexity:
    """Perplexity of all tokens that were passed to `update`, in any order and in batches of any size.

        PPL = exp(S / M),    S = sum of nll in nats,    M = number of counted tokens, or the sum of their weights

    Both sums are float64 where the device has it. `update` does not wait for a GPU.

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
        self._keywords: dict[str, Any] = {
            "ignore_index": ignore_index,
            "class_dim": class_dim,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "options": options,
        }
        self.reset()

    def reset(self) -> None:
        """Set both sums to zero."""
        self.nll_sum: Tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self.total_weight: Tensor = torch.zeros((), dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def update(
        self,
        input: Tensor,
        target: Tensor,
        *,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> None:
        """Add a batch. The arguments are those of `fused_ppl.perplexity`.

        With a `linear_weight` (V, D), `input` holds hidden states (..., D) of a target (...), as in
        `fused_ppl.linear_perplexity`, and the logits are not stored.
        """
        keywords = {**self._keywords, "reduction": "none", "token_weight": token_weight}
        if linear_weight is None and linear_bias is not None:
            raise ValueError("linear_bias belongs to a linear_weight; got a bias alone. Add it to the logits.")
        if linear_weight is None:
            nll = functional.cross_entropy(input, target, **keywords)
        else:
            del keywords["class_dim"]
            nll = functional.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **keywords)
        weight = torch.ones_like(nll) if token_weight is None else token_weight
        self._add(nll, weight if self.ignore_index is None else torch.where(target.ne(self.ignore_index), weight, 0))

    @torch.no_grad()
    def update_nll(self, nll: Tensor, total_weight: Tensor | float) -> None:
        """Add a batch whose S and M are known, such as `loss` and `total_weight` of `cross_entropy_with_stats`.

        Args:
            nll: S in nats, or a tensor of any shape that sums to S.
            total_weight: M, or a tensor that sums to M.
        """
        checks.check_float_input("nll", nll)
        self._add(nll, torch.as_tensor(total_weight, dtype=reduction.sum_dtype(nll.device), device=nll.device))

    def _add(self, nll: Tensor, weight: Tensor) -> None:
        device, dtype = nll.device, reduction.sum_dtype(nll.device)
        self.nll_sum = self.nll_sum.to(device, dtype) + nll.sum(dtype=dtype)
        self.total_weight = self.total_weight.to(device, dtype) + weight.sum(dtype=dtype)

    def merge(self, other: Perplexity) -> Perplexity:
        """Add the sums of another metric, for example of another worker. Returns `self`."""
        device = self.nll_sum.device
        self.nll_sum = self.nll_sum + other.nll_sum.to(device)
        self.total_weight = self.total_weight + other.total_weight.to(device)
        return self

    def sync(self, group: Group | None = None) -> Perplexity:
        """Add up the sums of all ranks. Call it once on each rank, after the last update. Returns `self`.

        Args:
            group: a ProcessGroup, one dimension of a DeviceMesh, or None for all ranks.
        """
        name, device = groups.group_or_world(group)
        # a rank without an update still holds its sums on the CPU, and the all-reduce needs one type of device
        self.nll_sum, self.total_weight = self.nll_sum.to(device), self.total_weight.to(device)
        sums = groups.all_reduce(torch.stack((self.nll_sum, self.total_weight)), "sum", name)
        self.nll_sum, self.total_weight = sums.unbind()
        return self

    def compute(self) -> Tensor:
        """Return the perplexity, a 0-d tensor of the dtype of the sums. It is NaN before the first counted token."""
        sums = reduction.Sums(self.nll_sum, self.total_weight, None)
        return reduction.finish(sums, LossSpec(), num_items=None, dtype=sums.s.dtype).perplexity

    @property
    def bits_per_token(self) -> Tensor:
        """log2 of the perplexity."""
        return self.nll_sum / self.total_weight / math.log(2)

    def __repr__(self) -> str:
        return f"Perplexity({self.compute().item():.6g} over a total weight of {self.total_weight.item():.6g})"
