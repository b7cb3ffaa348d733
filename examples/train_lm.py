# SPDX-License-Identifier: Apache-2.0
"""Train a small GPT-style language model on real text with the perplexity loss.

    python examples/train_lm.py                     standard library of Python, 32k vocabulary, 2 CPU cores, 2 minutes
    python examples/train_lm.py --compare           perplexity, cross_entropy and torch one after another, one table
    torchrun --nproc-per-node 2 examples/train_lm.py --parallel ddp        or fsdp, tp: see lm_parallel.py
    python examples/train_lm.py --text a.txt b.txt --device cuda --dim 512 --layers 8 --steps 5000

The gradient of the perplexity is PPL times the gradient of the cross-entropy. It has the same direction, but it is tens
of thousands of times longer at the start, where PPL is about V, and hundreds of times longer at the end. Two things
allow one learning rate for both losses. Clipping by the global norm gives every gradient of the perplexity the length
--clip. AdamW divides by the running size of the gradient, so a common factor has no effect.

The default --clip is so small that it also clips every gradient of the cross-entropy, and then all losses make the same
steps. With a larger --clip, the short late gradients of the cross-entropy have less weight in the averages of AdamW,
and the curves differ. This is an effect of clipping and not of the loss. SGD without clipping would multiply its
learning rate by PPL.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_data import Corpus, TextError, load_corpus, random_batches, unigram_perplexity
from lm_measure import PeakMemory, Run
from lm_model import GPT
from lm_parallel import KINDS, Ranks, clip_gradients, join, leave, parameter_groups
from lm_report import Report
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

import fused_ppl


def torch_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The usual way: full logits, a copy of them in fp32, and a log-softmax of the same size."""
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, -2), targets.flatten())


# each takes hidden states (B, T, D), the weight of the head (V, D) and targets (B, T), and returns a scalar
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "perplexity": fused_ppl.linear_perplexity,
    "cross_entropy": fused_ppl.linear_cross_entropy,
    "torch": torch_cross_entropy,
}
COMPARED = tuple(LOSSES)
# approximate gradients, see docs/compact.md
_COMPACT, _SCREENED = (fused_ppl.Options(gradient_tolerance=1e-3, screen=screen) for screen in (None, "bf16"))
LOSSES |= {
    "compact": partial(fused_ppl.linear_cross_entropy, options=_COMPACT),
    "screened": partial(fused_ppl.linear_cross_entropy, options=_SCREENED),
}


