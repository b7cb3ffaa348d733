# SPDX-License-Identifier: Apache-2.0
"""A model as an evaluation needs it: hidden states from tokens, and the head that turns them into logits.

No logits of all tokens are made. A model of transformers runs as it is, but its head is given no rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_ppl.evaluation.records import EvaluationError
from fused_ppl.integrations.huggingface import logit_transform
from fused_ppl.integrations.huggingface.check import small_batch
from fused_ppl.integrations.huggingface.patching import language_model
from fused_ppl.integrations.huggingface.swap import head_of, reason_against_weight

SAMPLED = 256  # numbers of a parameter that tell models apart
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HiddenModel:
    """Any language model: logits = hidden_states(tokens) @ linear_weight.T + linear_bias, scaled and capped.

    Example:
        >>> import torch
        >>> from fused_ppl.evaluation import HiddenModel
        >>> table = torch.randn(10, 4)
        >>> model = HiddenModel(lambda tokens: table[tokens], linear_weight=table)
        >>> model.hidden_states(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 4])
    """

    hidden_states: Callable[[Tensor], Tensor]  # token ids (B, T) to (B, T, D); a position sees only those before it
    linear_weight: Tensor  # (V, D)
    linear_bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    name: str = "model"
    most_tokens: int | None = None  # that it can be given at once

    @property
    def device(self) -> torch.device:
        return self.linear_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.linear_weight.dtype

    def fingerprint(self) -> str:
        """A hash of some numbers of every parameter that is known, which tells models apart."""
        body = self.hidden_states.model.state_dict() if isinstance(self.hidden_states, _Body) else {}
        found = hashlib.sha256(f"{self.logit_scale} {self.softcap}".encode())
        for name, value in {**body, "head": self.linear_weight, "bias": self.linear_bias}.items():
            if isinstance(value, Tensor):
                flat = value.detach().reshape(-1)
                picked = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].double().cpu()
                found.update(f"{name} {tuple(value.shape)}".encode() + picked.numpy().tobytes())
        return found.hexdigest()[:12]


def of(model: Any) -> HiddenModel:
    """A `HiddenModel` of a causal language model of transformers, patched or not, wrapped or not.

    Raises:
        EvaluationError: its head is not a plain linear layer, or its logits are changed by more than a scale and a cap.
    """
    if isinstance(model, HiddenModel):
        return model
    if not isinstance(model, nn.Module):
        raise EvaluationError(
            f"model must be a model of transformers, or a HiddenModel for any other; got {type(model).__name__}."
        )
    try:
        inner = language_model(model)
    except TypeError as error:
        raise EvaluationError(f"{error} Give its hidden states and its head as a HiddenModel.") from None
    head = head_of(inner)
    reason = "it has no output head" if head is None else None
    if head is not None:
        reason = reason_against_weight(getattr(head, "weight", None))
    if reason is None and not isinstance(head, nn.Linear):
        reason = f"its head is a {type(head).__name__}, not a linear layer"
    if reason is None:
        try:
            scale, softcap = _logit_transform(inner, head)
        except logit_transform.CheckError as error:
            reason = str(error)
    if reason is not None:
        raise EvaluationError(f"{type(inner).__name__} cannot be evaluated through its head: {reason}.")
    name = getattr(inner.config, "_name_or_path", "") or type(inner).__name__
    name = Path(name).name if Path(name).exists() else name  # not where it lies on this machine
    body = _Body(inner, head)
    _check_causal(body, inner)
    return HiddenModel(body, head.weight, head.bias, scale, softcap, name=name, most_tokens=_most_tokens(inner))


def _check_causal(body: Callable[[Tensor], Tensor], model: Any) -> None:
    """Hidden states must not depend on later tokens; a model that sees them would have a perplexity near 1."""
    tokens = small_batch(model, head_of(model))
    changed = tokens.clone()
    changed[:, -1] = tokens[:, 0]
    before, after = (body(t)[:, :-1].float() for t in (tokens, changed))
    scale = before.abs().max().clamp_min(1e-30)
    if bool((before - after).abs().max() > 1e-2 * scale):
        raise EvaluationError(
            f"{type(model).__name__} sees the tokens after a position, so it has no perplexity. Use a causal model "
            "(is_decoder=True in the configuration of an encoder)."
        )


def _most_tokens(model: Any) -> int | None:
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size > 0:
            return size
    return None


class _Body:
    """Runs a model up to its head, in evaluation mode, and returns what the head was given."""

    def __init__(self, model: Any, head: nn.Module) -> None:
        self.model, self.head = model, head

    def __call__(self, tokens: Tensor) -> Tensor:
        found: list[Tensor] = []

        def take(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (hidden,) = inputs
            found.append(hidden)
            return (hidden[:, :0],)  # no rows, and so no logits

        _run(self.model, self.head.register_forward_pre_hook(take), tokens)
        if len(found) != 1:
            raise EvaluationError(
                f"The model must call its head once for a batch of tokens; it did {len(found)} times."
            )
        return found[0]


def _logit_transform(model: Any, head: nn.Linear) -> tuple[float, float | None]:
    """The scale and the softcap that the model applies to its logits, from known numbers in their place."""
    probes: list[Tensor] = []

    def answer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        probes.append(logit_transform.probe_values(tuple(output.shape), output.device))
        return probes[-1]

    out = _run(model, head.register_forward_hook(answer), small_batch(model, head))
    if len(probes) != 1:
        raise logit_transform.CheckError(f"it calls its head {len(probes)} times for one batch of tokens")
    candidates = tuple(logit_transform.config_numbers(model.config.to_dict()))
    return logit_transform.fit(probes[0], out.logits, candidates)


@torch.no_grad()
def _run(model: Any, hook: Any, tokens: Tensor) -> Any:
    """One forward in evaluation mode without a cache; the modes and the hook are put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        return model(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training


def check_files(name: str, gguf: str | None) -> None:
    """Say what a path lacks, before a library says that it cannot read it. A name of the Hub is no path.

    Raises:
        EvaluationError: the path is a GGUF file, or a folder without the file that was asked for.
    """
    path = Path(name)
    if path.is_file():
        way = (
            f"Give --model {path.parent} --gguf {path.name}."
            if path.suffix == ".gguf"
            else "Give the folder of a model."
        )
        raise EvaluationError(f"The model {name!r} must be a folder or a name of the Hub; this is a file. {way}")
    if not path.is_dir():
        return
    held = sorted(file.name for file in path.glob("*.gguf"))
    if gguf is not None and gguf not in held:
        raise EvaluationError(f"{name} holds no GGUF file {gguf!r}. It holds {', '.join(held) or 'none'}.")
    if gguf is None and not (path / "config.json").exists():
        way = f"It holds {held[0]}: add --gguf {held[0]}." if held else "Give the folder of a model of transformers."
        raise EvaluationError(f"{name} has no config.json. {way}")


def load(name: str, *, gguf: str | None = None, dtype: str = "auto", device: str = "auto") -> tuple[HiddenModel, Any]:
    """A model and its tokenizer from a folder or a name of the Hub.

    Raises:
        EvaluationError: they cannot be loaded; the message has the library's reason.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise EvaluationError("Models need transformers (pip install 'fused-ppl[eval]').") from None
    check_files(name, gguf)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    keywords: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    if dtype not in DTYPES:
        raise EvaluationError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    if gguf is not None and dtype == "auto":
        dtype = "float32"  # what its numbers are unpacked to
    numbers: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **keywords)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=numbers, **keywords)
        model = model.to(device)
    except Exception as error:  # transformers, its hub and its readers raise of many kinds
        reason = str(error).strip().split("\n")[0]
        raise EvaluationError(f"The model {name!r} cannot be loaded to {device}: {reason}") from error
    found = of(model)
    return (found if gguf is None else replace(found, name=f"{found.name}/{gguf}")), tokenizer
