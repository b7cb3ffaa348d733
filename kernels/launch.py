# SPDX-License-Identifier: Apache-2.0
"""Launch configurations as pure functions, and the groups of arguments that the kernels take.

A group is a NamedTuple of tensors or numbers; None in it is a compile-time fact, so that an option which is off
costs nothing.
"""

from __future__ import annotations

import math
import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
MAX_SLICES = 32
SM_THREADS = 1024
SM_REGISTERS = 65536
L2_BYTES = 30 * 10**6  # of 40 MB (A100), 50 (H100), 126 (B200)
PARTIALS = 5  # what a slice of a row hands over: reference, s, q, d, column
# of a shard of the vocabulary: max z; sum e^(z - max), the target left out; the target's z, or 0 where it is elsewhere;
# sum w z and sum e^(z - max) (z - max), the target left out; column of the maximum
SHARD_FIELDS = 6


class Weights(NamedTuple):
    per_class: Tensor | None = None  # (num_classes,)
    total: Tensor | None = None  # (): sum of per_class; needed by label smoothing only
    per_token: Tensor | None = None  # (N,)


class Upstream(NamedTuple):
    """The upstream gradients of S and of Z for every row, (N,) fp32 on the device, stride 0 or 1."""

    of_s: Tensor
    of_z: Tensor | None = None  # needed by z_loss only


class Rows(NamedTuple):
    """Results of every row. Without `predicted` the sum's reference is the target, with it the running maximum."""

    loss: Tensor  # (N,) fp32
    weight: Tensor  # (N,) fp32: the row's part of M
    nll: Tensor  # (N,) fp32
    lse: Tensor  # (N,) fp64
    entropy: Tensor | None = None  # (N,) fp32
    predicted: Tensor | None = None  # (N,) int64


class Sums(NamedTuple):
    """Results of all rows, 0-d; `num_items` is an input that replaces M in the mean."""

    loss: Tensor  # fp32
    perplexity: Tensor  # fp32
    total_weight: Tensor  # fp64
    loss_factor: Tensor  # fp64
    perplexity_factor: Tensor  # fp64
    num_items: Tensor | None = None


class Workspace(NamedTuple):
    """counters: zeros; [0] counts finished rows, [1 + n] finished slices of row n. partials: where rows are split."""

    counters: Tensor | None = None  # (1,) or (1 + N,) int32
    partials: Tensor | None = None  # (PARTIALS, N, slices) fp32


class Numbers(NamedTuple):
    """The scalars of a loss; None where an option is off. z * log2(e) = multiplier * (tanh(squash * x) or x)."""

    multiplier: float
    scale: float  # dz/dx without the cap's slope
    squash: float | None = None
    smoothing: float | None = None
    z_loss: float | None = None
    max_nll: float | None = None


def _fp32(x: float) -> float:
    """Rounded here, so that what the kernels compute in fp64 from it fits what they compute in fp32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _option(x: float | None) -> float | None:
    return _fp32(x) if x else None


def numbers(
    logit_scale: float, softcap: float | None, label_smoothing: float, z_loss: float, max_nll: float | None
) -> Numbers:
    multiplier = LOG2E * (logit_scale if softcap is None else softcap)
    squash = None if softcap is None else logit_scale / softcap
    return Numbers(
        _fp32(multiplier),
        _fp32(logit_scale),
        _option(squash),
        _option(label_smoothing),
        _option(z_loss),
        _option(max_nll),
    )


@dataclass(frozen=True)
class LaunchConfig:
    """A row is walked in tiles of vectors * threads * (16 / itemsize) logits, by `slices` programs."""

    vectors: int  # 16-byte vectors of a thread in a tile
    num_warps: int
    threads: int
    tiles_per_slice: int
    slices: int = 1
    registers: int | None = None  # that a thread may take

    @property
    def compiler_options(self) -> dict[str, int]:
        """Told how many it may take, ptxas spills none to come down to 40 or 32. AMD's compiler is not asked."""
        return {} if self.registers is None else registers(self.registers)


