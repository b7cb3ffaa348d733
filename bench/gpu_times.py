# SPDX-License-Identifier: Apache-2.0
"""What gpu_acceptance.py times, as steps: our kernels, and whole losses beside the peers'.

Every loss is first asked for its value on the same inputs, and one that is wrong gets no time. "forward" is timed with
leaves that need no gradient, because some peers compute gradients in their forward where a leaf asks for one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import gpu_truth
import torch
import torch.nn.functional as F
from gpu_checks import Sizes, head_inputs
from gpu_device import Card, Skipped, StandIn
from gpu_peers import Loss, Peer, head_peers, logits_peers
from gpu_process import Found, Step
from gpu_truth import TRITON, fill_logits, head_options, make_target
from torch import Tensor

import fused_ppl
from fused_ppl import Options, backends, plan
from fused_ppl.backends import presence
from fused_ppl.records import Normalizers, RowUpstream, TokenInputs
from fused_ppl.spec import LossSpec

KERNEL_PASSES = {"nll_forward": 1, "nll_backward": 2, "nll_forward_backward": 2}  # over N * V; reads and writes
DISTANCE = 0.02  # of a peer's perplexity from the truth; some sum in bf16
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MODES = ("forward", "forward + backward")
PRODUCTS = dict(zip(MODES, (1, 3), strict=True))  # of N x V x D
PASSES = PRODUCTS  # over N x V, from logits
BARE = "the matrix products alone"


@dataclass(frozen=True)
class Timing:
    group: str
    provider: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    milliseconds: tuple[float, float, float]  # 20 %, 50 %, 80 %
    objective: str = ""
    bytes: int = 0  # that must move
    flops: int = 0
    peak_bytes: int | None = None  # beyond inputs
    planned_bytes: int | None = None  # the same, as the plan says
    graph_milliseconds: float | None = None
    host_microseconds: float | None = None
    residual: float | None = None  # of a compact head: |G - G'| / |G|


@dataclass(frozen=True)
class Case:
    """One loss over given inputs."""

    group: str
    tensors: list[Tensor]  # what gradients are computed of
    target: Tensor
    objective: str  # "perplexity" or "cross_entropy"
    truth: float
    moved: dict[str, int] = field(default_factory=dict)  # bytes, by mode
    flops: dict[str, int] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES

    @property
    def shape(self) -> tuple[int, ...]:
        n, *rest = self.tensors[0].shape
        return (n, *rest) if len(self.tensors) == 1 else (n, *self.tensors[1].shape)


# --- timing a loss -------------------------------------------------------------------------------------------------


def time_loss(card: Card | StandIn, name: str, loss: Loss, case: Case, *, latency: bool = False) -> Found:
    """The times of a loss in every mode, and the memory that it takes."""

    def leaves(gradient: bool) -> list[Tensor]:
        # a peer may destroy the values
        return [t.detach().clone().requires_grad_(gradient) for t in case.tensors]

    value = float(loss(*leaves(False), case.target).detach())
    log = (lambda x: torch.tensor(x).log().item()) if case.objective == "perplexity" else (lambda x: x)
    if not abs(log(value) - log(case.truth)) <= DISTANCE:
        raise AssertionError(f"no time for a wrong value: {value:.6g}, should be {case.truth:.6g}")
    rows = []
    for mode in case.modes:
        inputs = leaves(mode != "forward")
        run = functools.partial(_forward if mode == "forward" else _both, loss, inputs, case.target)
        times = card.milliseconds(run)
        try:
            peak = card.peak_bytes(run)
        except Skipped:
            peak = None
        row = Timing(
            case.group, name, mode, case.shape, NAMES[case.tensors[0].dtype], times, case.objective,
            case.moved.get(mode, 0), case.flops.get(mode, 0), peak, case.planned.get(mode),
            card.graph_milliseconds(run) if latency else None, card.host_microseconds(run) if latency else None,
        )  # fmt: skip
        rows.append(asdict(row))
    return Found(", ".join(f"{r['mode']} {r['milliseconds'][1]:.3f} ms" for r in rows), rows)


def _forward(loss: Loss, inputs: list[Tensor], target: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(*inputs, target)


def _both(loss: Loss, inputs: list[Tensor], target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs, target), inputs)


def time_peer(card: Card | StandIn, peer: Peer, case: Case) -> Found:
    if (why := peer.missing()) is not None:
        raise Skipped(why)
    if card.stand_in and peer.name.startswith("torch.compile"):
        raise Skipped("not run in a dry run: it compiles for minutes")
    return time_loss(card, peer.name, peer.make(case.objective), case)


# --- inputs ----------------------------------------------------------------------------------------------------------


def logits_case(
    card: Card | StandIn, sizes: Sizes, n: int, v: int, *,
    group: str = "logits", objective: str = "perplexity", dtype: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=dtype, device=card.device), target, 0)
    truth = mean_nll(lambda rows: logits[rows], target, sizes.chunk)
    moved = {mode: passes * logits.nbytes for mode, passes in PASSES.items()}
    planned = dict(zip(MODES, (0, logits.nbytes), strict=True))
    return Case(group, [logits], target, objective, _value(truth, objective), moved, {}, planned)


def head_case(
    card: Card | StandIn, sizes: Sizes, *, group: str = "head", objective: str = "perplexity", kind: str = "rows"
) -> Case:
    n, v, d = sizes.timed_head
    hidden, weight, target = head_inputs(card, n, v, d)
    truth = mean_nll(lambda rows: hidden[rows] @ weight.t(), target, sizes.chunk)
    flops = {mode: 2 * n * v * d * products for mode, products in PRODUCTS.items()}
    return Case(
        group, [hidden, weight], target, objective, _value(truth, objective), {}, flops, planned_bytes(sizes, kind)
    )


def planned_bytes(sizes: Sizes, kind: str, memory_budget: int | None = None) -> dict[str, int]:
    """What the plan of the head says that a call takes, by mode."""
    found = {}
    for mode, needed in zip(MODES, (False, True), strict=True):
        case = plan.LinearCase(*sizes.timed_head, 2, "cuda", (needed, needed, False), memory_budget)
        found[mode] = plan.linear_plan(case, kind if needed else "forward").peak_bytes
    return found


def mean_nll(logits: Callable[[slice], Tensor], target: Tensor, chunk: int) -> float:
    parts = [
        F.cross_entropy(logits(rows).double(), target[rows], reduction="sum")
        for rows in gpu_truth.chunks(len(target), chunk)
    ]
    return float(sum(parts) / (target != gpu_truth.IGNORED).sum())


def _value(mean: float, objective: str) -> float:
    return float(torch.tensor(mean).exp()) if objective == "perplexity" else mean


# --- the steps -------------------------------------------------------------------------------------------------------


def kernel_steps(card: Card | StandIn, sizes: Sizes) -> Iterator[Step]:
    for n, v in sizes.timed:
        for name in KERNEL_PASSES:
            yield Step(f"kernel {name}, N={n}, V={v}", "kernels", 2, functools.partial(_kernel, card, name, n, v))


def _kernel(card: Card | StandIn, name: str, n: int, v: int) -> Found:
    """One of backends/triton_rows.py, which allocates and launches."""
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0)
    backend, spec, rows, out = backends.load("triton"), LossSpec(), logits.unsqueeze(0), logits.clone()
    at_target = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1).float()
    tokens, budget = TokenInputs(target, None, None), {"memory_budget": None}
    forward = functools.partial(backend.nll_forward, rows, tokens, spec, num_items=None, keep_lse=True, **budget)
    stats, totals = forward()
    upstream = RowUpstream(totals.perplexity_factor.float().expand(len(target)), None)
    known = {"normalizers": Normalizers(stats.lse, stats.nll), "upstream": upstream}
    runs = {
        "nll_forward": forward,
        "nll_backward": lambda: backend.nll_backward(rows, tokens, spec, out=torch.empty_like(rows), **known, **budget),
        # over its own result: its time does not depend on what the logits are
        "nll_forward_backward": lambda: backend.nll_forward_backward(
            out, tokens, spec, target_logit=at_target, upstream=1.0, **budget
        ),
    }
    times = card.milliseconds(runs[name])
    row = Timing("kernels", name, "", (n, v), "bf16", times, "", KERNEL_PASSES[name] * logits.nbytes)
    return Found(f"{times[1]:.3f} ms", [asdict(row)])


def loss_steps(card: Card | StandIn, sizes: Sizes) -> Iterator[Step]:
    """Ours and the peers', from logits and through a head: the perplexity of all, the cross-entropy of the nearest."""
    for peer in logits_peers():
        shapes = sizes.timed[:1] if peer.compiles else sizes.timed
        for objective, (n, v) in [*(("perplexity", shape) for shape in shapes), ("cross_entropy", sizes.timed[0])]:
            if objective == "perplexity" or peer.is_near:
                run = functools.partial(_logits_peer, card, sizes, peer, n=n, v=v, objective=objective)
                key = f"{objective} from logits, {peer.name}, N={n}, V={v}"
                yield Step(key, peer.group("logits"), peer.seconds, run, peer.is_ours)
    for peer in head_peers():
        for objective in ("perplexity", "cross_entropy") if peer.is_near else ("perplexity",):
            run = functools.partial(_head_peer, card, sizes, peer, objective=objective)
            key = f"{objective} of a head, {peer.name}"
            yield Step(key, peer.group("head"), peer.seconds + 1, run, peer.is_ours)
    yield Step(BARE, "head", 3, functools.partial(_bare_products, card, sizes))


