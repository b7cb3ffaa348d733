# SPDX-License-Identifier: Apache-2.0
"""The peers' Triton kernels as their own launchers launch them, for the harness of aot.py.

pip install --no-deps liger-kernel cut-cross-entropy
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot
import torch
from torch import Tensor

NUM_ROWS, HIDDEN = 8192, 4096
PACKAGES = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}


def missing(package: str) -> str | None:
    """Why a peer is not in a table, or None where it is."""
    if importlib.util.find_spec(package) is None:
        return f"{PACKAGES[package]} is not installed (pip install --no-deps {PACKAGES[package]})"
    return None


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def liger(dtype: torch.dtype, v: int, target: str) -> aot.Report:
    """Liger's cross-entropy kernel, loss and gradient, with the settings of its own launcher."""
    kernel = importlib.import_module("liger_kernel.ops.cross_entropy").liger_cross_entropy_kernel
    x, blackwell, hip = _meta(NUM_ROWS, v, dtype=dtype), target in ("sm_100", "sm_120"), target.startswith("gfx")
    kwargs = {
        "X_ptr": x, "X_stride": v, "Y_ptr": _meta(NUM_ROWS, dtype=torch.int64), "Y_stride": 1, "weight_ptr": None,
        "loss_ptr": _meta(NUM_ROWS), "z_loss_ptr": None, "loss_stride": 1, "token_accuracy_ptr": None,
        "token_accuracy_stride": 0, "predicted_tokens_ptr": None, "predicted_tokens_stride": 0, "n_cols": v,
        "n_non_ignore": 8000.5, "sum_non_ignore_weight": 8000.5, "weight_sum": 0.5, "ignore_index": -100,
        "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean", "softcap": None, "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "HAS_WEIGHT": False, "HAS_SOFTCAPPING": False,
        "BLOCK_SIZE": 32768, "HAS_GRADIENTS": True,
        "num_warps": 16 if hip else 8 if dtype.itemsize == 2 and blackwell else 32,
    }  # fmt: skip
    return aot.read(aot.compile_call(kernel, kwargs, aot.TARGETS[target]))


def cce(name: str, dtype: torch.dtype, v: int, target: str) -> aot.Report:
    """cut-cross-entropy's "forward" or "backward" kernel in its default configuration, D = 4096."""
    e, c = _meta(NUM_ROWS, HIDDEN, dtype=dtype), _meta(v, HIDDEN, dtype=dtype)
    if name == "forward":
        module = importlib.import_module("cut_cross_entropy.cce_lse_forward")
        kernel = _jitted(module._cce_lse_forward_kernel)
        launch: Callable[[], object] = lambda: module.cce_lse_forward_kernel(e, c)  # noqa: E731
    else:
        module = importlib.import_module("cut_cross_entropy.cce_backward")
        kernel = _jitted(module._cce_backward_kernel)
        c.requires_grad_()
        target_ids, lse = _meta(NUM_ROWS, dtype=torch.int64), _meta(NUM_ROWS)
        launch = lambda: module.cce_backward_kernel(  # noqa: E731
            _meta(1), e, c, lse, None, None, torch.finfo(dtype).eps / 32, targets=target_ids
        )
    return aot.read(aot.compile_call(kernel, aot.capture(kernel, launch), aot.TARGETS[target]))


def _jitted(kernel: Any) -> Any:
    """The function under the layers of heuristics."""
    while hasattr(kernel, "fn") and not hasattr(kernel, "params"):
        kernel = kernel.fn
    return kernel


# --- passes over N x V of a perplexity loss from logits, forward + backward ------------------------------------------

# (what, file of the package, a line of it that moves N x V, "read" or "write"); a line that stands twice counts twice
_OURS = (
    ("forward", "kernels/row_sums.py", "logits = row_tiles.load_tile(body_ptr, tile, None,", "read"),
    ("backward", "kernels/nll_backward.py", "row_tiles.load_tile(body_ptr, tile, None,", "read"),
    ("backward", "kernels/nll_backward.py", "row_tiles.store_tile(out_body_ptr, g, tile, None,", "write"),
)
_LIGER = (
    ("forward", "ops/cross_entropy.py", "X_block = tl.load(", "read"),
    ("forward", "ops/cross_entropy.py", "tl.store(X_ptr + X_offsets, X_block,", "write"),
    ("backward", "ops/utils.py", "X_block = tl.load(X_ptrs,", "read"),
    ("backward", "ops/utils.py", "tl.store(X_ptrs, X_block * grad_output,", "write"),
)


def passes(who: str) -> list[tuple[str, str, str]]:
    """(forward or backward, read or write, file:line) of every pass that "fused_ppl" or "Liger" makes.

    Liger's second read of a row comes out of L2 where all rows at work fit there, up to V of about 150 thousand.
    """
    if who == "fused_ppl":
        folder, lines = Path(__file__).parents[1], _OURS
    else:
        spec = importlib.util.find_spec("liger_kernel")
        assert spec is not None and spec.origin is not None
        folder, lines = Path(spec.origin).parent, _LIGER
    found = []
    for phase, file, snippet, kind in lines:
        text = (folder / file).read_text().splitlines()
        numbers = [i for i, line in enumerate(text, 1) if snippet in line]
        if not numbers:
            raise LookupError(f"{file} of {who} has no line with {snippet!r} any more; count its passes again.")
        found += [(phase, kind, f"{file}:{number}") for number in numbers]
    return found
