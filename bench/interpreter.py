# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter before version 3.9, made to compute as a GPU does."""

from __future__ import annotations

from typing import Any


def round_fma_once() -> None:
    """Before 3.9 the interpreter's tl.fma rounds its product as well, which no GPU does."""
    from triton.runtime import interpreter

    if hasattr(interpreter._interpreter, "fma_fp32"):
        return

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma
