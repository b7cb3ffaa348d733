# SPDX-License-Identifier: Apache-2.0
"""A model of named GPUs: what a kernel's machine code leaves of their memory bandwidth. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peers

N, V, ITEMSIZE = 8192, 128256, 2  # the loss that is modelled: bf16
ATTAINED = 0.9  # of peak bandwidth: what the best memory-bound kernels reach


@dataclass(frozen=True)
class Card:
    target: str
    bandwidth: float  # bytes a second, peak
    units: int  # SMs or CUs
    clock: float  # Hz
    lanes: int = 128  # instructions of a thread that a unit issues in a clock
    special: int = 16  # of them, exponentials and the like

    def budget(self, rate: int, bytes_per_logit: int) -> float:
        """Instructions for each logit that fit beside the memory traffic at peak bandwidth."""
        return rate * self.units * self.clock * bytes_per_logit / self.bandwidth


# vendors' data sheets: peak bandwidth, units, boost clock (kernels that run long hold a little less)
CARDS = {
    "A100 80 GB": Card("sm_80", 2.04e12, 108, 1.41e9),
    "H100 SXM": Card("sm_90", 3.35e12, 132, 1.755e9),
    "H200": Card("sm_90", 4.8e12, 132, 1.755e9),
    "B200": Card("sm_100", 8.0e12, 148, 1.85e9),
    "MI300X": Card("gfx942", 5.3e12, 304, 2.1e9, lanes=64),
}


@dataclass(frozen=True)
class Unit:
    """What an SM, or the four SIMDs of a CU, share out."""

    registers: int  # of a lane of a SIMD, times SIMDs and lanes of a warp
    granule: int
    warps: int
    blocks: int
    shared: int


_SM = Unit(registers=65536, granule=8, warps=64, blocks=32, shared=228 * 1024)
_CU = Unit(registers=4 * 512 * 64, granule=8, warps=32, blocks=32, shared=64 * 1024)
UNITS = {
    "sm_80": Unit(65536, 8, 64, 32, 164 * 1024),
    "sm_90": _SM,
    "sm_100": _SM,
    "sm_120": Unit(65536, 8, 48, 24, 100 * 1024),
    "gfx942": _CU,
    "gfx950": Unit(_CU.registers, 8, 32, 32, 160 * 1024),
}


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> int:
    """Warps that a unit holds at once."""
    unit, lanes = UNITS[target], 64 if target.startswith("gfx") else 32
    rounded = -(-max(registers, 1) // unit.granule) * unit.granule
    per_quarter = unit.registers // 4 // (rounded * lanes)  # a warp lives in one quarter of the unit
    blocks = min(4 * per_quarter, unit.warps) // num_warps
    if shared:
        blocks = min(blocks, unit.shared // shared)
    return min(blocks, unit.blocks) * num_warps


def table(records: list[dict[str, Any]]) -> str:
    """Perplexity forward + backward from logits on each card: bytes, shares of the budgets, modelled time."""
    lines = [
        f"Model: N = {N}, V = {V}, bf16, {ATTAINED:.0%} of peak bandwidth. A share is of the instructions (of the "
        "special functions) that fit beside the traffic at peak bandwidth.",
        "",
        "| card | who | GB moved | forward: instructions, special | backward: instructions, special | modelled ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, card in CARDS.items():
        for who, kernels in (("fused_ppl", ("forward", "backward")), ("Liger", ("forward_backward",) * 2)):
            loops = [
                _loop(records, who, kernel, phase, card.target)
                for kernel, phase in zip(kernels, ("sum", "gradient"), strict=True)
            ]
            if None in loops:
                continue
            shares = [_shares(card, loop, moved) for loop, moved in zip(loops, (ITEMSIZE, 2 * ITEMSIZE), strict=True)]
            moved = len(peers.passes(who)) * N * V * ITEMSIZE
            lines.append(
                f"| {name} | {who} | {moved / 1e9:.1f} | {shares[0]} | {shares[1]} | "
                f"{moved / (ATTAINED * card.bandwidth) * 1e3:.2f} |"
            )
    return "\n".join(lines)


def _loop(records: list[dict[str, Any]], who: str, kernel: str, phase: str, target: str) -> dict[str, Any] | None:
    """The pass in bf16 at the V nearest to the model's."""
    found = [
        r
        for r in records
        if (r["who"], r["kernel"], r["dtype"], r["target"], r["options"]) == (who, kernel, "bf16", target, "off")
        and phase in r["passes"]
    ]
    return min(found, key=lambda r: abs(r["v"] - V))["passes"][phase] if found else None


def _shares(card: Card, loop: dict[str, Any], bytes_per_logit: int) -> str:
    of_all = loop["instructions_per_logit"] / card.budget(card.lanes, bytes_per_logit)
    of_special = loop["special_per_logit"] / card.budget(card.special, bytes_per_logit)
    return f"{of_all:.0%}, {of_special:.0%}"
