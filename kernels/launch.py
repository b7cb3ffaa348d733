# SPDX-License-Identifier: Apache-2.0
"""The records that the kernels take, and the choice of a launch configuration.

A record is a NamedTuple of tensors or of numbers. An entry that is None is known at compile time, so that an option
which is off costs no instruction.

A launch configuration is a pure function of shape, dtype and device, so that it is tested without a GPU. It is not
autotuned: the instruction counts per logit hardly depend on it, and a tuner would wait for the device. More warps and
vectors put more bytes in flight; more registers per thread leave fewer warps on a multiprocessor (SM).
`bench/budgets.py` holds the machine code of every configuration to limits.
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
SLICE_FIELDS = 5  # of a slice of a row: shift, sum_exp, sum_exp_t, sum_w_t, argmax; see row_sums.py
# of a shard of the vocabulary, in nats: max z; sum e^(z - max); the target's z, 0 if another shard has it;
# sum w z; sum e^(z - max) (z - max); column of the maximum. The three sums leave the target out
SHARD_FIELDS = 6


class Weights(NamedTuple):
    per_class: Tensor | None = None  # (num_classes,)
    per_class_sum: Tensor | None = None  # (): sum of per_class; needed by label smoothing only
    per_token: Tensor | None = None  # (N,)


class Upstream(NamedTuple):
    """The upstream gradients of each row, (N,) fp32 on the device with stride 0 or 1. No call waits for them."""

    dloss: Tensor  # with respect to the row's loss, its part of S
    dz_loss: Tensor | None = None  # with respect to weight * lse^2, its part of Z; needed by z_loss only
    dlse: Tensor | None = None  # with respect to lse; this and the next two are contiguous
    dentropy: Tensor | None = None  # with respect to the entropy
    entropy: Tensor | None = None  # the entropy itself, which its gradient needs


class Rows(NamedTuple):
    """Results of every row. A kernel that writes `predicted` or `entropy` uses a running maximum."""

    loss: Tensor  # (N,) fp32
    weight: Tensor  # (N,) fp32: the row's part of M
    nll: Tensor  # (N,) fp32
    lse: Tensor  # (N,) fp64: fp32 at |z| = 1e4 has steps of a thousandth, and e^(z - lse) would lose that
    entropy: Tensor | None = None  # (N,) fp32
    predicted: Tensor | None = None  # (N,) int64


class DivergenceRows(NamedTuple):
    """Results of every row of a divergence. The last four are all given, or all None."""

    divergence: Tensor  # (N,) fp32
    entropy: Tensor | None = None  # (N,) fp32: of the student
    teacher_entropy: Tensor | None = None  # (N,) fp32
    agrees: Tensor | None = None  # (N,) int32: 1 if both predict the same class
    log_prob_difference: Tensor | None = None  # (N,) fp32: of the target, student less teacher


class DivergenceUpstream(NamedTuple):
    """What the gradient of a divergence is multiplied by."""

    gradient: Tensor  # (N,) fp32
    token_weight: Tensor | None  # (N,)


class Totals(NamedTuple):
    """Results of all rows, 0-d. `num_items` is an input; if given, the mean divides by it instead of M."""

    loss: Tensor  # fp32
    perplexity: Tensor  # fp32
    total_weight: Tensor  # fp64
    loss_factor: Tensor  # fp64
    perplexity_factor: Tensor  # fp64
    num_items: Tensor | None = None


class Workspace(NamedTuple):
    """Memory by which the programs of one launch reach each other; see grid_reduction.py."""

    counters: Tensor | None = None  # (1,) or (1 + N,) int32 zeros: [0] counts finished rows, [1 + n] slices of row n
    partials: Tensor | None = None  # (SLICE_FIELDS, N, slices) fp32; only if rows are split


class LossScalars(NamedTuple):
    """The numbers of a loss. An option that is off is None."""

    scale_log2: float  # z * log2(e) = scale_log2 * capped
    logit_scale: float  # dz/dx, apart from the slope of a softcap
    tanh_scale: float | None = None  # capped = tanh(tanh_scale * x); without a softcap capped = x
    smoothing: float | None = None
    z_loss: float | None = None
    max_nll: float | None = None


def _fp32(x: float) -> float:
    """x rounded to float32, because some kernels use a number in float64 that others use in float32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _option(x: float | None) -> float | None:
    return _fp32(x) if x else None


def loss_scalars(
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    max_nll: float | None = None,
) -> LossScalars:
    return LossScalars(
        scale_log2=_fp32(LOG2E * (logit_scale if softcap is None else softcap)),
        logit_scale=_fp32(logit_scale),
        tanh_scale=_option(None if softcap is None else logit_scale / softcap),
        smoothing=_option(label_smoothing),
        z_loss=_option(z_loss),
        max_nll=_option(max_nll),
    )


