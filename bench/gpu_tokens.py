# SPDX-License-Identifier: Apache-2.0
"""What gpu_acceptance.py checks and times of log-probabilities, of losses made of them, and of divergences."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from gpu_checks import Sizes, Work, deterministic, head_inputs
from gpu_device import Card, StandIn
from gpu_process import Found, Step
from gpu_times import MODES, Case, Timing, planned_bytes, time_loss
from gpu_truth import IGNORED, REFERENCE, TRITON, chunks, fill_logits, head_options, judge_gradient, make_target
from torch import Tensor

import fused_ppl
from fused_ppl import LogProbs, Options, backends
from fused_ppl.records import Divergence, Normalizers, RowUpstream, TokenInputs
from fused_ppl.spec import LossSpec
from fused_ppl.testing import assert_as_good_as_eager


def token_steps(card: Card | StandIn, sizes: Sizes) -> Iterator[Step]:
    n, v = sizes.beyond_int32[0]
    yield Step(f"log_probs, N={n}, V={v}, bf16", "checks", 3, functools.partial(_log_probs, card, sizes))
    yield Step("linear_token_loss and linear_log_probs", "checks", 2, functools.partial(_heads, card, sizes))
    run = functools.partial(lambda: Found(deterministic(card, sizes, functools.partial(log_probs_work, card, sizes))))
    yield Step("determinism: log_probs", "checks", 1, run)
    yield Step("kl_divergence, every direction", "checks", 2, functools.partial(_divergences, card, sizes))
    yield Step("kl_divergence, top-k teachers", "checks", 1, functools.partial(_top_k, card, sizes))
    n, v = sizes.timed[0]
    run = functools.partial(_entropy_backward, card, n, v)
    yield Step(f"kernel nll_backward with an entropy, N={n}, V={v}", "kernels", 1, run)
    yield Step(f"kernel divergence, N={n}, V={v}", "kernels", 1, functools.partial(_divergence_kernel, card, n, v))
    yield Step("an entropy bonus through linear_token_loss", "plans", 3, functools.partial(_head, card, sizes))


def bonus(log_prob: Tensor, entropy: Tensor) -> Tensor:
    return -log_prob - 0.3 * entropy


def upstreams(n: int, device: torch.device) -> LogProbs:
    """Random ones, of each of the three outputs."""
    generator = torch.Generator(device).manual_seed(11)
    return LogProbs(*(torch.randn(n, generator=generator, device=device) for _ in LogProbs._fields))


def _log_probs(card: Card | StandIn, sizes: Sizes) -> Found:
    """Values and every element of the gradient against float64, by chunks of rows."""
    (n, v), keywords = sizes.beyond_int32[0], {"softcap": 20.0, "logit_scale": 0.9}
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


def _divergences(card: Card | StandIn, sizes: Sizes) -> Found:
    """Values and gradients against float64, also of rows that begin at different places between two boundaries."""
    n, v = sizes.odd[0]
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0)
    teacher = fill_logits(torch.empty(n, v + 3, dtype=torch.bfloat16, device=card.device), target, 1)[:, 3:]
    given, found = upstreams(n, card.device).log_prob, []
    for direction in ("forward", "reverse", "jensen_shannon"):
        results = []
        for dtype, options in ((torch.bfloat16, TRITON), (torch.float32, REFERENCE), (torch.float64, REFERENCE)):
            x = logits.detach().to(dtype).requires_grad_()
            how = {"direction": direction, "reduction": "none", "options": options}
            value = fused_ppl.kl_divergence(x, teacher.to(dtype), target, **how)
            results.append((value.detach(), torch.autograd.grad(value, x, given.to(value.dtype))[0]))
        (value, gradient), (eager, wide), (truth, exact) = results
        assert_as_good_as_eager(value, eager, truth, direction, condition=32.0)
        judge_gradient(f"gradient of {direction}", gradient, wide, exact, condition=32.0)
        found.append(f"{direction} {float(value.mean()):.4g}")
    return Found(", ".join(found))


def _top_k(card: Card | StandIn, sizes: Sizes) -> Found:
    """Values and gradients against float64, for each tail, with rows that name fewer classes."""
    n, v = sizes.odd[0]
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0)
    log_probs, ids = fill_logits(torch.empty_like(logits), target, 1).float().log_softmax(-1).topk(16)
    log_probs[::3, 10:], given, found = -math.inf, upstreams(n, card.device).log_prob, []
    for tail in ("drop", "merge", "spread"):
        results = []
        for dtype, options in ((torch.bfloat16, TRITON), (torch.float32, REFERENCE), (torch.float64, REFERENCE)):
            x, teacher = logits.detach().to(dtype).requires_grad_(), fused_ppl.TopK(ids, log_probs, tail)
            value = fused_ppl.kl_divergence(x, teacher, target, reduction="none", options=options)
            results.append((value.detach(), torch.autograd.grad(value, x, given.to(value.dtype))[0]))
        (value, gradient), (eager, wide), (truth, exact) = results
        assert_as_good_as_eager(value, eager, truth, tail, condition=32.0)
        judge_gradient(f"gradient with {tail}", gradient, wide, exact, condition=32.0)
        found.append(f"{tail} {float(value.mean()):.4g}")
    return Found(", ".join(found))


def _divergence_kernel(card: Card | StandIn, n: int, v: int) -> Found:
    """Both rows read, and the gradient written over the student's."""
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0)
    teacher, one = fill_logits(torch.empty_like(logits), target, 1), torch.ones((), device=card.device)
    backend, spec, tokens = backends.load_divergence("triton"), LossSpec(), TokenInputs(target, None, None)
    rows = []
    for direction in ("forward", "reverse", "jensen_shannon"):
        asked, out = Divergence(direction, 0.5, 1.0, None), torch.empty_like(logits)
        how = {"asked": asked, "upstream": one, "out": out, "memory_budget": None}
        run = functools.partial(backend.divergence, logits, teacher, tokens, spec, **how)
        times = card.milliseconds(run)
        moved = 3 * logits.nbytes
        rows.append(asdict(Timing("kernels", f"divergence, {direction}", "", (n, v), "bf16", times, "", moved)))
    return Found(", ".join(f"{row['milliseconds'][1]:.3f} ms" for row in rows), rows)


def _head(card: Card | StandIn, sizes: Sizes) -> Found:
    n, v, d = sizes.timed_head
    hidden, weight, target = head_inputs(card, n, v, d)
    options: Options = head_options()

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fused_ppl.linear_token_loss(hidden, weight, target, bonus, options=options)

    total = 0.0
    for rows in chunks(n, sizes.chunk):
        logits = (hidden[rows] @ weight.t()).double()
        values = fused_ppl.log_probs(logits, target[rows], options=REFERENCE)
        total += float(bonus(values.log_prob, values.entropy)[target[rows] != IGNORED].sum())
    truth = total / int((target != IGNORED).sum())
    flops, planned = {MODES[1]: 6 * n * v * d}, planned_bytes(sizes, "rows")
    case = Case("plans", [hidden, weight], target, "cross_entropy", truth, {}, flops, planned, MODES[1:])
    return time_loss(card, "fused_ppl, linear_token_loss, entropy", loss, case)
