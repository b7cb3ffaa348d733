# SPDX-License-Identifier: Apache-2.0
"""The products of the fused head for torch.utils.flop_counter, as the plan counts them: 2NVD FLOPs each, ignored rows
included, and a screen's cheap ones among them.

That module imports triton, which takes long: it is looked for when something counts, and not imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ppl import plan

_OPS = torch.ops.fused_ppl


def register() -> None:
    """Tell the counter, also one that has begun to count, which has its own copy of the formulas."""
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    own = {getattr(_OPS, name): formula for name, formula in _FORMULAS.items()}
    for modes in (counter, *torch.utils._python_dispatch._get_current_dispatch_mode_stack()):
        known = getattr(getattr(modes, "counter", modes), "flop_registry", None)
        if known is not None:
            known.update(own)


def _forward(hidden: Tensor, linear_weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _product(hidden, linear_weight) * (1 + int(sum(rest[-2][:2])))


def _shard_hidden(hidden: Tensor, linear_weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _product(hidden, linear_weight)


def _vocab_backward(hidden: Tensor, linear_weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _product(hidden, linear_weight) * (1 + int(sum(rest[-4][:2])))


def _compact(hidden: Tensor, linear_weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _of_plan(hidden, linear_weight, *rest[-6:])


def _compact_shard(hidden: Tensor, linear_weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _of_plan(hidden, linear_weight, *rest[-7:-2], None)


def _product(hidden: Tensor, linear_weight: Tensor) -> int:
    return 2 * hidden.numel() * linear_weight.shape[0]


def _of_plan(
    hidden: Tensor,
    linear_weight: Tensor,
    dtype: torch.dtype,
    grads: tuple[bool, bool, bool],
    *asked: Any,  # memory_budget, gradient_tolerance, gradient_columns, screen
) -> int:
    (v, d), n = linear_weight.shape, hidden.numel() // hidden.shape[-1]
    compact = plan.Compact(*asked[1:])
    shape, converts = (n, v, d, dtype.itemsize, hidden.device.type), linear_weight.dtype != dtype
    made = plan.linear_plan(plan.LinearCase(*shape, grads, asked[0], compact, converts), "compact")
    return made.flops + made.cheap_flops


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear_forward": _forward,
    "linear_sums": _forward,
    "linear_vocab_backward": _vocab_backward,
    "linear_compact": _compact,
    "linear_compact_shard": _compact_shard,
    "shard_hidden": _shard_hidden,
}