@dataclass(frozen=True)
class LaunchConfig:
    """A tile has vectors * threads * (16 / itemsize) logits; `slices` programs share a row."""

    vectors: int  # 16-byte vectors per thread and tile
    num_warps: int
    threads: int
    tiles_per_slice: int
    slices: int = 1
    registers: int | None = None  # the most that a thread may take

    @property
    def compiler_options(self) -> dict[str, int]:
        """Without a limit ptxas spills a few registers to come down to 40 or 32, which runs slower."""
        return {} if self.registers is None else register_limit(self.registers)


def register_limit(count: int) -> dict[str, int]:
    """The compiler option that limits the registers of a thread. AMD's compiler has none."""
    return {} if torch.version.hip else {"maxnreg": count}


class Device(NamedTuple):
    """The properties of a device on which a launch configuration depends."""

    num_sms: int
    warp_size: int = 32


@cache
def device_size(device: torch.device) -> Device:
    """The properties of a device. A device that is not there gets those of an H100, a CPU gets 1 SM."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Device(1 if device.type == "cpu" else 132)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32))


def register_pressure(scalars: LossScalars, stats: bool) -> int:
    """How much the options of a sum add to the registers per logit: a softcap 2, statistics 1, label smoothing 1."""
    return stats + 2 * (scalars.tanh_scale is not None) + (scalars.smoothing is not None)


def _min_warps(num_classes: int) -> int:
    return next((w for v, w in ((512, 1), (2048, 2), (65536, 4)) if num_classes < v), 8)


def _vectors(num_classes: int, threads: int, itemsize: int, register_pressure: int) -> int:
    """The vectors per thread and tile: as many as fit in registers, fewer if a row is shorter than one such tile."""
    vector = 16 // itemsize
    sizes = (vector // 4,) if register_pressure else (4, vector // 4)
    return next((k for k in sizes if num_classes >= k * threads * vector), 1)


def choose_config(
    num_rows: int, num_classes: int, itemsize: int, device: Device, *, register_pressure: int = 0
) -> LaunchConfig:
    """One program per row; if that does not fill the device 4 times, the smallest power of 2 of slices that does.

    V decides on warps and tile. Register pressure makes the tile smaller. An SM then still has 16 KB or more in flight,
    which covers the latency of its memory.
    """
    num_warps = _min_warps(num_classes)
    threads = device.warp_size * num_warps
    vectors = _vectors(num_classes, threads, itemsize, register_pressure)
    tiles = num_classes // (vectors * threads * (16 // itemsize)) + 1  # the last one is masked
    wanted = 4 * device.num_sms * (48 // num_warps)  # an SM holds 48 warps of 40 registers
    slices = 1
    while num_rows * slices < wanted and slices < MAX_SLICES and num_classes // (2 * slices) >= 8192:
        slices *= 2
    tiles_per_slice = math.ceil(tiles / slices)
    registers = 128 if register_pressure or num_warps < 4 else None
    return LaunchConfig(vectors, num_warps, threads, tiles_per_slice, math.ceil(tiles / tiles_per_slice), registers)


def choose_two_pass_config(
    num_classes: int, itemsize: int, device: Device, *, register_pressure: int = 0
) -> LaunchConfig:
    """One program per row, with so many threads that the second pass finds in L2 what the first one has read.

    An SM holds 1024 threads of up to 64 registers, so 1024 / threads rows at a time: 2 for 50 thousand bf16 classes,
    1 for 128 thousand. From about 150 thousand classes on even these do not fit into L2, and both passes read memory.
    Programs of 1024 threads would spill under high register pressure, so those have at most 512.
    """
    threads = device.warp_size * _min_warps(num_classes)
    max_threads = SM_THREADS // 2 if register_pressure > 1 else SM_THREADS
    row_bytes = num_classes * itemsize
    while threads < max_threads and device.num_sms * (SM_THREADS // threads) * row_bytes > L2_BYTES:
        threads *= 2
    vectors = 1 if register_pressure > 1 else _vectors(num_classes, threads, itemsize, register_pressure)
    tiles = num_classes // (vectors * threads * (16 // itemsize)) + 1
    num_warps = threads // device.warp_size
    return LaunchConfig(vectors, num_warps, threads, tiles, registers=SM_REGISTERS // SM_THREADS)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def same_alignment(logits: Tensor, out: Tensor) -> bool:
    """True if every row of `out` has its 16-byte boundaries at the same columns as the row of `logits`."""
    distances = [
        (out.data_ptr() - logits.data_ptr()),
        *((a - b) * out.itemsize for a, b in _outer_strides(logits, out)),
    ]
    return out.stride(-1) == logits.stride(-1) and all(d % 16 == 0 for d in distances)


def _outer_strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """The strides of the dimensions that have more than one row."""
    return [tuple(t.stride(d) for t in tensors) for d in range(tensors[0].ndim - 1) if tensors[0].shape[d] > 1]
