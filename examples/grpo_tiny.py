# SPDX-License-Identifier: Apache-2.0
"""Teach a small network to add two digits with GRPO: it samples answers, and only a right answer has a reward.

    python examples/grpo_tiny.py                      two runs, without and with an entropy bonus, two CPU cores
    python examples/grpo_tiny.py --steps 200 --seed 1 --out runs/other

A question is text such as "3+4=", and its answer is "7.", where the point ends it. The vocabulary has 13 characters.
The network starts from random weights, and it sees no right answer that it did not sample.

Each step samples a group of answers for each question. The advantage of an answer is its reward minus the mean of its
group, divided by the standard deviation. A group in which all answers are wrong teaches nothing. Each batch of answers
gives several updates with the clipped loss of PPO. `loss_of_token` is that loss, in ordinary PyTorch for one token.
`fused_ppl.linear_token_loss` sums it through the head, and the logits of all tokens are never in memory.

curves.png shows the mean reward and the mean entropy of the sampled answers. Without the bonus, the network becomes
certain early, and then it no longer samples other answers to the questions that it gets wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_ppl

CHARACTERS = "0123456789+=."
END, IGNORED = CHARACTERS.index("."), -100
LONGEST = 3  # characters of an answer: two digits and the point
# colour-blind readers can tell these colours apart
COLOURS = ("#D55E00", "#0072B2")


class Policy(nn.Module):
    """A GRU over characters. It returns hidden states; the head is applied by the loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, width)
        return self.body(self.embedding(tokens))[0]


@dataclass
class Samples:
    """Answers to questions, one row for each answer."""

    tokens: Tensor  # (B, T), the question and the answer
    target: Tensor  # (B, LONGEST), the characters of the answer, IGNORED behind the end
    reward: Tensor  # (B,)
    log_prob: Tensor  # (B, LONGEST), under the policy that sampled
    entropy: Tensor  # (), the mean over the characters


@dataclass
class Run:
    """The curves of one training run."""

    bonus: float
    reward: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    accuracy: float = float("nan")

    @property
    def name(self) -> str:
        return f"entropy bonus {self.bonus:g}" if self.bonus else "no entropy bonus"


