# SPDX-License-Identifier: Apache-2.0
"""Which code runs the row formula: strict by name, best effort for None, with the reasons collected.

A backend is a module of four functions over rows of logits. It knows the row formula and no loop over the
caller's memory; the engines know the loop and no formula.

    nll_forward(logits, target, spec, weight, token_weight, num_items, budget, keep_lse) -> (RowStats, Totals | None)
    nll_backward(logits, target, rows_lse, rows_nll, of_s, of_z, spec, weight, token_weight, out) -> None
    nll_forward_backward(logits, target_logit, target, spec, weight, token_weight, upstream) -> RowStats
    nll_forward_shard(logits, target, target_logit, spec, weight, columns) -> (N, 6) float64

`logits` is (N, V), or (B, R, V) with row n = b * R + r and N = B * R, of any strides; `target`, `token_weight` and all
that is per row are (N,). `nll_forward` returns Totals where the same launch has already summed and finished them.
`nll_forward_backward` is the chunk primitive of the fused LM head: it turns logits (R, V) into their gradient.
`nll_forward_shard` gives statistics of a shard of the vocabulary, which `shards` merges, the same for every backend;
`columns` = (first, num_classes) says which part of the vocabulary the logits are, there and in `nll_backward`.

The compact fused head asks a second module of each backend for four more, over logits (R, V) or (R, K):

    nll_columns(logits, target_logit, target, spec, weight, token_weight, signed) -> (RowStats, Columns, Factors)
    nll_columns_shard(logits, target_logit, target, lse, nll, spec, ..., signed, shard) -> (Columns, Factors)
    nll_kept(logits, index, place, stats, factors, spec, out) -> what is left of the row sums
    nll_rescreen(logits, screened, index, place, stats, factors, spec, weight_sum) -> (RowStats, the same, error of nll)
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

from fused_ppl import checks
from fused_ppl.backends import presence
from fused_ppl.spec import BACKENDS

MODULES = {"torch": "fused_ppl.backends.torch_rows", "triton": "fused_ppl.backends.triton_rows"}
COMPACT_MODULES = {"torch": "fused_ppl.backends.torch_compact", "triton": "fused_ppl.backends.triton_compact"}


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for this call. A name is that one or an error; None is the best that can run.

    Raises:
        NotImplementedError: a named backend cannot run here; the message says why and which can.
    """
    asked = f"backend={name!r}"
    if name is None:
        name = os.environ.get("FUSED_PPL_BACKEND") or None
        asked = f"FUSED_PPL_BACKEND={name}"
        if name is not None:
            checks.check_choice("FUSED_PPL_BACKEND", name, BACKENDS, "Unset it to let each call choose.")
    if name is None:
        return "torch" if device.type not in presence.TRITON_DEVICES else _best(device, dtype)
    reason = refusal(name, device, dtype)
    if reason is not None:
        able = [b for b in BACKENDS if refusal(b, device, dtype) is None]
        raise NotImplementedError(
            f"{asked} cannot run on {device.type} with {dtype}: {reason}. Use one of "
            f"{', '.join(repr(b) for b in able)}, or backend=None without FUSED_PPL_BACKEND for the best that can."
        )
    return name


def _best(device: torch.device, dtype: torch.dtype) -> str:
    """On a GPU, Triton where it can run. An installation that keeps it from running is told of once."""
    if refusal("triton", device, dtype) is None:
        return "triton"
    problem = presence.TRITON_PROBLEM or presence.compiler_problem(device)
    if problem is not None and not torch.compiler.is_compiling():
        _warn_once(device.type, problem)
    return "torch"


@functools.cache
def _warn_once(kind: str, problem: str) -> None:
    warnings.warn(
        f"fused_ppl computes with PyTorch's operators instead of its kernels on {kind}, which is slower: {problem}. "
        'Options(backend="torch") chooses this without a warning.',
        stacklevel=6,
    )


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run here, or None where it can."""
    if name != "triton":
        return None
    if presence.TRITON_PROBLEM is not None:
        return presence.TRITON_PROBLEM
    if dtype == torch.float64:
        return "the kernels compute in float32, and float64 would be rounded"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "there is no GPU behind it, and the interpreter runs only under TRITON_INTERPRET=1"
    if device.type == "cpu":
        return None
    if device.type not in presence.TRITON_DEVICES:
        return f"Triton generates no code for {device.type}"
    return presence.compiler_problem(device)


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])


@functools.cache
def load_compact(name: str) -> ModuleType:
    return importlib.import_module(COMPACT_MODULES[name])
