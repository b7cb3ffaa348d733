# SPDX-License-Identifier: Apache-2.0
"""What gpu_acceptance.py checks and times of log-probabilities with gradients, and of losses that are made of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from gpu_checks import Sizes, Work, deterministic, graph, head_inputs, nothing_waits
from gpu_device import Card, StandIn
from gpu_process import Found, Step
from gpu_times import MODES, Case, Timing, planned_bytes, time_loss
from gpu_truth import IGNORED, REFERENCE, TRITON, chunks, fill_logits, head_options, judge_gradient, make_target
from torch import Tensor

import fused_ppl
from fused_ppl import LogProbs, Options, backends
from fused_ppl.records import Normalizers, RowUpstream, TokenInputs
from fused_ppl.spec import LossSpec
from fused_ppl.testing import assert_as_good_as_eager


def token_steps(card: Card | StandIn, sizes: Sizes) -> Iterator[Step]:
    n, v = sizes.beyond_int32[0]
    for keywords in ({}, {"softcap": 20.0, "logit_scale": 0.9}):
        key = f"log_probs, N={n}, V={v}, bf16" + (", softcap, scale" if keywords else "")
        yield Step(key, "checks", 5, functools.partial(_log_probs, card, sizes, keywords))
    yield Step("linear_token_loss and linear_log_probs", "checks", 4, functools.partial(_heads, card, sizes))
    work = functools.partial(log_probs_work, card, sizes)
    for title, promise in {
        "determinism": deterministic,
        "no host synchronisation": nothing_waits,
        "CUDA graph, capture and replay": graph,
    }.items():
        run = functools.partial(lambda p: Found(p(card, sizes, work)), promise)
        yield Step(f"{title}: log_probs", "checks", 1.5, run)
    for n, v in sizes.timed:
        run = functools.partial(_entropy_backward, card, n, v)
        yield Step(f"kernel nll_backward with an entropy, N={n}, V={v}", "kernels", 2, run)
    for name in ("linear_token_loss", "linear_log_probs"):
        yield Step(f"an entropy bonus through {name}", "plans", 5, functools.partial(_head, card, sizes, name))


def bonus(log_prob: Tensor, entropy: Tensor) -> Tensor:
    return -log_prob - 0.3 * entropy


def upstreams(n: int, device: torch.device) -> LogProbs:
    """Random ones, of each of the three outputs."""
    generator = torch.Generator(device).manual_seed(11)
    return LogProbs(*(torch.randn(n, generator=generator, device=device) for _ in LogProbs._fields))


def _log_probs(card: Card | StandIn, sizes: Sizes, keywords: dict[str, float]) -> Found:
    """Values and every element of the gradient against float64, by chunks of rows."""
    n, v = sizes.beyond_int32[0]
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0).requires_grad_()
    given = upstreams(n, card.device)
    values = fused_ppl.log_probs(logits, target, options=TRITON, **keywords)
    (gradient,) = torch.autograd.grad(values, logits, given)
    for rows in chunks(n, sizes.chunk):
        found = []
        for dtype in (torch.float32, torch.float64):
            x = logits[rows].detach().to(dtype).requires_grad_()
            out = fused_ppl.log_probs(x, target[rows], options=REFERENCE, **keywords)
            found.append((out, torch.autograd.grad(out, x, [g[rows].to(dtype) for g in given])[0]))
        (eager, wide), (truth, exact) = found
        where = f"rows {rows.start} to {rows.stop}"
        for name, mine, other, right in zip(LogProbs._fields, values, eager, truth, strict=True):
            assert_as_good_as_eager(mine[rows].detach(), other.detach(), right.detach(), f"{name}, {where}")
        judge_gradient(f"gradient, {where}", gradient[rows], wide, exact, condition=math.log(v))
        assert not bool(gradient[rows][target[rows] == IGNORED].any()), f"{where}: an ignored row is not zero"
    return Found(f"mean entropy {float(values.entropy.detach().mean()):.5g}")


def _heads(card: Card | StandIn, sizes: Sizes) -> Found:
    """One chunk by chunk with its gradient at once, the other with its logits computed again in backward."""
    n, v, d = sizes.heads[0]
    hidden, weight, target = head_inputs(card, min(n, 4 * sizes.rows), v, d)
    leaves, options = [t.requires_grad_() for t in (hidden, weight)], head_options()
    at_once = fused_ppl.linear_token_loss(*leaves, target, bonus, options=options)
    values = fused_ppl.linear_log_probs(*leaves, target, options=options)
    later = bonus(values.log_prob, values.entropy)[target != IGNORED].mean()
    value, other = at_once.item(), later.item()
    assert abs(value - other) <= 2e-6 * abs(other), f"{value!r} and {other!r}"
    worst = 0.0
    for a, b in zip(torch.autograd.grad(at_once, leaves), torch.autograd.grad(later, leaves), strict=True):
        worst = max(worst, float((a.float() - b.float()).norm() / b.float().norm()))
    assert worst <= 8e-3, f"the gradients differ by {worst:.2e}, two roundings to bf16 are allowed"
    return Found(f"{value:.7g}, gradients within {worst:.1e}")


def log_probs_work(card: Card | StandIn, sizes: Sizes) -> Work:
    target = make_target(sizes.rows, sizes.widest, card.device, 1)
    logits = torch.empty(*target.shape, sizes.widest, dtype=torch.bfloat16, device=card.device, requires_grad=True)
    given = upstreams(len(target), card.device)

    def run() -> tuple[Tensor, ...]:
        values = fused_ppl.log_probs(logits, target, options=TRITON)
        return *(t.detach() for t in values), *torch.autograd.grad(values, logits, given)

    def refill(seed: int) -> None:
        fill_logits(logits, target, seed)

    refill(0)
    return Work(refill, run)


def _entropy_backward(card: Card | StandIn, n: int, v: int) -> Found:
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0).unsqueeze(0)
    backend, spec, tokens = (
        backends.load("triton"),
        LossSpec(reduction="none", stats=True),
        TokenInputs(target, None, None),
    )
    stats, _ = backend.nll_forward(logits, tokens, spec, num_items=None, memory_budget=None, keep_lse=True)
    assert stats.lse is not None
    log_prob, entropy, _ = upstreams(n, card.device)
    known, upstream = Normalizers(stats.lse, stats.nll), RowUpstream(-log_prob, None, None, entropy, stats.entropy)

    def run() -> Tensor:
        out = torch.empty_like(logits)
        how = {"normalizers": known, "upstream": upstream, "memory_budget": None}
        backend.nll_backward(logits, tokens, spec, out=out, **how)
        return out

    times = card.milliseconds(run)
    row = Timing("kernels", "nll_backward, entropy", "", (n, v), "bf16", times, "", 2 * logits.nbytes)
    return Found(f"{times[1]:.3f} ms", [asdict(row)])


def _head(card: Card | StandIn, sizes: Sizes, name: str) -> Found:
    n, v, d = sizes.timed_head
    hidden, weight, target = head_inputs(card, n, v, d)
    options: Options = head_options()

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if name == "linear_token_loss":
            return fused_ppl.linear_token_loss(hidden, weight, target, bonus, options=options)
        values = fused_ppl.linear_log_probs(hidden, weight, target, options=options)
        return (
            torch.where(target != IGNORED, bonus(values.log_prob, values.entropy), 0).sum() / (target != IGNORED).sum()
        )

    def truth() -> float:
        total = 0.0
        for rows in chunks(n, sizes.chunk):
            logits = (hidden[rows] @ weight.t()).double()
            values = fused_ppl.log_probs(logits, target[rows], options=REFERENCE)
            total += float(bonus(values.log_prob, values.entropy)[target[rows] != IGNORED].sum())
        return total / int((target != IGNORED).sum())

    products, kind = (3, "rows") if name == "linear_token_loss" else (4, "vocab")
    flops = {MODES[1]: 2 * n * v * d * products}
    case = Case(
        "plans", [hidden, weight], target, "cross_entropy", truth(), {}, flops, planned_bytes(sizes, kind), MODES[1:]
    )
    return time_loss(card, f"fused_ppl, {name}, entropy", loss, case)
