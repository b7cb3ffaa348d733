# SPDX-License-Identifier: Apache-2.0
"""What users feel: a training step of a Hugging Face model, native, patched by us, and patched by Liger.

The model is made from a config, so that nothing is downloaded: about 0.5 B parameters, Qwen2's vocabulary of 151,936,
bf16, sequences of 4,096 tokens. All three start from the same weights and see the same tokens, so their losses agree.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_device import Card, Skipped, StandIn
from gpu_process import Found, Step

STEPS = 4  # of the optimizer, of which the first is not timed
LIKE = 0.02  # nats that two losses in bf16 may differ by
LARGEST = 64  # sequences, where the search for the largest batch ends


@dataclass(frozen=True)
class Model:
    """The size of a model, and what it is trained on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int


REAL = Model(896, 4864, 24, 14, 151936, 4096, 4)
DRY = Model(16, 32, 2, 2, 131, 8, 2)


def training_steps(card: Card | StandIn, dry: bool) -> Iterator[Step]:
    model = DRY if dry else REAL
    for name in PATCHES:
        run = functools.partial(_train, card, model, name)
        yield Step(f"training step, {name}", "training", 10, run, name == "fused_ppl")
    for name in PATCHES:
        run = functools.partial(_largest_batch, card, model, name)
        yield Step(f"largest batch, {name}", "more training", 12, run, name == "fused_ppl")
    for name in PATCHES:
        run = functools.partial(_evaluate, card, model, name)
        yield Step(f"evaluation, {name}", "more training", 5, run, name == "fused_ppl")


def _native(model: Any) -> None:
    pass


def _ours(model: Any) -> None:
    from fused_ppl.integrations import huggingface

    huggingface.patch(model)


def _liger(model: Any) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Skipped("not installed (pip install liger-kernel)")
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    # the loss alone, as ours is the loss alone
    apply_liger_kernel_to_qwen2(
        rope=False, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=True, model=model
    )


PATCHES: dict[str, Callable[[Any], None]] = {"native": _native, "fused_ppl": _ours, "Liger": _liger}


def _make(card: Card | StandIn, size: Model, name: str) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("not installed (pip install transformers)")
    if card.stand_in and name == "Liger":
        raise Skipped("its kernels run on a GPU alone")
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=2,
        max_position_embeddings=size.sequence,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device(card.device):
        model = transformers.Qwen2ForCausalLM(config).to(torch.float32 if card.stand_in else torch.bfloat16)
    PATCHES[name](model)
    return model


def _tokens(card: Card | StandIn, size: Model, batch: int) -> torch.Tensor:
    generator = torch.Generator(card.device).manual_seed(1)
    return torch.randint(size.vocabulary, (batch, size.sequence), generator=generator, device=card.device)


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _train(card: Card | StandIn, size: Model, name: str) -> Found:
    model, tokens = _make(card, size, name), _tokens(card, size, size.batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)  # no state: the loss is what memory is spent on
    step = functools.partial(_step, model, optimizer, tokens)
    losses = [float(step()) for _ in range(STEPS)]
    times = card.milliseconds(step)
    try:
        peak = card.peak_bytes(step)
    except Skipped:
        peak = None
    per_second = tokens.numel() / times[1] * 1e3
    row = _row(name, "training step", size, times, peak)
    return Found(f"{per_second:.0f} tokens/s, losses {', '.join(f'{x:.4f}' for x in losses)}", [row])


def _evaluate(card: Card | StandIn, size: Model, name: str) -> Found:
    model, tokens = _make(card, size, name).eval(), _tokens(card, size, size.batch)

    @torch.no_grad()
    def run() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    loss, times = float(run()), card.milliseconds(run)
    try:
        peak = card.peak_bytes(run)
    except Skipped:
        peak = None
    row = _row(name, "evaluation", size, times, peak)
    return Found(f"{tokens.numel() / times[1] * 1e3:.0f} tokens/s, loss {loss:.4f}", [row])


def _row(name: str, mode: str, size: Model, times: tuple[float, float, float], peak: int | None) -> dict[str, Any]:
    from dataclasses import asdict

    from gpu_times import Timing

    shape = (size.batch * size.sequence, size.vocabulary, size.hidden)
    return asdict(Timing("training", name, mode, shape, "bf16", times, peak_bytes=peak))


def _largest_batch(card: Card | StandIn, size: Model, name: str) -> Found:
    """Doublings of the batch until the memory does not do."""
    model = _make(card, size, name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer, fits = torch.optim.SGD(model.parameters(), lr=1e-3), 0
    while fits < (2 if card.stand_in else LARGEST):
        try:
            _step(model, optimizer, _tokens(card, size, max(1, 2 * fits)))
            card.synchronize()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            break
        fits = max(1, 2 * fits)
        card.release()
    end = "" if fits < LARGEST else ", where the search ended"
    return Found(f"{fits} sequences of {size.sequence}{end}")
