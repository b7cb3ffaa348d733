# SPDX-License-Identifier: Apache-2.0
"""An op of ours under torch's own check of ops."""

from __future__ import annotations

from typing import Any

import torch

import fused_ppl.op_autograd  # noqa: F401  (it registers)
from fused_ppl.engines.ops import OPS, flatten


def checked_op(name: str, *records: Any, **keywords: Any) -> Any:
    """The result of an op, whose schema, fake and autograd keep the rules of torch.library."""
    op = OPS[name]
    torch.library.opcheck(op.overload, tuple(flatten([*records, *keywords.values()])))
    return op(*records, **keywords)
