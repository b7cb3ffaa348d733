# SPDX-License-Identifier: Apache-2.0
"""Opaque ops that walk the memory and know no formula: one pair of ops, with fakes, in each file."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("fused_ppl", "DEF")
