# SPDX-License-Identifier: Apache-2.0
"""What this machine can do for the backends: whether Triton compiles, and whether bf16 products can be summed in fp32.

The installed version is read once, at import, because torch.compile cannot trace the look-up. Triton itself is imported
at the first call that could use it, because that takes a second.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

OLDEST_TRITON = (3, 3, 1)  # the version that torch 2.7 brings
TRITON_DEVICES = ("cuda", "xpu")  # torch calls a ROCm GPU "cuda"


def triton_problem(spec: ModuleSpec | None) -> str | None:
    """Why the package triton cannot run the kernels, or None if nothing is known against it. It is not imported."""
    if spec is None:
        return "the package triton is not installed (it comes with every GPU build of torch)"
    if spec.origin is None:
        where = ", ".join(spec.submodule_search_locations or ())
        return f"the installation of triton is broken: {where} has no __init__.py. Install torch again"
    found = re.search(r"^__version__ = ['\"]((\d+)\.(\d+)\.(\d+)\S*)['\"]", Path(spec.origin).read_text(), re.M)
    if found is not None and tuple(map(int, found.groups()[1:])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"the kernels need Triton {oldest} or newer, as torch 2.7 brings it, and {found[1]} is installed"
    return None


def kernels_problem(spec: ModuleSpec | None) -> str | None:
    """Why there are no kernels beside the package, or None. A checkout reaches them through a symbolic link."""
    if spec is not None:
        return None
    return (
        "fused_ppl/kernels is missing: it is a symbolic link, and this checkout was made without them. Run "
        "`pip install -e .`, which does not need the link, or `git config core.symlinks true` and check out again"
    )


TRITON_PROBLEM = triton_problem(importlib.util.find_spec("triton")) or kernels_problem(
    importlib.util.find_spec("..kernels", __package__)
)
_compiler_problems: dict[str, str | None] = {}  # by type of device


def compiler_problem(device: torch.device) -> str | None:
    """Why Triton cannot compile for this device, or None. It compiles and runs the smallest kernel once per process.

    The result is also None while that cannot be tried: while torch.compile traces, while a CUDA graph is captured, and
    with fake tensors.
    """
    kind = device.type
    if kind not in _compiler_problems:
        if torch.compiler.is_compiling() or not _can_launch(kind):
            return None
        out = torch.empty(1, dtype=torch.float32, device=device)
        if type(out) is not torch.Tensor:
            return None
        try:
            importlib.import_module("..kernels.probe", __package__).launch_probe(out)
            _compiler_problems[kind] = None
        except Exception as error:  # whatever a broken installation raises
            first_line = next(iter(str(error).strip().splitlines()), "")
            _compiler_problems[kind] = f"Triton compiles no kernel here: {type(error).__name__}: {first_line}"
    return _compiler_problems[kind]


def _can_launch(kind: str) -> bool:
    """True if a kernel may be launched now on the current device of this type."""
    if kind == "cuda":
        return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()
    return kind == "xpu" and torch.xpu.is_available()


@functools.cache
def widens_half_products(kind: str) -> bool:
    """True if torch.mm(out_dtype=torch.float32) takes bf16 on this type of device. CUDA has it from torch 2.8 on.

    All ROCm builds have the overload, but some raise when it runs. With a ROCm device this function therefore tries it.
    """
    if kind != "cuda" or "dtype" not in torch.ops.aten.mm.overloads():
        return False
    if not torch.cuda.is_available():  # the tensors are fake
        return True
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", "CUDA"):
        return False
    if torch.version.hip is None:
        return True
    try:
        a = torch.ones(8, 8, dtype=torch.bfloat16, device="cuda")
        torch.mm(a, a, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return True


_adds: dict[str, bool] = {}  # by type of device


def adds_half_products(kind: str) -> bool:
    """True if torch.addmm(out_dtype=) adds a bf16 product to a float32 matrix in place on this type of device.

    It is tried once per process, with its value, because a wrong sum would be a wrong gradient. The result is False
    while that cannot be tried.
    """
    if kind not in _adds:
        if not widens_half_products(kind) or not _can_launch(kind):
            return False
        _adds[kind] = _adds_in_place(kind)
    return _adds[kind]


def _adds_in_place(kind: str) -> bool:
    a = torch.ones(16, 16, dtype=torch.bfloat16, device=kind)
    total = torch.full((16, 16), 1e-3, dtype=torch.float32, device=kind)  # rounded to bf16, 16.001 would be 16
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=total)
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
        torch.addmm(total.mul_(1e-3), a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool(((total - 16.032).abs() < 1e-4).all())
