# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of the installed transformers, tiny and random, native and patched side by side.

    python bench/hf_models.py                              # all of them, about ten minutes; writes the table
    python bench/hf_models.py llama gemma2 --no-write      # some, on the screen

A model is *equal* where its loss, its loss under num_items_in_batch, the gradient of every parameter and the logits in
evaluation are the native ones; *refused* where `patch` said no; *not built* where no tiny random model came out of this
script, or its native training step failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from hf_tiny import tiny_config

from fused_ppl.integrations.huggingface import patch, unpatch

TABLE = Path(__file__).resolve().parent.parent / "docs" / "huggingface_models.md"
LOSS, GRADIENT = 1e-5, 1e-4
BATCH, LENGTH = 2, 12


@dataclass
class Row:
    model_type: str
    verdict: str
    loss: float = 0.0  # |fused - native|, the larger of both losses
    gradient: float = 0.0  # the worst parameter's |fused - native| / |native|, in norm
    note: str = ""


def quiet(model: torch.nn.Module) -> None:
    """No dropout of any kind, and a head whose logits and bias are not all near zero."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    head = model.get_output_embeddings()
    if head is not None:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_(std=0.3)


def tokens(model: Any) -> torch.Tensor:
    """Two rows of ids that no number of the configuration names: special tokens stand there."""
    vocab = min(m.weight.shape[0] for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    special = set(integers(model.config.to_dict()))
    ids = torch.tensor([i for i in range(vocab) if i not in special] or list(range(vocab)))
    return ids[torch.randint(len(ids), (BATCH, LENGTH))]


def integers(config: Any) -> list[int]:
    if isinstance(config, dict):
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        return [i for value in config for i in integers(value)]
    return [config] if isinstance(config, int) else []


def measure(model: Any, batch: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Both losses, the gradients of the second, and the logits of evaluation; all from one seed."""
    losses = []
    for more in ({}, {"num_items_in_batch": 17}):
        torch.manual_seed(1)
        model.train().zero_grad()
        out = model(**batch, **more, return_dict=True)
        losses.append(out.loss.item())
    train_logits = out.logits
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(1)
    with torch.no_grad():
        out = model.eval()(**batch, return_dict=True)
    return [*losses, out.loss.item()], gradients, (train_logits, out.logits)


def try_model(model_type: str) -> Row:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(model_type), attn_implementation="eager").float()
        quiet(model)
        ids = tokens(model)
        labels = ids.clone()
        labels[0, 3:6] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        measure(model, batch)  # some settle on a kind of attention in their first steps
        losses, gradients, (_, logits) = measure(model, batch)
    except Exception as error:
        return Row(model_type, "not built", note=short(error))
    try:
        patch(model)
    except ValueError as error:
        return Row(model_type, "refused", note=reason(error))
    got, fused, (train_logits, fused_logits) = measure(model, batch)
    row = Row(model_type, "equal", max(abs(a - b) for a, b in zip(losses, got, strict=True)))
    largest = max(g.norm().item() for g in gradients.values())
    for name, want in gradients.items():
        if name not in fused:
            row.note = f"no gradient of {name}"
            row.verdict = "different"
            continue
        off = (fused[name] - want).norm().item() / max(want.norm().item(), 1e-3 * largest)
        row.gradient = max(row.gradient, off)
    if not row.loss <= LOSS * max(1, *losses) or not row.gradient <= GRADIENT:
        row.verdict = "different"
    if train_logits is not None or not torch.equal(fused_logits, logits):
        row.verdict, row.note = "different", "logits"
    recipe = model._fused_ppl
    found = [f"scale {recipe.logit_scale:.4g}" if recipe.logit_scale != 1 else ""]
    found += [f"softcap {recipe.softcap:.4g}" if recipe.softcap else ""]
    found += ["bias" if model.get_output_embeddings().bias is not None else ""]
    found += ["tied" if model.get_output_embeddings().weight is model.get_input_embeddings().weight else ""]
    unpatch(model)
    row.note = row.note or ", ".join(f for f in found if f)
    return row


def reason(error: ValueError) -> str:
    """The reason alone, of what `patch` says."""
    return str(error).split("cannot be patched: ", 1)[-1].removesuffix(" It was left as it was.").replace("|", "/")


def short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "..."


def in_a_process(model_type: str, seconds: float) -> Row:
    """A fork, so that transformers is imported once, and a model that crashes or hangs ends alone."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        warnings.simplefilter("ignore")
        try:
            send.send(try_model(model_type))
        except Exception as error:
            send.send(Row(model_type, "different", note=short(error)))

    process = context.Process(target=work)
    process.start()
    row = Row(model_type, "not built", note=f"took more than {seconds:.0f} s")
    if receive.poll(seconds):
        try:
            row = receive.recv()
        except EOFError:
            row = Row(model_type, "not built", note="its process died")
    process.kill()
    process.join()
    return row


def write(rows: list[Row]) -> None:
    import transformers

    count = Counter(row.verdict for row in rows)
    lines = [
        "# Causal language models of transformers under `patch`",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}; `python bench/hf_models.py`, which",
        "builds each model tiny and random, and says in its first lines what equal means.",
        "",
        ", ".join(f"{count[v]} {v}" for v in ("equal", "different", "refused", "not built")) + f", of {len(rows)}.",
        "",
        "| type | verdict | loss, off by | worst gradient, off by | |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name, verdict, loss, gradient, note = astuple(row)
        numbers = f"{loss:.0e} | {gradient:.0e}" if verdict in ("equal", "different") else " | "
        lines.append(f"| {name} | {verdict} | {numbers} | {note} |".replace("  ", " "))
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--seconds", type=float, default=120, help="for each model")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    chosen = args.types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for i, model_type in enumerate(chosen, 1):
        row = in_a_process(model_type, args.seconds)
        rows.append(row)
        print(f"{i:3}/{len(chosen)} {row.verdict:10} {model_type:28} {row.loss:.1e} {row.gradient:.1e} {row.note}")
        sys.stdout.flush()
    if not args.no_write:
        write(rows)
    print(dict(Counter(row.verdict for row in rows)))
    return int(any(row.verdict == "different" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
