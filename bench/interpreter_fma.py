# SPDX-License-Identifier: Apache-2.0
"""tl.fma in Triton's interpreter, which before 3.9 rounds the product as well: no GPU does, and the kernels rely on it.

For processes that have TRITON_INTERPRET=1: tests/conftest.py, and dry runs of what is for a GPU.
"""

from __future__ import annotations


def round_once() -> None:
    """Exact products for float32, in this process from now on. Nothing to do from Triton 3.9 on."""
    from triton.runtime import interpreter

    if hasattr(interpreter._interpreter, "fma_fp32"):
        return

    def fma(self, x, y, z):  # type: ignore[no-untyped-def]
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma
