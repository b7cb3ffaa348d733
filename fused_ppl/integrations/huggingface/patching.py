# SPDX-License-Identifier: Apache-2.0
"""`patch` and `unpatch`: they change the classes of a model and its head in place, after a check of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fused_ppl import Options
from fused_ppl.integrations.huggingface.check import examine
from fused_ppl.integrations.huggingface.logit_transform import CheckError
from fused_ppl.integrations.huggingface.swap import (
    FusedHead,
    FusedModel,
    head_of,
    reason_against_weight,
    swap,
    swap_back,
)


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
    """Let a causal language model of transformers compute its loss in its head, without storing its logits.

    In training mode with labels, `model(..., labels=...).loss` is the fused loss and `.logits` is None. Without labels,
    in evaluation mode and in `generate`, the model runs natively: its loss is the cross-entropy, and it has logits.
    `skip_logits=True` selects the fused cross-entropy in evaluation mode, and `skip_logits=False` selects native logits
    in training mode. `num_items_in_batch` and `shift_labels` mean the same as for the native model.

    The model is changed in place. It may be wrapped (PEFT, DDP), and it may be patched before or after it is sharded.
    If its head is replaced or resized later, the model runs natively and warns once. Then patch it again.

    Args:
        model: a module that contains a language model. `patch` measures the scale and the softcap that it applies to
            its logits, and compares the fused loss with the native loss on one batch of random tokens.
        loss: "cross_entropy" or "perplexity". The perplexity is exact if each batch is a whole batch. For several
            micro-batches or ranks use `PerplexityTrainerMixin`.
        label_smoothing, z_loss, max_nll, options: as in `fused_ppl.linear_cross_entropy` and `linear_perplexity`.
        batch: keyword arguments of the model for the comparison. It is needed if the model takes more than `input_ids`.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module, or contains no model of transformers.
        ValueError: the model cannot be patched. The message gives the reason, and the model is unchanged.

    Example (docs/integrations.md shows all of it)::

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
        # accelerate leaves the forward of the class on the instance when it removes a hook; it would hide our forward
        del inner.__dict__["forward"]
    head = head_of(inner)
    reason = _reason_against(inner, head)
    if reason is not None:
        raise _refusal(inner, reason)
    old_config = getattr(inner, "_fused_ppl", None)
    unpatch(inner)
    swap(inner, FusedModel)
    swap(head, FusedHead)
    try:
        config = examine(inner, head, batch)
    except Exception as error:
        if old_config is None:
            swap_back(inner)
            swap_back(head)
        else:
            inner._fused_ppl = old_config
        if isinstance(error, CheckError):
            reason = str(error)
        elif getattr(inner.config, "is_encoder_decoder", False):
            reason = (
                "it is an encoder-decoder, and only models that predict their own next token are supported; "
                "call fused_ppl.linear_cross_entropy on the hidden states of the decoder"
            )
        else:
            reason = f"the check on a batch of tokens failed: {error!r}"
        raise _refusal(inner, reason) from error
    inner._fused_ppl = replace(
        config, loss=loss, label_smoothing=label_smoothing, z_loss=z_loss, max_nll=max_nll, options=options
    )
    return model


def unpatch(model: Any) -> Any:
    """Undo `patch` in place, if the model is patched. Returns `model`."""
    for module in list(model.modules()):
        if isinstance(module, (FusedModel, FusedHead)):
            swap_back(module)
    return model


def language_model(model: Any) -> Any:
    """Return the outermost module that has a head and a loss function."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    for module in model.modules():
        if hasattr(type(module), "loss_function") and hasattr(type(module), "get_output_embeddings"):
            return module
    raise TypeError(
        f"model must contain a model of transformers; {type(model).__name__} holds no model of transformers. "
        "In a model of your own, call fused_ppl.linear_cross_entropy where it computes its loss."
    )


def _reason_against(model: Any, head: Any) -> str | None:
    """Return why the model cannot be patched, as far as this shows before it runs. None if there is no reason."""
    if head is None:
        return "it has no output head"
    if not isinstance(head, FusedHead) and getattr(type(head), "forward", None) is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        return f"its head is a {kind}, not a plain torch.nn.Linear, and the fused loss would leave out what it adds"
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return "its weights are sharded by DeepSpeed's ZeRO-3; patch it before deepspeed.initialize"
    reason = reason_against_weight(head.weight)
    if reason is not None:
        return f"{reason}; keep its own loss, or dequantise the head"
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        return "its weights are on the meta device; patch it after they are loaded"
    if "forward" in model.__dict__ and "_old_forward" not in model.__dict__:
        return "its forward was replaced on the instance; patch it before the code that does this"
    return None


def _refusal(model: Any, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be patched: {reason}. It was left as it was.")