def _logits_peer(card: Card | StandIn, sizes: Sizes, peer: Peer, *, n: int, v: int, objective: str) -> Found:
    return time_peer(card, peer, logits_case(card, sizes, n, v, objective=objective))


def _head_peer(card: Card | StandIn, sizes: Sizes, peer: Peer, *, objective: str) -> Found:
    case = head_case(card, sizes, objective=objective)
    return time_peer(card, peer, case)


def _bare_products(card: Card | StandIn, sizes: Sizes) -> Found:
    """One product forward, three with the gradients: what every head has to do at least."""
    hidden, weight, _ = head_inputs(card, *sizes.timed_head)
    gradient = hidden @ weight.t()

    def three() -> tuple[Tensor, ...]:
        return hidden @ weight.t(), gradient @ weight, gradient.t() @ hidden

    n, v, d = sizes.timed_head
    rows = []
    for mode, run in zip(MODES, (lambda: hidden @ weight.t(), three), strict=True):
        flops = 2 * n * v * d * PRODUCTS[mode]
        rows.append(asdict(Timing("head", BARE, mode, (n, v, d), "bf16", card.milliseconds(run), flops=flops)))
    return Found(", ".join(f"{r['mode']} {r['milliseconds'][1]:.3f} ms" for r in rows), rows)