def all_questions() -> tuple[Tensor, list[str]]:
    """Return the 100 questions as tokens, and their answers as text."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    questions = torch.tensor([[CHARACTERS.index(c) for c in f"{a}+{b}="] for a, b in pairs])
    return questions, [f"{a + b}." for a, b in pairs]


def text_of(answer: Tensor) -> str:
    """Return the answer up to and with its end."""
    text = "".join(CHARACTERS[i] for i in answer.tolist())
    return text[: text.find(".") + 1] or text


@torch.no_grad()
def answer(policy: Policy, questions: Tensor, *, greedy: bool = False) -> Tensor:
    """Return the questions with LONGEST more characters, which are sampled or the most likely ones."""
    tokens = questions
    for _ in range(LONGEST):
        logits = policy.head(policy(tokens)[:, -1])
        following = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


@torch.no_grad()
def sample(policy: Policy, questions: Tensor, right: list[str]) -> Samples:
    """Sample one answer to each question and reward it with 1 if it is right."""
    tokens = answer(policy, questions)
    target = tokens[:, -LONGEST:].clone()
    reward = torch.tensor([float(text_of(row) == text) for row, text in zip(target, right, strict=True)])
    ended = target.eq(END).cumsum(1) - target.eq(END).long() > 0  # behind the first end
    target[ended] = IGNORED
    values = fused_ppl.linear_log_probs(hidden_of_answers(policy, tokens), policy.head.weight, target)
    return Samples(tokens, target, reward, values.log_prob, values.entropy.sum() / (~ended).sum())


def hidden_of_answers(policy: Policy, tokens: Tensor) -> Tensor:
    """Return the hidden states that predict the characters of the answers."""
    return policy(tokens[:, :-1])[:, -LONGEST:]


def advantages(reward: Tensor, group: int) -> Tensor:
    """Return the advantage of each answer within its group, where answers to one question stand together."""
    grouped = reward.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def loss_of_token(
    log_prob: Tensor, entropy: Tensor, advantage: Tensor, old: Tensor, *, bonus: float, clip: float
) -> Tensor:
    """Return the clipped loss of PPO minus the entropy bonus, for each token."""
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage) - bonus * entropy


def train(run: Run, args: argparse.Namespace) -> Run:
    """Train a new policy for --steps steps. Both runs start from the same weights."""
    torch.manual_seed(args.seed)
    policy = Policy(args.width)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    questions, right = all_questions()
    fn = partial(loss_of_token, bonus=run.bonus, clip=args.clip)
    for _ in progress(range(args.steps), run.name):
        chosen = torch.randint(len(questions), (args.questions,)).repeat_interleave(args.group)
        samples = sample(policy, questions[chosen], [right[i] for i in chosen.tolist()])
        advantage = advantages(samples.reward, args.group)[:, None].expand_as(samples.target).contiguous()
        for _ in range(args.updates):
            hidden = hidden_of_answers(policy, samples.tokens)
            loss = fused_ppl.linear_token_loss(
                hidden, policy.head.weight, samples.target, fn, advantage, samples.log_prob
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        run.reward.append(samples.reward.mean().item())
        run.entropy.append(samples.entropy.item())
    greedy = answer(policy, questions, greedy=True)[:, -LONGEST:]
    run.accuracy = sum(text_of(row) == text for row, text in zip(greedy, right, strict=True)) / len(right)
    return run


def progress(steps: Iterable[int], name: str) -> Iterable[int]:
    """Show a bar if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{name}: {len(list(steps))} steps (pip install tqdm for a bar)")
        return steps
    return tqdm(steps, desc=name, unit="step", dynamic_ncols=True)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean over each step and `reach` steps on both sides."""
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def save_plot(runs: Sequence[Run], path: Path, seed: int) -> None:
    """Draw reward and entropy of all runs, one above the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    reward, entropy = figure.subplots(2, sharex=True)
    for axes, what in ((reward, "reward"), (entropy, "entropy")):
        for run, colour in zip(runs, COLOURS, strict=True):
            values: list[float] = getattr(run, what)
            label = f"{run.name} (final accuracy {run.accuracy:.0%})"
            axes.plot(values, color=colour, linewidth=0.8, alpha=0.25)
            axes.plot(running_mean(values, max(len(values) // 50, 1)), color=colour, linewidth=1.8, label=label)
        axes.set_ylim(bottom=0)
        axes.grid(True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    reward.set_ylabel("mean reward of the samples")
    entropy.set_ylabel("mean entropy of a character, nats")
    entropy.set_xlabel("step")
    reward.legend(frameon=False)
    reward.set_title("faint: each step   line: running mean", loc="left", color="0.35", size=10)
    figure.suptitle(f"GRPO on sums of two digits, seed {seed}", x=0.01, ha="left", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(1)  # the tensors are so small that threads cost more time than they save
    started = time.perf_counter()
    runs = [train(Run(bonus), args) for bonus in (0.0, args.bonus)]
    for run in runs:
        print(
            f"{run.name}: final accuracy {run.accuracy:.0%} of 100 questions, "
            f"last reward {running_mean(run.reward, 10)[-1]:.2f}, last entropy {run.entropy[-1]:.2f} nats"
        )
    print(f"{time.perf_counter() - started:.0f} s")
    path = args.out / "curves.png"
    try:
        save_plot(runs, path, args.seed)
    except ImportError:
        print("grpo_tiny: no plot was drawn, because it needs matplotlib (pip install matplotlib)", file=sys.stderr)
    except OSError as error:
        print(f"grpo_tiny: {error}", file=sys.stderr)
        return 1
    else:
        print(path)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=positive, default=300, help="batches of samples (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the weights, the questions and the samples (%(default)s)")
    add("--out", type=Path, default=Path("runs/grpo_tiny"), help="folder for curves.png (%(default)s)")
    add("--bonus", type=float, default=0.05, help="entropy bonus of the second run (%(default)s)")
    add("--clip", type=float, default=0.2, help="how far the ratio of probabilities may go from 1 (%(default)s)")
    add("--questions", type=positive, default=16, help="questions of a batch (%(default)s)")
    add("--group", type=positive, default=16, help="answers to each question (%(default)s)")
    add("--updates", type=positive, default=2, help="updates on each batch of samples (%(default)s)")
    add("--lr", type=float, default=5e-3, help="learning rate of Adam (%(default)s)")
    add("--width", type=positive, default=64, help="width of the network (%(default)s)")
    args = parser.parse_args(arguments)
    if args.group < 2:
        parser.error(f"--group must be at least 2, because an advantage compares answers; got {args.group}")
    return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
