# SPDX-License-Identifier: Apache-2.0
"""Opaque ops of torch.library, each from one typed function.

torch.compile sees an op as one node, with the shapes that its fake says. torch.library carries tensors and numbers
only. So the fields of the records that a function takes are laid out one after another, here and nowhere else: the
schema, the fake, the implementation and the call are all made from the function's signature.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from fused_ppl import checks
from fused_ppl.records import Needed
from fused_ppl.spec import LossSpec, known

P = ParamSpec("P")
R = TypeVar("R")

# the package's name: a copy that the Hub's `kernels` loads has a name of its own, and so have its ops
LIBRARY = torch.library.Library(__name__.rpartition(".engines.")[0].replace(".", "_"), "DEF")
OPS: dict[str, Op[..., Any]] = {}  # by name
_TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    int: "int",
    int | None: "int?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    torch.dtype: "ScalarType",
    Needed: "bool[3]",
}


class Op(Generic[P, R]):
    """An op that is called as its function is, and returns the record that its function returns.

    The first tensor of the first record is the one that a function may write to, where `mutates` is True.
    """

    def __init__(self, function: Callable[P, R], fake: Callable[..., Any], mutates: bool) -> None:
        hints = typing.get_type_hints(function)
        returned = hints.pop("return")
        self.function = without_autocast(function)
        self.name, self.returns_record = function.__name__, _is_record(returned)
        self._read_result = reader(returned)
        parameters = inspect.signature(function).parameters
        self._keywords = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        self._readers = [reader(kind) for kind in hints.values()]
        arguments = [f for name, kind in hints.items() for f in _fields(name, kind)]
        if mutates:
            arguments[0] = arguments[0].replace("Tensor", "Tensor(a!)")
        # an op returns no None: its function returns a tensor without elements instead
        results = [] if returned is type(None) else [f.replace("?", "") for f in _fields("result", returned)]
        LIBRARY.define(f"{self.name}({', '.join(arguments)}) -> ({', '.join(results)})")
        LIBRARY.impl(self.name, self._over_fields(self.function, known), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{LIBRARY.ns}::{self.name}", self._over_fields(fake), lib=LIBRARY)
        self.overload: torch._ops.OpOverload[..., Any] = getattr(getattr(torch.ops, LIBRARY.ns), self.name).default
        OPS[self.name] = self

    def __call__(self, *args: P.args, **keywords: P.kwargs) -> R:
        """Through the dispatcher."""
        result: R = self.overload(*flatten([*args, *[keywords[name] for name in self._keywords]]))
        return self._read_result(iter(result)) if self.returns_record else result  # type: ignore[call-overload]  # it is a tuple

    def records(self, values: Sequence[Any]) -> list[Any]:
        """The arguments of the function, from the values that the op is called with."""
        iterator = iter(values)
        return [read(iterator) for read in self._readers]

    def _over_fields(
        self, function: Callable[..., Any], read: Callable[[LossSpec], LossSpec] | None = None
    ) -> Callable[..., Any]:
        """The function of fields. `read` makes the spec that the function takes; a fake knows no numbers."""

        def call(*values: Any) -> Any:
            keywords = self.records(values)
            if read is not None:
                keywords = [read(k) if isinstance(k, LossSpec) else k for k in keywords]
            positional = [keywords.pop(0) for _ in range(len(keywords) - len(self._keywords))]
            result = function(*positional, **dict(zip(self._keywords, keywords, strict=True)))
            return tuple(flatten(result)) if self.returns_record else result

        return call


def op(fake: Callable[..., Any], *, mutates: bool = False) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes an op of a function of records, tensors and numbers; `fake` takes the same and returns empty results."""
    return lambda function: Op(function, fake, mutates)


def flatten(records: Sequence[Any]) -> list[Any]:
    """The fields of all records, and of the records in them."""
    values: list[Any] = []
    for value in records:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            values += flatten(value)
        else:
            values.append(value)
    return values


def may_skip_dispatch(tensor: Tensor) -> bool:
    """True if the Python implementation may be called directly, without the dispatcher.

    That is so where nothing traces, counts or fakes what is dispatched, and where the tensor holds numbers.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def may_skip_name(tensor: Tensor) -> bool:
    """As `may_skip_dispatch`, and no profiler would miss the name of the op."""
    return may_skip_dispatch(tensor) and not torch._C._autograd._profiler_enabled()


def _is_record(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _fields(name: str, kind: Any) -> list[str]:
    """The schema of an argument; of a record, that of its fields."""
    if not _is_record(kind):
        return [f"{_TYPES[kind]} {name}"]
    return [f for field, inner in typing.get_type_hints(kind).items() for f in _fields(field, inner)]


def reader(kind: Any) -> Callable[[Iterator[Any]], Any]:
    """A function that takes the next values for one of this kind: the fields of a record, or one value."""
    if kind == Needed:
        return lambda values: tuple(next(values))
    if not _is_record(kind):
        return next
    readers = [reader(inner) for inner in typing.get_type_hints(kind).values()]
    return lambda values: kind(*[read(values) for read in readers])


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The dtype of the products is an argument: inside, autocast would round what is to be added up in float32."""

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        first: Any = next(iter(args))
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if not checks.autocast(device):
            return function(*args, **keywords)
        with torch.autocast(device, enabled=False):
            return function(*args, **keywords)

    return call
