# SPDX-License-Identifier: Apache-2.0
"""Perplexity as a loss of reinforcement learning: what do token weights do there, as rewards and as advantages?

A policy reads four symbols and must write them in reverse. It sees its own samples alone, and each right symbol has the
reward 1. REINFORCE minimises the sum of A_i nll_i, where the advantage A is the reward less a running mean of rewards.
The weights of a perplexity are divided by their sum M. Advantages sum to about zero, so their M has no meaning: it may
be tiny, and of either sign. Rewards have a sum that means something. exp of REINFORCE divides by the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from study import COLOURS, Point, Study, at_best_rate, axes_of, interval, number, shown, where
from torch import Tensor, nn

import fused_ppl

SYMBOLS, LENGTH, BATCH, WIDTH = 16, 4, 128, 64
RATES = (-12, -10, -8, -6)  # powers of 2
MEASURED = 20  # times in a run


def reinforce(logits: Tensor, action: Tensor, weight: Tensor) -> Tensor:
    return fused_ppl.cross_entropy(logits, action, class_dim=-1, token_weight=weight, num_items=action.numel())


def exp_of_reinforce(logits: Tensor, action: Tensor, weight: Tensor) -> Tensor:
    return reinforce(logits, action, weight).exp()


def cross_entropy(logits: Tensor, action: Tensor, weight: Tensor) -> Tensor:
    """Divided by the sum of the weights. A batch in which they are all 0 has no loss."""
    return fused_ppl.cross_entropy(logits, action, class_dim=-1, token_weight=weight).nan_to_num(0.0)


def perplexity(logits: Tensor, action: Tensor, weight: Tensor) -> Tensor:
    return fused_ppl.perplexity(logits, action, class_dim=-1, token_weight=weight).nan_to_num(0.0)


# and whether the weights are advantages
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], bool]] = {
    "cross-entropy, advantages (REINFORCE)": (reinforce, True),
    "exp of REINFORCE": (exp_of_reinforce, True),
    "cross-entropy, rewards": (cross_entropy, False),
    "perplexity, rewards": (perplexity, False),
    "perplexity, advantages": (perplexity, True),
}


class Policy(nn.Module):
    """Logits (n, 4, 16) of what to write, of symbols (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.body = nn.Sequential(nn.Linear(LENGTH * WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, LENGTH * WIDTH))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        hidden = self.body(self.embedding(symbols).flatten(1)).unflatten(1, (LENGTH, WIDTH))
        logits: Tensor = self.head(hidden)
        return logits


def points(quick: bool) -> list[Point]:
    seeds, steps = (2, 40) if quick else (5, 300)
    return [
        {"loss": loss, "rate": rate, "steps": steps, "seed": seed}
        for loss in LOSSES
        for rate in (RATES[1:3] if quick else RATES)
        for seed in range(seeds)
    ]


def run(point: Point) -> Point:
    """The reward of sampled answers along the run, and the share of steps whose advantages had a negative sum."""
    policy, (loss_of, by_advantage) = Policy(), LOSSES[point["loss"]]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2.0 ** point["rate"])
    mean_rewards, negative, baseline = [], 0, 1 / SYMBOLS
    for _ in range(point["steps"]):
        symbols = torch.randint(SYMBOLS, (BATCH, LENGTH))
        logits = policy(symbols)
        action = torch.distributions.Categorical(logits=logits.detach()).sample()
        reward = (action == symbols.flip(1)).float()
        advantage = reward - baseline
        negative += float(advantage.sum()) < 0
        loss_of(logits, action, advantage if by_advantage else reward).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        mean_rewards.append(float(reward.mean()))
        baseline = 0.9 * baseline + 0.1 * mean_rewards[-1]
    size = max(1, len(mean_rewards) // MEASURED)
    curve = [sum(part) / len(part) for part in (mean_rewards[i : i + size] for i in range(0, len(mean_rewards), size))]
    return {"curve": curve, "reward": curve[-1], "negative M": negative / point["steps"]}


def chosen(done: list[Point], loss: str) -> list[Point]:
    """The runs of the learning rate with the highest reward in the mean over the run."""
    return at_best_rate(where(done, loss=loss), lambda p: sum(p["curve"]))


def table(done: list[Point]) -> str:
    lines = ["| loss, and its token weights | best rate | reward at the end | mean over the run |", "|---|---|---|---|"]
    for loss in LOSSES:
        own = chosen(done, loss)
        end = shown([number(p["reward"]) for p in own])
        mean = shown([sum(p["curve"]) / len(p["curve"]) for p in own])
        lines.append(f"| {loss} | 2^{own[0]['rate']} | {end} | {mean} |")
    return "\n".join(lines)


def plot(done: list[Point]) -> Figure:
    figure = Figure(figsize=(9, 4.2), dpi=120, layout="constrained")
    (axes,) = axes_of(figure, 1)
    for loss, colour in zip(LOSSES, COLOURS, strict=False):
        own = chosen(done, loss)
        curves = [p["curve"] for p in own]
        size = own[0]["steps"] / len(curves[0])
        xs = [size * (k + 1) for k in range(len(curves[0]))]
        found = [interval([c[k] for c in curves]) for k in range(len(xs))]
        means, halves = zip(*found, strict=True)
        label = f"{loss}, rate 2^{own[0]['rate']}"
        axes.errorbar(xs, means, halves, color=colour, label=label, marker="o", ms=3, capsize=2)
    axes.axhline(1 / SYMBOLS, color="0.5", linewidth=1, linestyle=(0, (1, 2)))
    axes.set_xlabel("steps")
    axes.set_ylabel("mean reward of a symbol")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)
    seeds = len({p["seed"] for p in done})
    figure.suptitle(f"{seeds} seeds, 95 % intervals, AdamW, clipped, best rate of each; dotted: chance", size=9)
    return figure


STUDY = Study("policy_gradient", "Does perplexity work as a policy-gradient loss?", points, run, table, plot)