def registers(count: int) -> dict[str, int]:
    """The compiler option that says how many registers a thread may take. AMD's compiler is not asked."""
    return {} if torch.version.hip else {"maxnreg": count}


def heaviness(numbers: Numbers, stats: bool) -> int:
    """Of a sum, by the registers that its options hold for each logit: running maxima, a softcap most, smoothing."""
    return stats + 2 * (numbers.squash is not None) + (numbers.smoothing is not None)


def _least_warps(num_classes: int) -> int:
    return next((w for v, w in ((512, 1), (2048, 2), (65536, 4)) if num_classes < v), 8)


def _vectors(num_classes: int, threads: int, itemsize: int, heavy: int) -> int:
    """Of a thread in a tile: as many as are in flight at once, and fewer where a row has less than one such tile."""
    vector = 16 // itemsize
    sizes = (vector // 4,) if heavy else (4, vector // 4)
    return next((k for k in sizes if num_classes >= k * threads * vector), 1)


def choose_config(
    num_rows: int, num_classes: int, itemsize: int, num_sms: int, warp_size: int = 32, *, heavy: int = 0
) -> LaunchConfig:
    """Warps and tile by V; one program a row, or the smallest power of 2 of slices that fills the device 4 times.

    `heavy`, see `heaviness`, makes the tile smaller. What is in flight then, 16 KB or more on an SM, still covers the
    latency of HBM.
    """
    num_warps = _least_warps(num_classes)
    threads = warp_size * num_warps
    vectors = _vectors(num_classes, threads, itemsize, heavy)
    tiles = num_classes // (vectors * threads * (16 // itemsize)) + 1  # the last one masked
    wanted = 4 * num_sms * (48 // num_warps)  # 48 warps on an SM at 40 registers
    slices = 1
    while num_rows * slices < wanted and slices < MAX_SLICES and num_classes // (2 * slices) >= 8192:
        slices *= 2
    tiles_per_slice = math.ceil(tiles / slices)
    registers = 128 if heavy or num_warps < 4 else None
    return LaunchConfig(vectors, num_warps, threads, tiles_per_slice, math.ceil(tiles / tiles_per_slice), registers)


def choose_two_pass_config(
    num_classes: int, itemsize: int, num_sms: int, warp_size: int = 32, *, heavy: int = 0
) -> LaunchConfig:
    """One program a row, of so many threads that the second pass finds in L2 what the first one has read.

    An SM holds 1024 threads of up to 64 registers, and so 1024 / threads rows are at work there: 2 for 50 thousand bf16
    classes, 1 for 128 thousand. From about 150 thousand on even these no longer fit, and it is two reads. `heavy`
    programs of 1024 threads would spill, and have 512 at most.
    """
    threads = warp_size * _least_warps(num_classes)
    most = SM_THREADS // 2 if heavy > 1 else SM_THREADS
    while threads < most and num_sms * (SM_THREADS // threads) * num_classes * itemsize > L2_BYTES:
        threads *= 2
    vectors = 1 if heavy > 1 else _vectors(num_classes, threads, itemsize, heavy)  # 64 registers are all there is
    tiles = num_classes // (vectors * threads * (16 // itemsize)) + 1
    return LaunchConfig(vectors, threads // warp_size, threads, tiles, registers=SM_REGISTERS // SM_THREADS)


@cache
def device_size(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, threads of a warp); for a device that is not there, those of an H100."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return (1 if device.type == "cpu" else 132), 32
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "warp_size", 32)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its arguments live on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def same_alignment(logits: Tensor, out: Tensor) -> bool:
    """Whether every row of `out` has its 16-byte boundaries where the row of `logits` has them."""
    distances = [
        (out.data_ptr() - logits.data_ptr()),
        *((a - b) * out.itemsize for a, b in _outer_strides(logits, out)),
    ]
    return out.stride(-1) == logits.stride(-1) and all(d % 16 == 0 for d in distances)


def _outer_strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """The strides of the dimensions that have more than one row."""
    return [tuple(t.stride(d) for t in tensors) for d in range(tensors[0].ndim - 1) if tensors[0].shape[d] > 1]