def variant_steps(card: Card | StandIn, sizes: Sizes) -> Iterator[Step]:
    """Ours alone: other dtypes, what each option costs, few rows, the plans of the head."""
    v = sizes.timed[0][1]
    for dtype in (torch.float16, torch.float32):
        run = functools.partial(_logits_dtype, card, sizes, dtype)
        yield Step(f"perplexity from logits, {NAMES[dtype]}", "dtypes", 3, run)
    for name in OPTIONS:
        yield Step(f"perplexity from logits with {name}", "options", 3, functools.partial(_option, card, sizes, name))
    for rows in sizes.few:
        run = functools.partial(_few_rows, card, sizes, rows)
        yield Step(f"perplexity from logits, N={rows}, V={v}, latency", "rows", 2, run)
    for name in HEADS:
        seconds = 2 if name.endswith("beside") else 4
        yield Step(f"perplexity of a head, {name}", "plans", seconds, functools.partial(_head_plan, card, sizes, name))


def _logits_dtype(card: Card | StandIn, sizes: Sizes, dtype: torch.dtype) -> Found:
    case = logits_case(card, sizes, *sizes.timed[0], group="dtypes", dtype=dtype)
    return time_loss(card, "fused_ppl", functools.partial(fused_ppl.perplexity, options=TRITON), case)


