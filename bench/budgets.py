# SPDX-License-Identifier: Apache-2.0
"""The machine code that each kernel is allowed, and what a launch of it compiles.

A limit is the measured value of triton 3.9 plus a few per cent, so that a version of Triton that does worse is seen.
Older versions may take a quarter more, and may spill outside of the hot loops. No version may spill, cross threads, or
load less than 16 bytes at a time in a hot loop. `python bench/static.py` compiles all of it, and holds it to this.
"""

from __future__ import annotations

from typing import Any

import aot
import torch
import triton
from torch import Tensor

from fused_ppl.kernels import launch, nll_backward, nll_forward, nll_forward_backward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
NUM_ROWS, NUM_SMS = 8192, 132
IS_NEWEST = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (
    3,
    9,
)  # what the limits are measured with
ALLOWANCE = 1.0 if IS_NEWEST else 1.25
ODD, LARGE = 50257, 151643


# with every option off: (instructions for each logit in the hot loop of each pass, registers)
_FORWARD_HALF = {"sm_80": (4.5, 40), "sm_90": (4.5, 40), "sm_100": (4.1, 40), "sm_120": (4.6, 40)}
_FORWARD_HALF |= {"gfx942": (4.2, 72), "gfx950": (4.2, 72)}
_FORWARD_FULL = {"sm_80": (3.8, 40), "sm_90": (3.8, 40), "sm_100": (3.5, 40), "sm_120": (3.9, 40)}
_FORWARD_FULL |= {"gfx942": (3.7, 64), "gfx950": (3.8, 64)}
_BACKWARD_HALF = {"sm_80": (5.2, 40), "sm_90": (5.2, 40), "sm_100": (4.7, 40), "sm_120": (5.4, 40)}
_BACKWARD_HALF |= {"gfx942": (5.7, 64), "gfx950": (4.9, 72)}
_BACKWARD_FULL = {"sm_80": (4.1, 40), "sm_90": (4.1, 40), "sm_100": (4.1, 40), "sm_120": (4.1, 40)}
_BACKWARD_FULL |= {"gfx942": (4.3, 64), "gfx950": (4.5, 64)}
# 64: two programs of 512 threads, or one of 1024, fill an SM
_HEAD_HALF = {"sm_80": (4.5, 5.2, 64), "sm_90": (4.5, 5.2, 64), "sm_100": (4.1, 4.7, 64), "sm_120": (4.6, 5.3, 64)}
_HEAD_HALF |= {"gfx942": (4.2, 5.7, 80), "gfx950": (4.2, 4.9, 80)}
_HEAD_FULL = {"sm_80": (3.8, 4.1, 64), "sm_90": (3.8, 4.1, 64), "sm_100": (3.5, 4.1, 64), "sm_120": (3.9, 4.1, 64)}
_HEAD_FULL |= {"gfx942": (3.7, 3.7, 80), "gfx950": (3.8, 3.7, 80)}
BUDGETS: dict[tuple[str, torch.dtype], dict[str, tuple[float, ...]]] = {
    ("forward", BF16): _FORWARD_HALF,
    ("forward", FP16): _FORWARD_HALF,
    ("forward", FP32): _FORWARD_FULL,
    ("backward", BF16): {**_BACKWARD_HALF, "gfx942": (10.1, 80)},  # CDNA3 rounds to bf16 in many instructions
    ("backward", FP16): _BACKWARD_HALF,
    ("backward", FP32): _BACKWARD_FULL,
    ("forward_backward", BF16): {**_HEAD_HALF, "gfx942": (4.2, 10.1, 80)},
    ("forward_backward", FP16): _HEAD_HALF,
    ("forward_backward", FP32): _HEAD_FULL,
}
# The backward of log-probabilities whose entropy has an upstream gradient, on sm_90. Each logit takes a multiply-add
# more, and a maximum without which a logit of -inf would give 0 * inf.
ENTROPY = {BF16: (7.4, 72), FP16: (7.4, 72), FP32: (6.5, 48)}
MUFU = 1.02  # exponentials for each logit

