# SPDX-License-Identifier: Apache-2.0
"""`pytest --device elsewhere`: a device that is not the CPU, for machines that have no other.

Its tensors hold one of the CPU, which computes; but they are elsewhere to everyone who asks, fused_ppl takes the code
that a GPU takes, and a tensor of the CPU that meets one of them is an error, as on a GPU. Missing are what works below
Python: torch.compile, autocast, pinned memory, kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

NAME = "elsewhere"
MEETS_THE_CPU = {"copy_", "index", "index_put", "index_put_", "_index_put_impl_"}  # for indices; torch moves them
NUMBERS = {"_local_scalar_dense", "equal", "is_nonzero"}

HERE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

_aten = torch.library.Library("aten", "IMPL")


class Elsewhere(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **keywords: object) -> str:
        return f"{NAME} {self.inner!r}"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = op._schema.name.split("::")[1]
        if op.namespace == "fused_ppl":
            return op.redispatch(HERE, *args, **kwargs)  # walks over tensors elsewhere
        leaves, spec = pytree.tree_flatten((args, kwargs))
        _refuse_the_cpu(name, args, leaves)
        inside = [torch.device("cpu") if isinstance(t, torch.device) else _inner(t) for t in leaves]
        inner_args, inner_keywords = pytree.tree_unflatten(inside, spec)
        inner_keywords.pop("pin_memory", None)
        out = op(*inner_args, **inner_keywords)
        if name == "copy_":
            return args[0]
        device = kwargs.get("device")
        if name in NUMBERS or (device is not None and torch.device(device).type == "cpu"):
            return out
        known = {id(t.inner): t for t in leaves if isinstance(t, Elsewhere)}

        def put(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return known[id(t)] if id(t) in known else Elsewhere(t)

        out = pytree.tree_map(put, out)
        return return_and_correct_aliasing(op, args, kwargs, out)


def _inner(t: Any) -> Any:
    return t.inner if isinstance(t, Elsewhere) else t


def _refuse_the_cpu(name: str, args: tuple[Any, ...], leaves: list[Any]) -> None:
    """Numbers may come from the CPU, and indices to it."""
    others = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, Elsewhere) and t.ndim > 0]
    if others and (name not in MEETS_THE_CPU or (name != "copy_" and any(args[0] is t for t in others))):
        raise RuntimeError(f"{name}: expected all tensors on {NAME}, and one of {tuple(others[0].shape)} is on the cpu")


def supported() -> bool:
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def install() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME)

    def made(name: str, overload: str) -> None:
        op = getattr(getattr(torch.ops.aten, name), overload)

        def make(*args: Any, device: object = None, pin_memory: object = None, **keywords: Any) -> Elsewhere:
            return Elsewhere(op(*args, device="cpu", **keywords))

        _aten.impl(name if overload == "default" else f"{name}.{overload}", make, "PrivateUse1")

    for name, overload in (
        ("empty", "memory_format"), ("empty_strided", "default"), ("arange", "default"), ("arange", "start"),
        ("arange", "start_step"), ("eye", "default"), ("eye", "m"),
    ):  # fmt: skip
        made(name, overload)

    def copy(source: Tensor, out: Tensor, non_blocking: bool = False) -> Tensor:
        _inner(out).copy_(_inner(source))
        return out

    _aten.impl("_copy_from", copy, "PrivateUse1")
    _aten.impl("_local_scalar_dense", lambda x: x.inner.item(), "PrivateUse1")

    to_list = Tensor.tolist
    Tensor.tolist = lambda self: to_list(_inner(self))