def train(model: nn.Module, corpus: Corpus, args: argparse.Namespace, *, run: Run, report: Report) -> None:
    """Train for --steps steps, with a validation every --eval-every steps."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_up_then_decay, steps=args.steps))
    batches = random_batches(corpus.train, args.batch_size, args.context, steps=args.steps, seed=args.seed)
    ranks: Ranks = args.ranks
    loss_function = partial(LOSSES[run.loss], **({"group": ranks.group} if run.loss != "torch" else {}))
    progress = tqdm(batches, total=args.steps, desc=run.loss, unit="step", dynamic_ncols=True, disable=not ranks.first)
    for step, tokens in enumerate(progress, start=1):
        started = time.perf_counter()
        loss = next_token_loss(model, ranks.share(tokens), loss_function, args)
        loss.backward()
        norm = clip_gradients(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        # .item() waits for the device, so the time includes the whole step
        run.add_step(loss=loss.item(), gradient_norm=norm.item(), seconds=time.perf_counter() - started)
        progress.set_postfix(perplexity=f"{run.perplexity:,.1f}")
        if step % args.eval_every == 0 or step == args.steps:
            run.add_validation(evaluate(model, corpus.validation, args), corpus.bytes_per_token)
            progress.write(f"step {step}: validation perplexity {run.validation[-1]['perplexity']:,.1f}")
            report.save_json()
    run.finished = True


def next_token_loss(
    model: nn.Module,
    tokens: Tensor,
    loss_function: Callable[[Tensor, Tensor, Tensor], Tensor],
    args: argparse.Namespace,
) -> Tensor:
    """Return the loss for predicting the next token. Matrix products use --dtype, and losses are summed in fp32."""
    dtype = getattr(torch, args.dtype)
    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        return model(tokens, fused_ppl.next_token_targets(tokens), loss_function)


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, args: argparse.Namespace) -> fused_ppl.Perplexity:
    """Return the perplexity of all windows as a metric of sums, because perplexities of batches have no average."""
    metric, nll_sum = fused_ppl.Perplexity(), partial(fused_ppl.linear_cross_entropy, reduction="sum")
    for batch in windows.split(args.batch_size):
        tokens = args.ranks.share(batch)
        nll = next_token_loss(model, tokens, nll_sum, args)
        metric.update_nll(nll, tokens.numel() - len(tokens))  # the last token of a sequence predicts nothing
    return args.ranks.collect(metric)


def warm_up_then_decay(step: int, *, steps: int) -> float:
    """Return the factor of the learning rate. It rises in the first tenth and falls to 0.05 along a cosine."""
    warm_up = max(steps // 10, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - warm_up, 1)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2


def run_one(loss: str, corpus: Corpus, report: Report, args: argparse.Namespace) -> None:
    """Train a new model. Every loss starts from the same weights and gets the same batches."""
    torch.manual_seed(args.seed)
    run = report.start(loss, tokens_per_step=args.batch_size * args.context)
    with PeakMemory(run, args.ranks.device):
        model = GPT(corpus.vocab_size, context=args.context, dim=args.dim, heads=args.heads, layers=args.layers)
        train(args.ranks.wrap(model), corpus, args, run=run, report=report)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        args.ranks = join(args.parallel, args.device)
    except RuntimeError as error:
        print(f"train_lm: {error}", file=sys.stderr)
        return 1
    console = Console()
    try:
        with console.status("reading the text and training its vocabulary"):
            corpus = load_corpus(args.text, args.vocab_size, context=args.context, windows=args.eval_windows)
        targets = fused_ppl.next_token_targets(corpus.validation)
        out, recorded = args.ranks.folder(args.out), {k: v for k, v in vars(args).items() if k != "ranks"}
        report = Report(out, recorded, corpus, unigram_perplexity(corpus.train, targets, corpus.vocab_size))
    except (TextError, OSError) as error:  # no usable text, or --out cannot be written
        print(f"train_lm: {error}", file=sys.stderr)
        return 1
    console.print(corpus.describe(), highlight=False)
    if corpus.vocab_size < args.vocab_size:
        console.print(
            f"(the vocabulary is smaller than --vocab-size {args.vocab_size:,}: the text has no more pairs to merge)"
        )
    console.print(f"unigram perplexity of the held-out text: {report.unigram:,.1f}", highlight=False)
    code = 0
    try:
        for loss in COMPARED if args.compare else [args.loss]:
            run_one(loss, corpus, report, args)
    except KeyboardInterrupt:
        code = 130
        print("train_lm: interrupted; what was run is kept", file=sys.stderr)
    except ArithmeticError as error:  # the training diverged
        code = 1
        print(f"train_lm: {error}. Try a smaller --lr than {args.lr:g}.", file=sys.stderr)
    finally:
        report.save_json()
        report.save_plot()
    console.print(report.table())
    console.print(report.verdict())
    print(f"{report.json_path}\n{report.plot_path}")
    leave()
    return code


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    loss = parser.add_mutually_exclusive_group()
    loss.add_argument("--loss", choices=LOSSES, default="perplexity", help="torch is eager F.cross_entropy in fp32")
    loss.add_argument(
        "--compare", action="store_true", help="run the exact losses from the same seed and print one table"
    )
    add("--text", type=Path, nargs="+", metavar="FILE", help="train on these files (default: the library of Python)")
    add("--out", type=Path, default=Path("runs/train_lm"), help="folder for run.json and curves.png (%(default)s)")
    add("--vocab-size", type=positive, default=32768, metavar="V", help="tokens in the BPE vocabulary (%(default)s)")
    add("--steps", type=positive, default=120, help="steps of the optimizer (%(default)s)")
    add("--batch-size", type=positive, default=8, metavar="B", help="sequences in a step (%(default)s)")
    add("--context", type=positive, default=128, metavar="T", help="tokens in a sequence (%(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate, for every loss (%(default)s)")
    add("--clip", type=float, default=0.5, help="largest norm of the gradient; perplexity needs one (%(default)s)")
    add("--weight-decay", type=float, default=0.1, metavar="W", help="weight decay of AdamW (%(default)s)")
    add("--dim", type=positive, default=192, metavar="D", help="width of the model (%(default)s)")
    add("--heads", type=positive, default=4, help="attention heads; divides --dim (%(default)s)")
    add("--layers", type=positive, default=3, help="blocks (%(default)s)")
    add("--eval-every", type=positive, default=40, metavar="STEPS", help="steps between validations (%(default)s)")
    add("--eval-windows", type=positive, default=128, metavar="N", help="sequences in a validation (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the weights and the batches (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    add("--parallel", choices=KINDS, help="under torchrun: how the ranks share the work")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of products (float32 on a CPU, else bfloat16)")
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if args.vocab_size < 257:
        parser.error(f"--vocab-size must be at least 257: 256 bytes and the end of a text; got {args.vocab_size}")
    if args.parallel and (args.compare or args.loss == "torch"):
        parser.error(f"--parallel takes one of the fused losses, which know of ranks; got {args.loss} or --compare")
    if args.dim % args.heads:
        parser.error(f"--heads must divide --dim; got --dim {args.dim} --heads {args.heads}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device} needs a GPU that torch {torch.__version__} can use; try --device cpu")
    return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