# name -> keywords of fused_ppl.cross_entropy, tensors made of (N, V)
OPTIONS: dict[str, Callable[[int, int, torch.device], dict[str, Any]]] = {
    "no option": lambda n, v, device: {},
    "label_smoothing": lambda n, v, device: {"label_smoothing": 0.1},
    "softcap": lambda n, v, device: {"softcap": 30.0},
    "z_loss": lambda n, v, device: {"z_loss": 1e-4},
    "weight": lambda n, v, device: {"weight": torch.ones(v, device=device)},
    "weight, label_smoothing": lambda n, v, device: {"weight": torch.ones(v, device=device), "label_smoothing": 0.1},
    "token_weight": lambda n, v, device: {"token_weight": torch.ones(n, device=device)},
    "every statistic": lambda n, v, device: {},
}


def _option(card: Card | StandIn, sizes: Sizes, name: str) -> Found:
    case = logits_case(card, sizes, *sizes.timed[0], group="options", objective="cross_entropy")
    keywords = OPTIONS[name](*sizes.timed[0], card.device)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        if name == "every statistic":
            return fused_ppl.cross_entropy_with_stats(x, target, options=TRITON).loss
        return fused_ppl.cross_entropy(x, target, options=TRITON, **keywords)

    changes = name in ("label_smoothing", "softcap", "z_loss", "weight, label_smoothing")
    truth = float(loss(case.tensors[0], case.target)) if changes else case.truth  # its value is judged by the checks
    case = Case(case.group, case.tensors, case.target, case.objective, truth, case.moved)
    return time_loss(card, name, loss, case)


def _few_rows(card: Card | StandIn, sizes: Sizes, n: int) -> Found:
    """With the time inside a CUDA graph, and that of the host: which of them limits a small call."""
    case = logits_case(card, sizes, n, sizes.timed[0][1], group="rows")
    return time_loss(card, "fused_ppl", functools.partial(fused_ppl.perplexity, options=TRITON), case, latency=True)


# name -> options, and the kind of plan; "vocab" is what a tight budget leads to
HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "plan rows": ({}, "rows"),
    "plan rows, products beside": ({}, "rows"),  # added from a buffer, and not in place
    "plan vocab": ({"memory_budget": 2**20}, "vocab"),
    "compact, tolerance 1e-3": ({"gradient_tolerance": 1e-3}, "compact"),
    "compact, an eighth of the columns": ({"gradient_columns": 0.125}, "compact"),
    "compact, screen bf16": ({"gradient_columns": 0.125, "screen": "bf16"}, "compact"),
    "compact, screen int8": ({"gradient_columns": 0.125, "screen": "int8"}, "compact"),
    "compact, screen fp8": ({"gradient_columns": 0.125, "screen": "fp8"}, "compact"),
}


def _head_plan(card: Card | StandIn, sizes: Sizes, name: str) -> Found:
    keywords, kind = HEADS[name]
    if card.stand_in and keywords.get("screen") == "fp8":
        raise Skipped("products in fp8 need a GPU")
    backend = head_options().backend
    options = Options(backend=backend, **keywords)
    case = head_case(card, sizes, group="plans", kind="rows" if kind == "compact" else kind)
    planned = planned_bytes(sizes, kind, keywords.get("memory_budget")) if kind != "compact" else {}
    # a cheap forward alone is not what a compact head is for
    modes = MODES if kind != "compact" and not name.endswith("beside") else MODES[1:]
    case = Case("plans", case.tensors, case.target, case.objective, case.truth, {}, case.flops, planned, modes)
    loss = functools.partial(fused_ppl.linear_perplexity, options=options)
    adds = presence.adds_half_products
    try:
        if name.endswith("beside"):
            presence.adds_half_products = lambda kind: False
        found = time_loss(card, f"fused_ppl, {name}", loss, case)
    finally:
        presence.adds_half_products = adds
    if kind == "compact":
        leaves = [t.detach().clone().requires_grad_() for t in case.tensors]
        out = fused_ppl.linear_cross_entropy_with_stats(*leaves, case.target, options=options)
        if out.residual is not None:
            found.rows[-1]["residual"] = float(out.residual)
    return found
