# SPDX-License-Identifier: Apache-2.0
"""Whether a model can be patched: its tail is probed, and one batch compared with its native loss."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_ppl import next_token_targets
from fused_ppl.integrations.huggingface import tail
from fused_ppl.integrations.huggingface.calls import Probe, Recipe, Watched, WatchedFused
from fused_ppl.integrations.huggingface.swap import in_charge
from fused_ppl.integrations.huggingface.tail import CheckError

LENGTH = 8


def examine(model: Any, head: nn.Linear, batch: dict[str, Any] | None) -> Recipe:
    """The recipe with which the fused loss equals the model's own. Model and head are swapped already.

    Raises:
        CheckError: the reason.
    """
    parameters = inspect.signature(type(model).forward).parameters
    if "labels" not in parameters:
        raise CheckError("its forward takes no labels")
    with _at_rest(model):
        batch = dict(batch) if batch is not None else {"input_ids": small_batch(model, head)}
        labels = batch.pop("labels", None)
        if labels is None:
            labels = batch["input_ids"].clone()
            labels[:, LENGTH // 2 :: 3] = -100
        scale, softcap = _probe(model, head, batch)
        batch["labels"] = labels
        keywords, watched, native = _native(model, head, batch, parameters)
        received = watched.received or {}
        recipe = Recipe(
            logit_scale=scale,
            softcap=softcap,
            ignore_index=received.get("ignore_index", -100),
            handed_on=frozenset(k for k in keywords if received.get(k) is not None),
            labels_at=list(parameters).index("labels") - 1,
        )
        _compare(model, head, recipe, {**batch, **keywords}, watched, native)
        return recipe


def small_batch(model: Any, head: nn.Linear) -> Tensor:
    """Two rows of tokens that are none of the special ones: those stand somewhere in the configuration."""
    special = {int(n) for n in tail.numbers(model.config.to_dict()) if n == int(n)}
    vocab = min(head.weight.shape[0], getattr(model.get_input_embeddings(), "num_embeddings", head.weight.shape[0]))
    ids = [i for i in range(min(vocab, 4096)) if i not in special] or list(range(vocab))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(ids), (2, LENGTH), generator=generator, dtype=torch.int64, device="cpu")
    return torch.tensor(ids, dtype=torch.int64, device="cpu")[chosen].to(model.device)


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without autocast, and the random numbers of the caller untouched."""
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


def _run(model: Any, head: nn.Linear, call: Any, batch: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with in_charge(model, head, call):
        return model(**batch)


def _probe(model: Any, head: nn.Linear, batch: dict[str, Any]) -> tuple[float, float | None]:
    probe = Probe()
    out = _run(model, head, probe, batch)
    if len(probe.grids) != 1:
        raise CheckError(f"it calls its head {len(probe.grids)} times for one batch of tokens")
    logits = out["logits"] if isinstance(out, dict) else out[0]
    return tail.fit(probe.grids[0], logits, tuple(tail.numbers(model.config.to_dict())))


def _native(
    model: Any, head: nn.Linear, batch: dict[str, Any], parameters: Any
) -> tuple[dict[str, Any], Watched, Tensor]:
    """The native loss, given all of the keywords that forward takes."""
    shifted = next_token_targets(batch["labels"])
    items = torch.tensor(11.0, dtype=torch.float32, device=shifted.device)
    offered = {"num_items_in_batch": items, "shift_labels": shifted}
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    keywords = {k: v for k, v in offered.items() if takes_all or k in parameters}
    watched = Watched()
    try:
        out = _run(model, head, watched, {**batch, **keywords})
    except TypeError:  # of a forward that hands its keywords to something of fewer
        keywords = {}
        out = _run(model, head, watched, batch)
    if watched.received is None:
        raise CheckError("it computes its loss without self.loss_function")
    return keywords, watched, out["loss"] if isinstance(out, dict) else out[0]


def _compare(
    model: Any, head: nn.Linear, recipe: Recipe, batch: dict[str, Any], watched: Watched, native: Tensor
) -> None:
    shift_labels = batch["shift_labels"] if "shift_labels" in recipe.handed_on else None
    call = WatchedFused(recipe, batch["labels"], shift_labels, perplexity=False)
    out = _run(model, head, call, batch)
    if call.native or call.carrier is None:
        raise CheckError("its head sees other positions than those of the labels")
    out = call.without_logits(out)
    loss = out["loss"] if isinstance(out, dict) else out[0]
    hidden, leaf = watched.hidden, call.hidden
    assert hidden is not None and leaf is not None
    (want,) = torch.autograd.grad(native, hidden)
    (got,) = torch.autograd.grad(loss, leaf)
    eps = torch.finfo(leaf.dtype).eps
    fused, own = loss.item(), native.item()
    if not abs(fused - own) <= max(1e-5, 8 * eps) * max(1.0, abs(own)):
        raise CheckError(f"on one batch its native loss is {own:.6g} and the fused one {fused:.6g}")
    wrong = float((got.float() - want.float()).norm() / want.float().norm())
    if not wrong <= max(1e-4, 32 * eps):
        raise CheckError(f"on one batch the gradient of its hidden states is {wrong:.1e} from the native one")