# options: keywords of the functions below, which take what concerns them; "weight" and "token_weight" stand for tensors
OPTIONS: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.1},
    "logit_scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 30.0},
    "z_loss": {"z_loss": 1e-4},
    "max_nll": {"max_nll": 10.0},
    "num_items": {"num_items": True},
    "weight": {"weight": True},
    "weight, label_smoothing": {"weight": True, "label_smoothing": 0.1},
    "token_weight": {"token_weight": True},
    "reduction none": {"sums": False},
    "sliced rows": {"slices": True},
    "statistics": {"stats": True},
    "shard": {"shard": True, "sums": False},
    "no gradient": {"upstream": None},
    "entropy": {"entropy": True},
    "any stride": {"contiguous": False},
}
_ALL = {"label_smoothing": 0.1, "logit_scale": 0.5, "softcap": 30.0, "z_loss": 1e-4, "max_nll": 10.0, "num_items": True}
OPTIONS["all"] = {**_ALL, "weight": True, "token_weight": True, "slices": True, "stats": True}


def _meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _logits(dtype: torch.dtype, v: int, contiguous: bool) -> Tensor:
    return _meta(1, NUM_ROWS, v, dtype=dtype) if contiguous else _meta(1, v, NUM_ROWS, dtype=dtype).transpose(1, 2)


def _common(options: dict[str, Any], v: int) -> tuple[launch.Weights, launch.LossScalars]:
    weight = _meta(v) if options.pop("weight", False) else None
    token_weight = _meta(NUM_ROWS) if options.pop("token_weight", False) else None
    names = ("logit_scale", "softcap", "label_smoothing", "z_loss", "max_nll")
    scalars = launch.loss_scalars(**{name: options.pop(name) for name in names if name in options})
    total = None if weight is None or scalars.smoothing is None else _meta()
    return launch.Weights(weight, total, token_weight), scalars


def _config(dtype: torch.dtype, v: int, target: str, register_pressure: int) -> launch.LaunchConfig:
    return launch.choose_config(NUM_ROWS, v, dtype.itemsize, _device(target), register_pressure=register_pressure)


def _device(target: str) -> launch.Device:
    return launch.Device(NUM_SMS, aot.TARGETS[target].warp_size)


