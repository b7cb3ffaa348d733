# SPDX-License-Identifier: Apache-2.0
"""What a model does to its logits after the head: found by feeding known numbers in its place, not by names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# powers of two between what shows the slope at 0 and what saturates any cap in use
AMPLITUDES = tuple(2.0**k for k in (-12, -8, -4, -1, 1, 3, 6, 12))


class CheckError(ValueError):
    """Why a model cannot be patched, as half a sentence."""


def grid(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 numbers of both signs over all amplitudes, in an order that does not repeat along any dimension."""
    count = math.prod(shape)
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(0)
    unit = torch.rand(count, generator=generator, dtype=torch.float32, device=cpu) + 0.5
    sign = torch.randint(2, (count,), generator=generator, dtype=torch.int64, device=cpu) * 2 - 1
    places = torch.arange(count, dtype=torch.int64, device=cpu) % len(AMPLITUDES)
    amplitude = torch.tensor(AMPLITUDES, dtype=torch.float32, device=cpu)[places]
    order = torch.randperm(count, generator=generator, dtype=torch.int64, device=cpu)
    values: Tensor = unit * sign * amplitude[order]
    return values.view(shape).to(device)


def fit(x: Tensor, y: Tensor, nice: tuple[float, ...] = ()) -> tuple[float, float | None]:
    """(scale, softcap) with y = softcap * tanh(scale * x / softcap), or y = scale * x, elementwise.

    Args:
        x, y: what went in and what came out.
        nice: numbers that are taken where the fit is as near to one of them as the dtype of `y` can tell.

    Raises:
        CheckError: y is no such function of x.
    """
    if y.requires_grad:
        raise CheckError("what it does to its logits has parameters to be trained")
    if y.numel() != x.numel():
        raise CheckError(f"its head gave {tuple(x.shape)} logits and its output holds {tuple(y.shape)}")
    rounding = max(1e-5, 4 * torch.finfo(y.dtype).eps)
    x, y = x.detach().double().cpu().flatten(), y.detach().double().cpu().flatten()
    if not bool(y.isfinite().all()):
        raise CheckError("it masks logits, or they overflow its dtype")
    small = x.abs() < 2 * AMPLITUDES[0]
    largest = int(x.abs().argmax())
    scale = float((x * y)[small].sum() / x[small].square().sum())
    softcap: float | None = None
    if abs(y[largest] - scale * x[largest]) > 1e-3 * abs(scale * x[largest]):
        softcap = _near(float(y[largest].abs()), nice, rounding)
        scale = float((x * softcap * (y / softcap).atanh())[small].sum() / x[small].square().sum())
    scale = _near(scale, nice, rounding)
    z = scale * x if softcap is None else softcap * (scale * x / softcap).tanh()
    if not bool(((y - z).abs() <= rounding * z.abs() + 1e-30).all()):
        raise CheckError("what it does to its logits is neither a scale nor a softcap, the same for every token")
    if not (math.isfinite(scale) and scale > 0):
        raise CheckError(f"its logits are scaled by {scale}")
    return scale, softcap


def _near(value: float, nice: tuple[float, ...], rounding: float) -> float:
    best = min((1.0, *nice), key=lambda n: abs(value - n))
    return best if abs(value - best) <= rounding * abs(best) else value


def numbers(config: Any) -> Iterator[float]:
    """Every number in a configuration, however deep, and its inverse."""
    if isinstance(config, dict):
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from numbers(value)
    elif isinstance(config, (int, float)) and math.isfinite(config) and abs(config) > 1e-12:
        yield float(config)
        yield 1 / float(config)
