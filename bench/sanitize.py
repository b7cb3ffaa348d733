# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of the kernels with every access to memory checked, without a GPU.

    python bench/sanitize.py [--order SEED] [pytest arguments]        default: all of tests/test_kernels*.py

Triton's interpreter runs the programs of a launch one after another. Here each load, store and atomic is looked up in a
shadow of the memory (shadow.py): it must lie within the elements of a tensor of the launch, and must be ordered, by a
barrier or by release and acquire, after what other programs did to the same bytes. --order runs the programs of each
launch in another order, so that others arrive last; every result must stay as it is.

tests/test_sanitize.py plants an access out of bounds, races and a missing barrier, and sees each caught.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
TESTS = [*sorted(str(p) for p in (ROOT / "tests").glob("test_kernels*.py")), str(ROOT / "tests" / "test_sanitize.py")]


class Counts:
    """What has been checked since the program began, and how."""

    installed = False
    order = 0
    launches = 0
    accesses = 0
    kernels: ClassVar[set[str]] = set()


def tensors_of(arguments: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors among a launch's arguments and in its groups of arguments, by name."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value
        elif isinstance(value, tuple):
            names = getattr(value, "_fields", range(len(value)))
            found |= tensors_of({str(n): v for n, v in zip(names, value, strict=True)}, f"{prefix}{name}.")
    return found


@contextlib.contextmanager
def installed(order: int = 0) -> Iterator[type[Counts]]:
    """Checks every launch of the interpreter made within. `order` shuffles the programs of a launch; 0 does not."""
    from triton.runtime import interpreter

    before, Counts.order = Counts.order, order
    if Counts.installed:
        try:
            yield Counts
        finally:
            Counts.order = before
        return
    saved = {
        (interpreter.GridExecutor, "__call__"): interpreter.GridExecutor.__call__,
        **{
            (interpreter.InterpreterBuilder, name): getattr(interpreter.InterpreterBuilder, name)
            for name in ("set_grid_idx", "set_grid_dim", *_CHECKED)
        },
    }
    Counts.installed = True
    try:
        _install(interpreter, saved)
        yield Counts
    finally:
        Counts.installed, Counts.order = False, before
        for (owner, name), original in saved.items():
            setattr(owner, name, original)


_CHECKED = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas", "create_barrier")


def _install(interpreter: Any, saved: dict[tuple[Any, str], Any]) -> None:
    from shadow import Shadow

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    original = {name: function for (_, name), function in saved.items()}
    state: dict[str, Any] = {"shadow": None}

    def call(self: Any, *args: Any, **keywords: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | keywords
        state.update(name=self.fn.__name__, tensors=tensors_of(given), shadow=None)
        try:
            original["__call__"](self, *args, **keywords)
        finally:
            if state["shadow"] is not None:
                Counts.launches += 1
                Counts.accesses += state["shadow"].accesses
                Counts.kernels.add(state["name"])
            state["shadow"] = None

    def set_grid_dim(self: Any, *grid: int) -> None:
        original["set_grid_dim"](self, *grid)
        state["shadow"] = Shadow(state["name"], state["tensors"], grid)
        programs = list(range(grid[0] * grid[1] * grid[2]))
        if Counts.order:
            random.Random(Counts.order).shuffle(programs)
        state["programs"] = programs

    def set_grid_idx(self: Any, *at: int) -> None:
        grid = self.grid_dim
        program = state["programs"][int(np.ravel_multi_index(at, grid))]
        state["shadow"].program = program
        original["set_grid_idx"](self, *(int(i) for i in np.unravel_index(program, grid)))

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        state["shadow"].load(*_accessed(ptrs, mask))
        return original["create_masked_load"](self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        state["shadow"].store(*_accessed(ptrs, mask))
        return original["create_masked_store"](self, ptrs, value, mask, *rest)

    def atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, *rest: Any) -> Any:
        state["shadow"].atomic(*_accessed(ptr, mask), *_orders(sem))
        return original["create_atomic_rmw"](self, op, ptr, val, mask, sem, *rest)

    def atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, sem: Any, *rest: Any) -> Any:
        state["shadow"].atomic(*_accessed(ptr, None), *_orders(sem))
        return original["create_atomic_cas"](self, ptr, cmp, val, sem, *rest)

    def barrier(self: Any) -> Any:
        state["shadow"].barrier()
        return original["create_barrier"](self)

    executor.__call__ = call
    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    for name, function in zip(_CHECKED, (masked_load, masked_store, atomic_rmw, atomic_cas, barrier), strict=True):
        setattr(builder, name, function)


def _accessed(ptrs: Any, mask: Any) -> tuple[np.ndarray, int]:
    """The addresses that an access touches, and the bytes at each."""
    addresses = np.atleast_1d(ptrs.data)
    if mask is not None:
        addresses = addresses[np.broadcast_to(np.atleast_1d(mask.data), addresses.shape)]
    return addresses.reshape(-1).astype(np.int64), max(1, ptrs.get_element_ty().primitive_bitwidth // 8)


def _orders(sem: Any) -> tuple[bool, bool]:
    """(acquires, releases)"""
    name = str(sem).upper()
    both = "ACQUIRE_RELEASE" in name or "ACQ_REL" in name
    return both or "ACQUIRE" in name, both or "RELEASE" in name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=0, metavar="SEED", help="shuffle the programs of every launch")
    args, rest = parser.parse_known_args()
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import pytest

    named = any(Path(r.split("::")[0]).exists() for r in rest)
    with installed(args.order):
        code = int(pytest.main(["--quiet", "--disable-warnings", *([] if named else TESTS), *rest]))
    print(f"{Counts.launches} launches, {Counts.accesses} elements accessed, every one of them checked")
    missing = set() if named or "-k" in rest else ours() - Counts.kernels
    if missing:
        print(f"every kernel of bench/budgets.py must be launched; not launched: {', '.join(sorted(missing))}")
    return code or int(bool(missing) or Counts.launches == 0)


def ours() -> set[str]:
    """The names of the kernels that the package has."""
    import budgets

    return {make()[0].fn.__name__ for make in budgets.KERNELS.values()}


if __name__ == "__main__":
    import sanitize  # the module that the tests import, so that both hold the same state

    sys.exit(sanitize.main())
