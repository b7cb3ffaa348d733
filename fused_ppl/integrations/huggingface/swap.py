# SPDX-License-Identifier: Apache-2.0
"""The subclasses that a patched model and its head take: same name, same signature of forward, copied and pickled.

A class, where an attribute of the instance would have a copy of the model call the original's head.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_ppl.integrations.huggingface.calls import Fused, Recipe

# the calls that this thread is in: (model, head, call), the innermost last
_CALLS: ContextVar[tuple[tuple[Any, Any, Any], ...]] = ContextVar("fused_ppl_calls", default=())


class FusedHead:
    """An `nn.Linear` that runs the call in charge, if there is one."""

    _fused_ppl_call: Any = None
    _fused_ppl_instance_forward: Any = None

    def _fused_ppl_forward(self, native: Any, input: Tensor) -> Tensor:
        call = call_of(self)
        return native(input) if call is None else call.head(self, input, native)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduce(FusedHead, self, super().__reduce_ex__(protocol))


class FusedModel:
    """A model with a head and a loss function that puts a call in charge where it trains on labels."""

    _fused_ppl: Recipe | None = None
    _fused_ppl_call: Any = None
    _fused_ppl_window = False  # PerplexityTrainerMixin scales the gradient afterwards
    _fused_ppl_warned = False

    def _fused_ppl_forward(self, native: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        skip_logits = kwargs.pop("skip_logits", None)
        recipe = self._fused_ppl
        if recipe is None or call_of(self) is not None:  # the check has a call in charge
            return native(*args, **kwargs)
        labels = kwargs.get("labels")
        if labels is None and len(args) > recipe.labels_at:
            labels = args[recipe.labels_at]
        wanted = self.training if skip_logits is None else skip_logits  # type: ignore[attr-defined]
        if labels is None or not wanted:
            return native(*args, **kwargs)
        head = head_of(self)
        if not isinstance(head, FusedHead):
            self._fused_ppl_warn(f"its head is another module now ({type(head).__name__})")
            return native(*args, **kwargs)
        reason = not_plain(head.weight)  # type: ignore[attr-defined]
        if reason is not None:
            self._fused_ppl_warn(reason)
            return native(*args, **kwargs)
        if not self.training:  # type: ignore[attr-defined]
            recipe = replace(recipe, label_smoothing=0.0, z_loss=0.0)
        if kwargs.get("ignore_index") is not None:
            recipe = replace(recipe, ignore_index=kwargs["ignore_index"])
        shift_labels = kwargs.get("shift_labels") if "shift_labels" in recipe.handed_on else None
        perplexity = recipe.loss == "perplexity" and self.training and not self._fused_ppl_window  # type: ignore[attr-defined]
        call = Fused(recipe, labels, shift_labels, perplexity)
        try:
            with in_charge(self, head, call):
                out = native(*args, **kwargs)
        finally:
            if call.native:
                self._fused_ppl_warn("the labels and the positions of its head do not match")
        return call.without_logits(out)

    def _fused_ppl_warn(self, reason: str, runs: str = "runs") -> None:
        if not self._fused_ppl_warned:
            self._fused_ppl_warned = True
            name = type(self).__name__
            warnings.warn(f"{name} was patched by fused_ppl and {runs} its native loss: {reason}.", stacklevel=4)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and self._fused_ppl is not None and not self._fused_ppl.is_native():
            value_of = getattr(value, "func", value)  # accelerate's hooks are partials
            owner = getattr(value_of, "__globals__", {}).get("__name__", "").partition(".")[0]
            if owner not in ("accelerate", "torch"):  # whose wrappers call what they replace
                self._fused_ppl_warn(f"{owner or 'something'} replaced its forward and may compute its own", "may run")
        super().__setattr__(name, value)

    @property
    def loss_function(self) -> Any:
        native, call = super().loss_function, call_of(self)  # type: ignore[misc]
        return native if call is None else functools.partial(call.reduce, native)

    @loss_function.setter
    def loss_function(self, function: Any) -> None:
        super(FusedModel, type(self)).loss_function.fset(self, function)  # type: ignore[misc]
        self._fused_ppl = None
        self._fused_ppl_warn("its loss_function was set")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduce(FusedModel, self, super().__reduce_ex__(protocol))


def head_of(model: Any) -> Any:
    """The module that makes the logits; inside PEFT's wrapper for a head that is trained beside its adapters."""
    head = model.get_output_embeddings()
    saved = getattr(head, "modules_to_save", None)
    if saved is None:
        return head
    active = [a for a in head.active_adapters if a in saved]
    return head.original_module if head.disable_adapters or len(active) != 1 else saved[active[0]]


