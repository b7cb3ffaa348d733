# SPDX-License-Identifier: Apache-2.0
"""`patch` and `unpatch`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fused_ppl import Options
from fused_ppl.integrations.huggingface.check import examine
from fused_ppl.integrations.huggingface.swap import FusedHead, FusedModel, head_of, not_plain, swap, swap_back
from fused_ppl.integrations.huggingface.tail import CheckError


def patch(
    model: Any,
    loss: str = "cross_entropy",
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    max_nll: float | None = None,
    options: Options | None = None,
    batch: dict[str, Any] | None = None,
) -> Any:
    """Have a causal language model of transformers compute its loss in its head, without making its logits.

    Where the model is in training mode and given labels, `model(..., labels=...).loss` is the fused loss and `.logits`
    is None. Everything else is native: without labels, in evaluation mode (also the loss: cross-entropy, with logits),
    in `generate`. `skip_logits=True` asks for the fused cross-entropy in evaluation mode, `skip_logits=False` for
    native logits in training. `num_items_in_batch` and `shift_labels` mean what they mean to the model itself.

    The model may be wrapped (PEFT, DDP); it is changed in place, and may be patched before or after it is sharded. A
    head that is replaced or resized afterwards runs natively, with one warning; patch again.

    Args:
        model: what has a language model inside. What happens to its logits after the head (a scale, a softcap) is found
            by feeding known numbers through, and one batch of random tokens is compared with the native loss.
        loss: "cross_entropy", or "perplexity", which is exact for a batch that is not one of several; for more see
            `PerplexityTrainerMixin`.
        label_smoothing, z_loss, max_nll, options: as in `fused_ppl.linear_cross_entropy` and `linear_perplexity`.
        batch: keyword arguments of the model to compare with, for a model that needs more than `input_ids`.

    Returns:
        `model` itself.

    Raises:
        ValueError: the model's head, tail or loss is not understood; the message says why, and the model is as it was.

    Example (docs/integrations.md has it whole)::

        model = patch(AutoModelForCausalLM.from_pretrained(folder))
        out = model(tokens, labels=tokens)
        out.loss.backward()                            # out.logits is None
    """
    if loss not in ("cross_entropy", "perplexity"):
        raise ValueError(f"loss must be 'cross_entropy' or 'perplexity'; got {loss!r}.")
    if (loss == "perplexity" and z_loss) or (loss == "cross_entropy" and max_nll is not None):
        raise ValueError("z_loss belongs to loss='cross_entropy', max_nll to loss='perplexity'.")
    inner = language_model(model)
    if getattr(inner.__dict__.get("forward"), "__func__", None) is type(inner).forward:
        del inner.__dict__["forward"]  # the model's own, which accelerate puts back when it takes a hook off
    head = head_of(inner)
    reason = _cannot(inner, head)
    if reason is not None:
        raise _refusal(inner, reason)
    before = getattr(inner, "_fused_ppl", None)
    unpatch(inner)
    swap(inner, FusedModel)
    swap(head, FusedHead)
    try:
        recipe = examine(inner, head, batch)
    except Exception as error:
        if before is None:
            swap_back(inner)
            swap_back(head)
        else:
            inner._fused_ppl = before
        if isinstance(error, CheckError):
            reason = str(error)
        elif getattr(inner.config, "is_encoder_decoder", False):
            reason = (
                "it is an encoder-decoder, and only models that predict the next of their own tokens are supported; "
                "call fused_ppl.linear_cross_entropy on the decoder's hidden states"
            )
        else:
            reason = f"the check on a batch of tokens failed: {error!r}"
        raise _refusal(inner, reason) from error
    asked = {"label_smoothing": label_smoothing, "z_loss": z_loss, "max_nll": max_nll, "options": options}
    inner._fused_ppl = replace(recipe, loss=loss, **asked)  # type: ignore[arg-type]
    return model


def unpatch(model: Any) -> Any:
    """Undo `patch`, in place; a model that is not patched stays as it is. Returns `model`."""
    for module in list(model.modules()):
        if isinstance(module, (FusedModel, FusedHead)):
            swap_back(module)
    return model


def language_model(model: Any) -> Any:
    """The outermost module that has a head and a loss function."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    for module in model.modules():
        if hasattr(type(module), "loss_function") and hasattr(type(module), "get_output_embeddings"):
            return module
    raise TypeError(
        f"{type(model).__name__} holds no model of transformers. "
        "For your own model call fused_ppl.linear_cross_entropy where it computes its loss."
    )


def _cannot(model: Any, head: Any) -> str | None:
    if head is None:
        return "it has no output head"
    if not isinstance(head, FusedHead) and getattr(type(head), "forward", None) is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        return f"its head is a {kind}, not a plain torch.nn.Linear: what that computes would be left out"
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return "its weights are sharded by DeepSpeed's ZeRO-3; patch it before deepspeed.initialize"
    reason = not_plain(head.weight)
    if reason is not None:
        return f"{reason}; keep its own loss, or dequantise the head"
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        return "its weights are on the meta device; patch it when they are loaded"
    if "forward" in model.__dict__ and "_old_forward" not in model.__dict__:
        return "its forward was replaced on the instance; patch it before whatever did that"
    return None


def _refusal(model: Any, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be patched: {reason}. It was left as it was.")