def forward(
    dtype: torch.dtype = BF16, v: int = ODD, target: str = "sm_90", **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The forward kernel and the arguments that its launcher gives it."""
    weights, scalars = _common(options, v)
    stats, totals, shard, slices = (
        options.pop(k, d) for k, d in (("stats", 0), ("sums", 1), ("shard", 0), ("slices", 0))
    )
    config = _config(dtype, v, target, launch.register_pressure(scalars, bool(stats or shard)))
    fp64, n = torch.float64, NUM_ROWS
    extra = (_meta(n), _meta(n, dtype=torch.int64)) if stats else ()
    rows = (
        launch.Rows(*(None,) * 6) if shard else launch.Rows(*(_meta(n) for _ in range(3)), _meta(n, dtype=fp64), *extra)
    )
    num_items = _meta(dtype=torch.int64) if options.pop("num_items", False) else None
    workspace = launch.Workspace(_meta(1 + n, dtype=torch.int32), _meta(launch.SLICE_FIELDS, n, 2) if slices else None)
    kwargs = aot.capture(
        nll_forward.nll_forward_kernel,
        lambda: nll_forward.launch_nll_forward(
            _logits(dtype, v, options.pop("contiguous", True)),
            _meta(n, dtype=torch.int64),
            weights,
            scalars,
            rows=rows,
            totals=launch.Totals(_meta(), _meta(), *(_meta(dtype=fp64) for _ in range(3)), num_items)
            if totals
            else None,
            workspace=workspace,
            config=config,
            ignore_index=-100,
            shards=_meta(n, launch.SHARD_FIELDS, dtype=fp64) if shard else None,
        ),
    )
    return nll_forward.nll_forward_kernel, kwargs


def backward(
    dtype: torch.dtype = BF16, v: int = ODD, target: str = "sm_90", **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The backward kernel and the arguments that its launcher gives it."""
    weights, scalars = _common(options, v)
    n, logits = NUM_ROWS, _logits(dtype, v, options.pop("contiguous", True))
    entropy = options.pop("entropy", False)
    of_stats = [_meta(n) for _ in range(3)] if entropy else []
    pressure = bool(scalars.tanh_scale or (scalars.smoothing and weights.per_class is not None) or entropy)
    kwargs = aot.capture(
        nll_backward.nll_backward_kernel,
        lambda: nll_backward.launch_nll_backward(
            logits,
            _meta(n, dtype=torch.int64),
            weights,
            scalars,
            lse=_meta(n, dtype=torch.float64),
            nll=_meta(n),
            upstream=launch.Upstream(_meta().expand(n), _meta().expand(n), *of_stats),
            out=torch.empty_like(logits),
            config=_config(dtype, v, target, pressure),
            ignore_index=-100,
        ),
    )
    return nll_backward.nll_backward_kernel, kwargs


def forward_backward(
    dtype: torch.dtype = BF16, v: int = ODD, target: str = "sm_90", **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The kernel of the fused head and the arguments that its launcher gives it."""
    weights, scalars = _common(options, v)
    n, stats = NUM_ROWS, options.pop("stats", False)
    pressure = launch.register_pressure(scalars, stats)
    extra = (_meta(n), _meta(n, dtype=torch.int64)) if stats else ()
    kwargs = aot.capture(
        nll_forward_backward.nll_forward_backward_kernel,
        lambda: nll_forward_backward.launch_nll_forward_backward(
            _meta(n, v, dtype=dtype),
            _meta(n, dtype=torch.int64),
            weights,
            scalars,
            target_logit=_meta(n),
            rows=launch.Rows(*(_meta(n) for _ in range(3)), _meta(n, dtype=torch.float64), *extra),
            upstream=options.pop("upstream", 1.0),
            config=launch.choose_two_pass_config(v, dtype.itemsize, _device(target), register_pressure=pressure),
            ignore_index=-100,
        ),
    )
    return nll_forward_backward.nll_forward_backward_kernel, kwargs


KERNELS = {"forward": forward, "backward": backward, "forward_backward": forward_backward}


def report(kernel: str, dtype: torch.dtype = BF16, v: int = ODD, target: str = "sm_90", **options: Any) -> aot.Report:
    return aot.read(aot.compile_call(*KERNELS[kernel](dtype, v, target, **options), aot.TARGETS[target]))


def violations(found: aot.Report, budget: tuple[float, ...], itemsize: int) -> list[str]:
    """What is over the budget, in words."""
    *limits, registers = (limit * ALLOWANCE for limit in budget)
    checks = {f"{found.registers} registers, {registers:g} allowed": found.registers <= registers}
    for (name, loop), limit in zip(found.passes.items(), limits, strict=True):
        per_logit, mufu = loop.per_logit(itemsize), loop.mufu / loop.logits(itemsize)
        accesses = loop.loads + loop.stores
        checks |= {
            f"{name}: {per_logit:.2f} instructions a logit, {limit:g} allowed": per_logit <= limit,
            f"{name}: {mufu:.2f} special functions a logit, {MUFU} allowed": mufu <= MUFU,
            f"{name}: accesses of {set(accesses)}, not 16 bytes": all(map(_is_wide, accesses)),
        }
    return [text for text, holds in checks.items() if not holds] + broken_promises(found)


def broken_promises(found: aot.Report, contiguous: bool = True) -> list[str]:
    """What no option may cost either."""
    spilled = IS_NEWEST and (found.spills or found.stack)
    checks = {f"{found.spills} spills, {found.stack} bytes of stack": not spilled}
    for name, loop in found.passes.items():
        checks |= {
            f"{name}: {loop.local} spills in the hot loop": not loop.local,
            f"{name}: {loop.barriers} barriers or shuffles in the hot loop": not loop.barriers,
            f"{name}: no load of 16 bytes in the hot loop": not contiguous or any(map(_is_wide, loop.loads)),
        }
    return [text for text, holds in checks.items() if not holds]


def _is_wide(opcode: str) -> bool:
    return aot.access_bytes(opcode) == 16
