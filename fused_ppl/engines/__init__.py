# SPDX-License-Identifier: Apache-2.0
"""Opaque ops that walk the memory and know no formula: one pair of ops, with fakes, in each file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ppl import checks

LIBRARY = torch.library.Library("fused_ppl", "DEF")


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The dtype of the products is an argument: inside, autocast would round what is to be added up in float32."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any, **keywords: Any) -> Any:
        device = first.device.type
        if not checks.autocast(device):
            return function(first, *args, **keywords)
        with torch.autocast(device, enabled=False):
            return function(first, *args, **keywords)

    return call
