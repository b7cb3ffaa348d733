# SPDX-License-Identifier: Apache-2.0
"""The products of the fused head for torch.utils.flop_counter, as the plan counts them: 2NVD FLOPs each.

The count includes ignored rows and the products of a screen. The counter's module imports triton, which takes long. So
this file does not import it, and looks for it in sys.modules when something counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from fused_ppl import plan
from fused_ppl.engines.divergence import linear_divergence, linear_divergence_backward
from fused_ppl.engines.head import linear_case
from fused_ppl.engines.linear_compact import linear_compact, linear_compact_shard
from fused_ppl.engines.linear_rows import linear_forward, linear_sums
from fused_ppl.engines.linear_vocab import linear_token_backward, linear_vocab_backward
from fused_ppl.engines.ops import Op
from fused_ppl.engines.vocab_shards import shard_hidden
from fused_ppl.records import Compact, HeadExecution, HeadInputs, Teacher


def register() -> None:
    """Add our formulas to the counter, and to counters that are active, which have copies of the formulas."""
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    own = {op.overload.overloadpacket: _of_values(op, formula) for op, formula in _FORMULAS.items()}
    for modes in (counter, *torch.utils._python_dispatch._get_current_dispatch_mode_stack()):
        known = getattr(getattr(modes, "counter", modes), "flop_registry", None)
        if known is not None:
            known.update(own)


_OTHERS = (Compact, Teacher)  # what else a formula may depend on


def _of_values(op: Op[..., Any], formula: Callable[..., int]) -> Callable[..., int]:
    def count(*values: Any, out_val: Any = None) -> int:
        records = op.records(values)
        execution, other = (next((r for r in records if isinstance(r, k)), None) for k in (HeadExecution, _OTHERS))
        return formula(records[0], execution, other)

    return count


def _product(inputs: HeadInputs, *_: object) -> int:
    return 2 * inputs.hidden.numel() * inputs.linear_weight.shape[0]


def _with_gradients(inputs: HeadInputs, execution: HeadExecution, _: None) -> int:
    return _product(inputs) * (1 + execution.grads[0] + execution.grads[1])


def _compact(inputs: HeadInputs, execution: HeadExecution, asked: Compact) -> int:
    case = linear_case(inputs.hidden, inputs.linear_weight, execution, asked)
    compact = plan.linear_plan(case, "compact")
    return compact.flops + compact.cheap_flops


def _with_teacher(inputs: HeadInputs, execution: HeadExecution, teacher: Teacher) -> int:
    of_teacher = 0 if teacher.teacher_input is None else teacher.teacher_input.numel()
    return _with_gradients(inputs, execution, None) + 2 * of_teacher * inputs.linear_weight.shape[0]


_FORMULAS: dict[Op[..., Any], Callable[..., int]] = {
    linear_forward: _with_gradients,
    linear_sums: _with_gradients,
    linear_vocab_backward: _with_gradients,
    linear_token_backward: _with_gradients,
    linear_compact: _compact,
    linear_compact_shard: _compact,
    shard_hidden: _product,
    linear_divergence: _with_teacher,
    linear_divergence_backward: _with_teacher,
}
