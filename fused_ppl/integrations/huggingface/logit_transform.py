# SPDX-License-Identifier: Apache-2.0
"""Finds what a model does to its logits after the head: a scale and a softcap.

    y = scale * x    or    y = softcap * tanh(scale * x / softcap)

The check passes known numbers x through the model instead of logits and fits the outputs y. Names in the configuration
of a model differ between models and do not say how they are used, so they only help to round the fitted numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# powers of two: the smallest show the slope at 0, and the largest reach any softcap in use
AMPLITUDES = tuple(2.0**k for k in (-12, -8, -4, -1, 1, 3, 6, 12))


class CheckError(ValueError):
    """A model cannot be patched. The message is the reason, as a part of a sentence."""


def probe_values(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return float32 numbers of both signs and all amplitudes, in an order that repeats along no dimension."""
    count = math.prod(shape)
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(0)
    unit = torch.rand(count, generator=generator, dtype=torch.float32, device=cpu) + 0.5
    sign = torch.randint(2, (count,), generator=generator, dtype=torch.int64, device=cpu) * 2 - 1
    index = torch.arange(count, dtype=torch.int64, device=cpu) % len(AMPLITUDES)
    amplitude = torch.tensor(AMPLITUDES, dtype=torch.float32, device=cpu)[index]
    order = torch.randperm(count, generator=generator, dtype=torch.int64, device=cpu)
    values: Tensor = unit * sign * amplitude[order]
    return values.view(shape).to(device)


def fit(x: Tensor, y: Tensor, candidates: tuple[float, ...] = ()) -> tuple[float, float | None]:
    """Return (scale, softcap) for which the formula above holds for every element. Without a softcap, it is None.

    Args:
        x: the numbers that went in.
        y: the numbers that came out.
        candidates: numbers to prefer if the fit is as close to one of them as the dtype of `y` can tell.

    Raises:
        CheckError: no scale and softcap give y.
    """
    if y.requires_grad:
        raise CheckError("what it does to its logits has parameters to be trained")
    if y.numel() != x.numel():
        raise CheckError(f"its head gave {tuple(x.shape)} logits and its output holds {tuple(y.shape)}")
    rounding = max(1e-5, 4 * torch.finfo(y.dtype).eps)
    x, y = x.detach().double().cpu().flatten(), y.detach().double().cpu().flatten()
    if not bool(y.isfinite().all()):
        raise CheckError("it masks logits, or they overflow its dtype")
    small = x.abs() < 2 * AMPLITUDES[0]  # where tanh is linear
    largest = int(x.abs().argmax())  # where tanh is 1 or -1
    scale = float((x * y)[small].sum() / x[small].square().sum())
    softcap: float | None = None
    if abs(y[largest] - scale * x[largest]) > 1e-3 * abs(scale * x[largest]):
        softcap = _round_to(candidates, float(y[largest].abs()), rounding)
        scale = float((x * softcap * (y / softcap).atanh())[small].sum() / x[small].square().sum())
    scale = _round_to(candidates, scale, rounding)
    z = scale * x if softcap is None else softcap * (scale * x / softcap).tanh()
    if not bool(((y - z).abs() <= rounding * z.abs() + 1e-30).all()):
        raise CheckError("what it does to its logits is neither a scale nor a softcap, the same for every token")
    if not (math.isfinite(scale) and scale > 0):
        raise CheckError(f"its logits are scaled by {scale}")
    return scale, softcap


def _round_to(candidates: tuple[float, ...], value: float, rounding: float) -> float:
    """Return the candidate (or 1) nearest to the value if they differ by rounding errors only, else the value."""
    nearest = min((1.0, *candidates), key=lambda n: abs(value - n))
    return nearest if abs(value - nearest) <= rounding * abs(nearest) else value


def config_numbers(config: Any) -> Iterator[float]:
    """Yield every number in a nested configuration, and its inverse."""
    if isinstance(config, dict):
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from config_numbers(value)
    elif isinstance(config, (int, float)) and math.isfinite(config) and abs(config) > 1e-12:
        yield float(config)
        yield 1 / float(config)
