# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, made right and fast. Before 3.9 its tl.fma rounds the product as well: no GPU does, and the
kernels rely on it.

For processes that have TRITON_INTERPRET=1: tests/conftest.py, and dry runs of what is for a GPU.
"""

from __future__ import annotations

import dataclasses


def round_once() -> None:
    """Exact products for float32, in this process from now on. Nothing to do from Triton 3.9 on."""
    from triton.runtime import interpreter

    if hasattr(interpreter._interpreter, "fma_fp32"):
        return

    def fma(self, x, y, z):  # type: ignore[no-untyped-def]
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


def skip_its_checks() -> None:
    """The interpreter takes two thirds of its time for two things, which it does no more in this process. It patches
    triton.language anew in every function that a kernel calls, and it looks for integer overflow."""
    from triton.runtime import interpreter

    original, core = interpreter.InterpretedFunction.__call__, interpreter.tl.core
    met: list[object] = []

    def call(self, *args, **keywords):  # type: ignore[no-untyped-def]
        if core in self.fn.__globals__.values() and not met:
            met.append(self)  # a function of Triton's own, whose triton.language is another module
            return original(self, *args, **keywords)
        return self.rewrite()(*args, **keywords)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def flush_powers() -> None:
    """Powers of 2 as GPUs compute them, in this process from now on: below 2**-126 they are 0."""
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_exp2

    def exp2(self, x):  # type: ignore[no-untyped-def]
        result = original(self, x)
        if result.data.dtype == "float32":
            result.data = result.data * (result.data >= 2.0**-126)
        return result

    interpreter.InterpreterBuilder.create_exp2 = exp2