def not_plain(weight: Any) -> str | None:
    """Why a head's weight cannot take part in a fused loss, which reads its numbers; half a sentence."""
    if type(weight) not in (Tensor, torch.nn.Parameter) and not hasattr(weight, "device_mesh"):
        return f"the weight of its head is a {type(weight).__name__}, whose numbers only its own products know"
    if not weight.dtype.is_floating_point:
        return f"the weight of its head is quantised, packed as {weight.dtype}"
    return None


def call_of(module: Any) -> Any:
    """The call that is in charge of a model or a head in this thread, or None."""
    if not torch.compiler.is_compiling():
        for model, head, call in reversed(_CALLS.get()):
            if module is model or module is head:
                return call
    return module._fused_ppl_call  # where it is traced: a compiled forward runs in the thread that traces it


@contextlib.contextmanager
def in_charge(model: Any, head: Any, call: Any) -> Iterator[None]:
    """Puts a call in charge of a model and its head, for this thread alone."""
    if torch.compiler.is_compiling():  # which traces attributes, and neither context variables nor new hooks
        model._fused_ppl_call = head._fused_ppl_call = call
        try:
            yield
        finally:
            model._fused_ppl_call = head._fused_ppl_call = None
        return
    token = _CALLS.set((*_CALLS.get(), (model, head, call)))
    # the last of the hooks: it sees what those of wrappers have made of the output
    hook = head.register_forward_hook(functools.partial(_returned, call)) if isinstance(call, Fused) else None
    try:
        yield
    finally:
        _CALLS.reset(token)
        if hook is not None:
            hook.remove()


def _returned(call: Fused, head: Any, args: Any, output: Any) -> None:
    if call_of(head) is call:
        call.returned(output)


@functools.cache
def subclass(mixin: type, cls: Any) -> type:
    """`cls` with `mixin` before it; one class for each pair, so that two patched models are of one type."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        native = functools.partial(cls.forward, self)
        if not issubclass(type(self), mixin):  # unpatched, and a wrapper on the instance kept this forward
            return native(*args, **kwargs)
        if mixin is FusedHead:
            return self._fused_ppl_forward(native, *args, **kwargs)
        return self._fused_ppl_forward(native, args, kwargs)

    # Trainer and generate read the signature; accelerate unwraps its own wrappers as far as it finds __wrapped__
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), {**names, "forward": forward, "_fused_ppl_class": cls})


def swap(module: Any, mixin: type) -> None:
    """Give a module the subclass. A forward that was replaced on the instance goes through it as well."""
    cls: Any = type(module)
    if not isinstance(module, mixin):  # it is one where a wrapper like FSDP put its class over ours
        module.__class__ = subclass(mixin, cls)
        _rebind(module)
    instance_forward = module.__dict__.get("forward")
    if mixin is FusedHead and instance_forward is not None and "_old_forward" not in module.__dict__:
        # transformers' tensor parallelism
        module.__dict__["_fused_ppl_instance_forward"] = instance_forward
        module.__dict__["forward"] = functools.partial(module._fused_ppl_forward, instance_forward)


def swap_back(module: Any) -> None:
    """Undo `swap`. A class that was put over ours stays, and does nothing."""
    instance_forward = module.__dict__.get("_fused_ppl_instance_forward")
    if instance_forward is not None:
        module.__dict__["forward"] = instance_forward
    for name in [n for n in module.__dict__ if n.startswith("_fused_ppl")]:
        del module.__dict__[name]
    original = type(module).__dict__.get("_fused_ppl_class")
    if original is not None:
        module.__class__ = original
        _rebind(module)


def _rebind(module: Any) -> None:
    """accelerate's hooks (device_map) keep the forward of the class that they met."""
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def _rebuild(mixin: type, cls: type) -> Any:
    made: Any = subclass(mixin, cls)
    return made.__new__(made)


def _reduce(mixin: type, module: Any, reduced: Any) -> Any:
    original = type(module).__dict__.get("_fused_ppl_class")
    if original is None:  # a further subclass, which says itself how it is pickled
        return reduced
    return (_rebuild, (mixin, original), *reduced[2:])
