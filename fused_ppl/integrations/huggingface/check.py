# SPDX-License-Identifier: Apache-2.0
"""Decides whether a model can be patched, by running it.

Three forwards of the model on one small batch show: what it does to its logits, its native loss and gradient, and the
fused loss and gradient. Reading the code or the names of a model could not show that these two agree.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_ppl import next_token_targets
from fused_ppl.integrations.huggingface import logit_transform
from fused_ppl.integrations.huggingface.head_calls import FusedLeafCall, HeadCall, LossConfig, NativeCall, ProbeCall
from fused_ppl.integrations.huggingface.logit_transform import CheckError, config_numbers
from fused_ppl.integrations.huggingface.swap import use_call

LENGTH = 8


@dataclass(frozen=True)
class NativeResult:
    """The native loss on the batch of the check."""

    loss: Tensor
    hidden: Tensor  # a leaf, whose gradient is compared
    keywords: dict[str, Any]  # what forward was given beside the batch
    loss_keywords: dict[str, Any]  # what the loss function was given


def examine(model: Any, head: nn.Linear, batch: dict[str, Any] | None) -> LossConfig:
    """Return the configuration for which the fused loss equals the native loss. The classes are swapped already.

    Raises:
        CheckError: the model cannot be patched.
    """
    parameters = inspect.signature(type(model).forward).parameters
    if "labels" not in parameters:
        raise CheckError("its forward takes no labels")
    with _evaluation_mode(model):
        batch = dict(batch) if batch is not None else {"input_ids": small_batch(model, head)}
        labels = batch.pop("labels", None)
        if labels is None:
            labels = batch["input_ids"].clone()
            labels[:, LENGTH // 2 :: 3] = -100
        scale, softcap = _probe(model, head, batch)
        batch["labels"] = labels
        native = _native_loss(model, head, batch, parameters)
        config = LossConfig(
            logit_scale=scale,
            softcap=softcap,
            ignore_index=native.loss_keywords.get("ignore_index", -100),
            forwarded_keywords=frozenset(k for k in native.keywords if native.loss_keywords.get(k) is not None),
            labels_position=list(parameters).index("labels") - 1,
        )
        _compare(model, head, config, batch=batch, native=native)
        return config


def small_batch(model: Any, head: nn.Linear) -> Tensor:
    """Return two rows of random tokens without special tokens. Every number in the configuration counts as special."""
    special = {int(n) for n in config_numbers(model.config.to_dict()) if n == int(n)}
    vocab = min(head.weight.shape[0], getattr(model.get_input_embeddings(), "num_embeddings", head.weight.shape[0]))
    ids = [i for i in range(min(vocab, 4096)) if i not in special] or list(range(vocab))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(ids), (2, LENGTH), generator=generator, dtype=torch.int64, device="cpu")
    return torch.tensor(ids, dtype=torch.int64, device="cpu")[chosen].to(model.device)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without autocast. Modes and random states are restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    no_autocast = torch.autocast(next(model.parameters()).device.type, enabled=False)
    try:
        with torch.random.fork_rng(sorted(cuda, key=str)), torch.enable_grad(), no_autocast:
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _run(model: Any, head: nn.Linear, call: HeadCall, batch: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with use_call(model, head, call):
        return model(**batch)


def _field(out: Any, name: str) -> Any:
    """The loss or the logits of an output, which is a tuple if the model returns tuples. They come first there."""
    return out[name] if isinstance(out, dict) else out[0]


def _probe(model: Any, head: nn.Linear, batch: dict[str, Any]) -> tuple[float, float | None]:
    """Return the scale and the softcap that the model applies to its logits."""
    call = ProbeCall()
    out = _run(model, head, call, batch)
    if len(call.probes) != 1:
        raise CheckError(f"it calls its head {len(call.probes)} times for one batch of tokens")
    return logit_transform.fit(call.probes[0], _field(out, "logits"), tuple(config_numbers(model.config.to_dict())))


def _native_loss(
    model: Any, head: nn.Linear, batch: dict[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> NativeResult:
    """Compute the native loss, with as many of the optional keywords of the loss as forward takes."""
    shifted = next_token_targets(batch["labels"])
    items = torch.tensor(11.0, dtype=torch.float32, device=shifted.device)
    optional = {"num_items_in_batch": items, "shift_labels": shifted}
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    keywords = {k: v for k, v in optional.items() if takes_all or k in parameters}
    call = NativeCall()
    try:
        out = _run(model, head, call, {**batch, **keywords})
    except TypeError:  # forward passed its keywords to a function that does not take them
        keywords = {}
        out = _run(model, head, call, batch)
    if call.loss_keywords is None:
        raise CheckError("it computes its loss without self.loss_function")
    assert call.hidden is not None
    return NativeResult(_field(out, "loss"), call.hidden, keywords, call.loss_keywords)


def _compare(model: Any, head: nn.Linear, config: LossConfig, *, batch: dict[str, Any], native: NativeResult) -> None:
    """Raise CheckError if the fused loss or the gradient of the hidden states differs from the native one."""
    batch = {**batch, **native.keywords}
    shift_labels = batch["shift_labels"] if "shift_labels" in config.forwarded_keywords else None
    call = FusedLeafCall(config, batch["labels"], shift_labels, perplexity=False)
    out = _run(model, head, call, batch)
    if call.native or call.expanded_loss is None:
        raise CheckError("its head sees other positions than those of the labels")
    fused = _field(call.without_logits(out), "loss")
    assert call.hidden is not None
    (native_gradient,) = torch.autograd.grad(native.loss, native.hidden)
    (fused_gradient,) = torch.autograd.grad(fused, call.hidden)
    eps = torch.finfo(call.hidden.dtype).eps
    fused_value, native_value = fused.item(), native.loss.item()
    if not abs(fused_value - native_value) <= max(1e-5, 8 * eps) * max(1.0, abs(native_value)):
        raise CheckError(f"on one batch its native loss is {native_value:.6g} and the fused one {fused_value:.6g}")
    error = float((fused_gradient.float() - native_gradient.float()).norm() / native_gradient.float().norm())
    if not error <= max(1e-4, 32 * eps):
        raise CheckError(f"on one batch the gradient of its hidden states is {error:.1e} from the native one")
