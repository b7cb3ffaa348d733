# SPDX-License-Identifier: Apache-2.0
"""The subclasses that replace the classes of a patched model and of its head.

They have the name and the signature of the original class, and they can be copied and pickled. A forward that is set on
the instance would not do: a copy of the model would call the head of the original.
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_ppl.integrations.huggingface.head_calls import FusedCall, HeadCall, LossConfig, Native

if TYPE_CHECKING:

    class _CausalLM(nn.Module):
        """What `FusedModel` uses of the class that it is mixed into."""

        loss_function: Any

    _Linear = nn.Linear
else:
    _CausalLM = _Linear = object

# (model, head, call) of each forward that this thread is in, the innermost last
_CALLS: ContextVar[tuple[tuple[Any, Any, HeadCall], ...]] = ContextVar("fused_ppl_calls", default=())


class FusedHead(_Linear):
    """Mixed into an `nn.Linear`. Its forward is the `head` method of the current call, if there is a call."""

    _fused_ppl_call: HeadCall | None = None
    _fused_ppl_instance_forward: Any = None

    def _fused_ppl_forward(self, native: Native, input: Tensor) -> Tensor:
        call = call_of(self)
        return native(input) if call is None else call.head(self, input, native)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduce(FusedHead, self, super().__reduce_ex__(protocol))


class FusedModel(_CausalLM):
    """Mixed into a model with a head and a loss function. Its forward makes a `FusedCall` if it trains on labels."""

    _fused_ppl: LossConfig | None = None
    _fused_ppl_call: HeadCall | None = None
    _fused_ppl_trainer_scales = False  # True if PerplexityTrainerMixin turns this cross-entropy into a perplexity
    _fused_ppl_warned = False

    def _fused_ppl_forward(self, native: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        skip_logits = kwargs.pop("skip_logits", None)
        config = self._fused_ppl
        if config is None or call_of(self) is not None:  # during the check there already is a call
            return native(*args, **kwargs)
        labels = kwargs.get("labels")
        if labels is None and len(args) > config.labels_position:
            labels = args[config.labels_position]
        if labels is None or not (self.training if skip_logits is None else skip_logits):
            return native(*args, **kwargs)
        head = head_of(self)
        if isinstance(head, FusedHead):
            reason = reason_against_weight(head.weight)
        else:
            reason = f"its head is another module now ({type(head).__name__})"
        if reason is not None:
            self._fused_ppl_warn(reason)
            return native(*args, **kwargs)
        if not self.training:
            config = replace(config, label_smoothing=0.0, z_loss=0.0)
        if kwargs.get("ignore_index") is not None:
            config = replace(config, ignore_index=kwargs["ignore_index"])
        shift_labels = kwargs.get("shift_labels") if "shift_labels" in config.forwarded_keywords else None
        perplexity = config.loss == "perplexity" and self.training and not self._fused_ppl_trainer_scales
        call = FusedCall(config, labels, shift_labels, perplexity)
        try:
            with use_call(self, head, call):
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
            function = getattr(value, "func", value)  # the hooks of accelerate are partials
            owner = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
            if owner not in ("accelerate", "torch"):  # the wrappers of these call the forward that they replace
                self._fused_ppl_warn(f"{owner or 'something'} replaced its forward and may compute its own", "may run")
        super().__setattr__(name, value)

    @property
    def loss_function(self) -> Any:
        native, call = super().loss_function, call_of(self)
        return native if call is None else functools.partial(call.reduce, native)

    @loss_function.setter
    def loss_function(self, function: Any) -> None:
        super(FusedModel, type(self)).loss_function.fset(self, function)
        self._fused_ppl = None
        self._fused_ppl_warn("its loss_function was set")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduce(FusedModel, self, super().__reduce_ex__(protocol))


def head_of(model: Any) -> Any:
    """Return the module that computes the logits. If PEFT trains a copy of the head, this is the active copy."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    active = [name for name in head.active_adapters if name in copies]
    return head.original_module if head.disable_adapters or len(active) != 1 else copies[active[0]]


def reason_against_weight(weight: Any) -> str | None:
    """Return why the fused loss cannot read this weight of a head, as a part of a sentence, or None if it can."""
    if type(weight) not in (Tensor, nn.Parameter) and not hasattr(weight, "device_mesh"):
        return f"the weight of its head is a {type(weight).__name__}, and only its own class can read its numbers"
    if not weight.dtype.is_floating_point:
        return f"the weight of its head is quantised, packed as {weight.dtype}"
    return None


def call_of(module: FusedHead | FusedModel) -> HeadCall | None:
    """Return the current call of a model or a head in this thread, or None."""
    if not torch.compiler.is_compiling():
        call: HeadCall
        for model, head, call in reversed(_CALLS.get()):
            if module is model or module is head:
                return call
    # torch.compile traces in the thread that runs the forward, so an attribute is enough there
    return module._fused_ppl_call


@contextlib.contextmanager
def use_call(model: Any, head: Any, call: HeadCall) -> Iterator[None]:
    """Make `call` the current call of a model and its head, in this thread only."""
    if torch.compiler.is_compiling():  # Dynamo traces attributes, but not context variables or new hooks
        model._fused_ppl_call = head._fused_ppl_call = call
        try:
            yield
        finally:
            model._fused_ppl_call = head._fused_ppl_call = None
        return
    token = _CALLS.set((*_CALLS.get(), (model, head, call)))
    # this hook is registered last, so it gets the output that the hooks of wrappers have changed
    hook = (
        head.register_forward_hook(functools.partial(_set_head_output, call)) if isinstance(call, FusedCall) else None
    )
    try:
        yield
    finally:
        _CALLS.reset(token)
        if hook is not None:
            hook.remove()


def _set_head_output(call: FusedCall, head: Any, args: Any, output: Any) -> None:
    if call_of(head) is call:
        call.set_head_output(output)


@functools.cache
def subclass(mixin: type, cls: Any) -> type:
    """Return `cls` with `mixin` before it. Two patched models of one class get the same subclass."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        native = functools.partial(cls.forward, self)
        if not issubclass(
            type(self), mixin
        ):  # the model was unpatched, but a wrapper on the instance kept this forward
            return native(*args, **kwargs)
        if mixin is FusedHead:
            return self._fused_ppl_forward(native, *args, **kwargs)
        return self._fused_ppl_forward(native, args, kwargs)

    # Trainer and generate read the signature; accelerate would mistake __wrapped__ for one of its own wrappers
    del forward.__wrapped__
    vars(forward)["__signature__"] = inspect.signature(cls.forward)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), {**names, "forward": forward, "_fused_ppl_class": cls})


def swap(module: Any, mixin: type) -> None:
    """Replace the class of a module by its subclass with `mixin`."""
    cls: Any = type(module)
    if not isinstance(module, mixin):  # a wrapper such as FSDP may have put its own class in front of our subclass
        module.__class__ = subclass(mixin, cls)
        _rebind(module)
    module.__dict__["_fused_ppl_call"] = None  # set now, because Dynamo guards on the attributes of an instance
    instance_forward = module.__dict__.get("forward")
    if mixin is FusedHead and instance_forward is not None and "_old_forward" not in module.__dict__:
        # tensor parallelism of transformers sets a forward on the instance, which has to go through ours
        module.__dict__["_fused_ppl_instance_forward"] = instance_forward
        module.__dict__["forward"] = functools.partial(module._fused_ppl_forward, instance_forward)


def swap_back(module: Any) -> None:
    """Undo `swap`. If a wrapper put its class in front of our subclass, both stay, and ours runs natively."""
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
    """Replace the forward that a hook of accelerate (device_map) has stored when it was added."""
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def _rebuild(mixin: type, cls: type) -> Any:
    swapped: Any = subclass(mixin, cls)
    return swapped.__new__(swapped)


def _reduce(mixin: type, module: Any, reduced: Any) -> Any:
    """Pickle the original class and the mixin, because the subclass cannot be imported by its name."""
    original = type(module).__dict__.get("_fused_ppl_class")
    if original is None:  # a further subclass defines its own pickling
        return reduced
    return (_rebuild, (mixin, original), *reduced[2:])
