# SPDX-License-Identifier: Apache-2.0
"""What gpu_acceptance.py checks: values at real sizes, and the promises about streams, graphs, determinism and memory.

The promises about streams and graphs are also asked of a bare torch.mm: what cuBLAS does not keep, no head can keep."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gpu_device import Card, Skipped, StandIn
from gpu_process import Found, Step
from gpu_truth import IGNORED, TRITON, fill_logits, head_options, judge_head, judge_logits, make_target
from torch import Tensor

import fused_ppl
from fused_ppl import Options
from fused_ppl.testing import make_logits, value_and_gradient


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    beyond_int32: tuple[tuple[int, int], ...]  # (N, V) with N * V > 2**31
    odd: tuple[tuple[int, int], ...]  # in every dtype, and as misaligned views
    few_rows: tuple[int, ...]  # split over the vocabulary, at the widest V
    heads: tuple[tuple[int, int, int], ...]  # (N, V, D), N * V > 2**31
    rows: int  # of the workloads that are repeated
    runs: int  # of determinism
    rounds: int  # of streams and replays
    chunk: int  # rows of the truth at a time
    timed: tuple[tuple[int, int], ...]
    timed_head: tuple[int, int, int]
    few: tuple[int, ...]  # rows of small calls, whose latency is timed

    @property
    def widest(self) -> int:
        return max(v for _, v in self.beyond_int32)


REAL = Sizes(
    beyond_int32=((16768, 128256), (14336, 151643)),
    odd=((1024, 50257), (512, 151643), (4096, 4099), (64, 8)),
    few_rows=(1, 7, 33),
    heads=((16768, 128256, 1024), (14336, 151643, 1024)),
    rows=1024,
    runs=100,
    rounds=20,
    chunk=256,
    timed=((8192, 128256), (8192, 151643), (16384, 50257)),
    timed_head=(8192, 128256, 4096),
    few=(1, 8, 64, 512),
)
DRY = Sizes(
    beyond_int32=((4, 272), (3, 301)),
    odd=((3, 61), (2, 5)),
    few_rows=(1,),
    heads=((5, 67, 16), (3, 51, 8)),
    rows=2,
    runs=2,
    rounds=1,
    chunk=2,
    timed=((4, 131),),
    timed_head=(5, 67, 16),
    few=(1,),
)
HALF_AND_FULL = (torch.bfloat16, torch.float16, torch.float32)


class Work(NamedTuple):
    """A loss and its gradients over inputs that can be filled anew, as a training step has them."""

    refill: Callable[[int], None]  # with the random numbers of a seed
    run: Callable[[], tuple[Tensor, ...]]


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """NaN is equal to itself."""
    return all(
        torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in pair)) for pair in zip(a, b, strict=True)
    )


def every_option(n: int, v: int, device: torch.device, perplexity: bool) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(7)
    weight, token_weight = (torch.rand(size, generator=generator, device=device) + 0.5 for size in (v, n))
    options = {"label_smoothing": 0.1, "logit_scale": 0.9, "softcap": 20.0}
    return {**options, "weight": weight, "token_weight": token_weight} | ({} if perplexity else {"z_loss": 1e-4})


# --- values ------------------------------------------------------------------------------------------------------


def large(card: Card | StandIn, sizes: Sizes, n: int, v: int, loss: Callable[..., Tensor], options: bool) -> str:
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0)
    keywords = every_option(n, v, card.device, loss is fused_ppl.perplexity) if options else {}
    return judge_logits(loss, logits, target, keywords, chunk=sizes.chunk)


def misaligned(card: Card | StandIn, sizes: Sizes, dtype: torch.dtype) -> str:
    """Views that begin 3 elements into their buffer, with odd row strides, between NaN that nobody may touch."""
    for (n, v), pad in itertools.product(sizes.odd, (0, 1)):
        buffer = torch.full((3 + n * (v + pad) + 16,), float("nan"), dtype=dtype, device=card.device)
        view = buffer.as_strided((n, v), (v + pad, 1), 3)
        target = make_target(n, v, card.device, 1)
        fill_logits(view, target, 0)
        before = buffer.clone()
        judge_logits(fused_ppl.perplexity, view, target, {}, chunk=sizes.chunk)
        assert same_bits((buffer,), (before,)), f"N={n}, V={v}, pad={pad}: the buffer around the logits has changed"
    return f"V = {', '.join(str(v) for _, v in sizes.odd)}"


def split_rows(card: Card | StandIn, sizes: Sizes) -> str:
    for n in sizes.few_rows:
        target = make_target(n, sizes.widest, card.device, 1, ignored=0)
        logits = fill_logits(torch.empty(n, sizes.widest, dtype=torch.bfloat16, device=card.device), target, n)
        judge_logits(fused_ppl.perplexity, logits, target, {}, chunk=sizes.chunk)
    return f"N = {', '.join(map(str, sizes.few_rows))}"


def wild(card: Card | StandIn, sizes: Sizes) -> str:
    """-inf, rows at +-1e4, and ignored rows of NaN and infinities, whose gradient is zero all the same."""
    n, v = 12, sizes.widest
    logits = make_logits((n, v), torch.float32, kind="wild", device=card.device)
    target = torch.arange(n, device=card.device) * 2 % v  # not a class of -inf: those are 1, 6, 11, ...
    target = torch.where(target % 5 == 1, 0, target)
    logits[3], logits[7], target[3], target[7] = float("nan"), float("inf"), IGNORED, IGNORED
    judge_logits(fused_ppl.cross_entropy, logits, target, {}, chunk=sizes.chunk)
    return "-inf, rows at +1e4 and -1e4, ignored rows of NaN and inf"


def head(card: Card | StandIn, sizes: Sizes, n: int, v: int, d: int, loss: Callable[..., Tensor]) -> str:
    hidden, weight, target = head_inputs(card, n, v, d)
    return judge_head(loss, hidden, weight, target, chunk=4 * sizes.chunk)


def head_inputs(card: Card | StandIn, n: int, v: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(card.device).manual_seed(seed)
    hidden = torch.empty(n, d, dtype=torch.bfloat16, device=card.device).normal_(generator=generator)
    weight = torch.empty(v, d, dtype=torch.bfloat16, device=card.device).normal_(0, 2 / d**0.5, generator=generator)
    return hidden, weight, make_target(n, v, card.device, seed + 1)


# --- workloads for the promises ----------------------------------------------------------------------------------


def logits_work(card: Card | StandIn, n: int, v: int, loss: Callable[..., Any], **options: Any) -> Work:
    target = make_target(n, v, card.device, 1)
    logits = torch.empty(n, v, dtype=torch.bfloat16, device=card.device, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out = loss(logits, target, options=TRITON, **options)
        found = (out,) if isinstance(out, Tensor) else tuple(out)
        return *(t.detach() for t in found if t is not None), torch.autograd.grad(found[0].sum(), logits)[0]

    def refill(seed: int) -> None:
        fill_logits(logits, target, seed)

    refill(0)
    return Work(refill, run)


def head_work(card: Card | StandIn, n: int, v: int, d: int, loss: Callable[..., Tensor], **options: Any) -> Work:
    inputs = head_inputs(card, n, v, d)
    leaves, target = [t.requires_grad_() for t in inputs[:2]], inputs[2]
    how = head_options()

    def run() -> tuple[Tensor, ...]:
        value = loss(*leaves, target, options=how, **options)
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    def refill(seed: int) -> None:
        with torch.no_grad():
            for leaf, fresh in zip(leaves, head_inputs(card, n, v, d, seed), strict=False):
                leaf.copy_(fresh)

    return Work(refill, run)


def compact_work(card: Card | StandIn, n: int, v: int, d: int) -> Work:
    """With labels that occur many times, whose gradients of the bias are added up."""
    hidden, weight, _ = head_inputs(card, n, v, d)
    target = torch.arange(n, device=card.device) % max(2, min(7, v))
    bias = torch.zeros(v, dtype=hidden.dtype, device=card.device)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    options = Options(backend=head_options().backend, gradient_columns=0.125)

    def run() -> tuple[Tensor, ...]:
        value = fused_ppl.linear_cross_entropy(*leaves[:2], target, linear_bias=bias, options=options)
        return value.detach(), *torch.autograd.grad(value, leaves)

    def refill(seed: int) -> None:
        with torch.no_grad():
            for leaf, fresh in zip(leaves, head_inputs(card, n, v, d, seed)[:2], strict=False):
                leaf.copy_(fresh)

    return Work(refill, run)


def product_work(card: Card | StandIn, n: int, v: int, d: int) -> Work:
    """What a head is made of, without us."""
    hidden, weight, _ = head_inputs(card, n, v, d)

    def refill(seed: int) -> None:
        for tensor, fresh in zip((hidden, weight), head_inputs(card, n, v, d, seed), strict=False):
            tensor.copy_(fresh)

    return Work(refill, lambda: (torch.mm(hidden, weight.t()),))


CONTROL = "torch.mm alone, as a control"


def works(card: Card | StandIn, sizes: Sizes) -> dict[str, Callable[[], Work]]:
    n, v = sizes.rows, sizes.widest
    few = sizes.few_rows[-1]
    of_logits, of_head = functools.partial(logits_work, card), functools.partial(head_work, card)
    options = functools.partial(every_option, device=card.device)
    _, *of = sizes.heads[0]
    return {
        "perplexity": lambda: of_logits(n, v, fused_ppl.perplexity),
        "perplexity, rows split": lambda: of_logits(few, v, fused_ppl.perplexity),
        "cross_entropy, every option": lambda: of_logits(
            n, v, fused_ppl.cross_entropy, **options(n, v, perplexity=False)
        ),
        "cross_entropy, per token": lambda: of_logits(n, v, fused_ppl.cross_entropy, reduction="none"),
        "statistics, rows split": lambda: of_logits(few, v, fused_ppl.cross_entropy_with_stats),
        "linear_perplexity": lambda: of_head(n, *of, fused_ppl.linear_perplexity),
        "linear_cross_entropy, per token": lambda: of_head(n, *of, fused_ppl.linear_cross_entropy, reduction="none"),
        "compact head, repeated labels": lambda: compact_work(card, n, *of),
        CONTROL: lambda: product_work(card, n, *of),
    }


# --- the promises ------------------------------------------------------------------------------------------------


def deterministic(card: Card | StandIn, sizes: Sizes, make: Callable[[], Work]) -> str:
    work = make()
    first = work.run()
    for i in range(1, sizes.runs):
        assert same_bits(work.run(), first), f"run {i} has other bits than run 0"
    return f"{sizes.runs} runs, the same bits"


def nothing_waits(card: Card | StandIn, sizes: Sizes, make: Callable[[], Work]) -> str:
    work = make()
    work.run()  # compiles
    card.synchronize()
    with card.nothing_waits():
        work.run()
    return 'set_sync_debug_mode("error")'


def graph(card: Card | StandIn, sizes: Sizes, make: Callable[[], Work]) -> str:
    """Every replay computes from what the inputs hold then, counters zeroed anew."""
    work = make()
    replay, outputs = card.capture(work.run)
    for seed in range(3, 3 + sizes.rounds):
        work.refill(seed)
        want = tuple(t.clone() for t in work.run())
        replay()
        card.synchronize()
        assert same_bits(outputs, want), f"replay {seed - 2} has other bits than the same call without a graph"
    return f"{sizes.rounds} replays over other inputs"


def two_streams(card: Card | StandIn, sizes: Sizes, make: Callable[[], Work]) -> str:
    """The same code over two inputs at once: nothing is shared between calls."""
    first, second = make(), make()
    second.refill(5)
    want = [tuple(t.clone() for t in work.run()) for work in (first, second)]
    for i, found in enumerate(card.at_once([first.run, second.run], sizes.rounds)):
        assert all(same_bits(results, want[i]) for results in found), f"stream {i} has other bits than alone"
    return f"{sizes.rounds} calls on each"


def two_graphs(card: Card | StandIn, sizes: Sizes, make: Callable[[], Work]) -> str:
    first, second = make(), make()
    second.refill(5)
    want = [tuple(t.clone() for t in work.run()) for work in (first, second)]
    captured = [card.capture(work.run) for work in (first, second)]

    def replay_and_keep(i: int) -> tuple[Tensor, ...]:
        captured[i][0]()
        return tuple(t.clone() for t in captured[i][1])

    functions = [functools.partial(replay_and_keep, i) for i in range(2)]
    for i, found in enumerate(card.at_once(functions, sizes.rounds)):
        assert all(same_bits(results, want[i]) for results in found), f"graph {i} has other bits than alone"
    return f"{sizes.rounds} replays of each"


def little_memory(card: Card | StandIn, sizes: Sizes) -> str:
    n, v = sizes.beyond_int32[0]
    target = make_target(n, v, card.device, 1)
    logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0)
    step = functools.partial(value_and_gradient, lambda x: fused_ppl.perplexity(x, target, options=TRITON), logits)
    beyond = card.peak_bytes(step) - n * v * 2
    assert beyond <= 64 * 2**20, f"{beyond / 2**20:.0f} MiB beyond the gradient, 64 allowed"
    return f"{beyond / 2**20:+.1f} MiB beyond the gradient"


def compiled(card: Card | StandIn, sizes: Sizes) -> str:
    if card.stand_in:
        raise Skipped("tests/test_compile.py compiles on a CPU")
    target = make_target(sizes.rows, sizes.widest, card.device, 1)
    logits = fill_logits(torch.empty(len(target), sizes.widest, dtype=torch.bfloat16, device=card.device), target, 0)

    def loss(x: Tensor) -> Tensor:
        return fused_ppl.perplexity(x, target, options=TRITON)

    torch._dynamo.reset()
    found = value_and_gradient(torch.compile(loss, fullgraph=True, dynamic=True), logits)
    assert same_bits(found, value_and_gradient(loss, logits)), "other bits than without torch.compile"
    return "fullgraph=True, dynamic=True: the same bits"


def other_device(card: Card | StandIn, sizes: Sizes) -> str:
    if card.stand_in or torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    here = torch.zeros(4, sizes.widest, device="cuda:1")
    value, gradient = value_and_gradient(
        lambda x: fused_ppl.perplexity(x, torch.zeros(4, dtype=torch.long, device="cuda:1"), options=TRITON), here
    )
    assert gradient.device == value.device == here.device and abs(float(value) / sizes.widest - 1) < 1e-5
    return "tensors on cuda:1 while cuda:0 is current"


def compact_head(card: Card | StandIn, sizes: Sizes) -> str:
    """The loss is that of the exact head; after a few steps the gradient is as near as was asked for."""
    n, v, d = sizes.heads[0]
    hidden, weight, target = head_inputs(card, min(n, 4 * sizes.rows), v, d)
    leaves, tolerance = [t.requires_grad_() for t in (hidden, weight)], 1e-2
    backend = head_options().backend
    exact = fused_ppl.linear_cross_entropy(*leaves, target, options=Options(backend=backend))
    want = torch.autograd.grad(exact, leaves)
    for _ in range(4):  # on a GPU the number of columns follows from earlier steps
        out = fused_ppl.linear_cross_entropy_with_stats(
            *leaves, target, options=Options(backend=backend, gradient_tolerance=tolerance)
        )
        got = torch.autograd.grad(out.loss, leaves)
        card.synchronize()
    loss, want_loss = out.loss.item(), exact.item()
    assert abs(loss - want_loss) <= 2e-6 * abs(want_loss), f"the loss is {loss!r}, that of the exact head {want_loss!r}"
    residual = float("nan") if out.residual is None else float(out.residual)
    assert residual <= tolerance, f"a residual of {residual:.2e}, {tolerance} asked for"
    for name, a, b in zip(("hidden states", "weight"), got, want, strict=True):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        assert error <= 4 * tolerance, f"the gradient of the {name} is off by {error:.2e}"
    return f"residual {residual:.1e} for a tolerance of {tolerance}"


SECONDS = {large: 4.0, misaligned: 3.0, split_rows: 3.0, head: 6.0, deterministic: 3.0, compact_head: 6.0}


def check_steps(card: Card | StandIn, sizes: Sizes) -> Iterator[Step]:
    """One check of each kind, then the others of every kind."""
    seen: set[Any] = set()
    for name, function, *args in all_checks(card, sizes):
        group = "more checks" if function in seen else "checks"
        seen.add(function)
        run = functools.partial(lambda f, *a: Found(f(*a) or ""), function, card, sizes, *args)
        yield Step(name, group, SECONDS.get(function, 1.5), run, CONTROL not in name)


def all_checks(card: Card | StandIn, sizes: Sizes) -> Iterator[tuple[Any, ...]]:
    """(name, function, arguments behind card and sizes)."""
    for n, v in sizes.beyond_int32:
        for loss in (fused_ppl.perplexity, fused_ppl.cross_entropy):
            for options in (False, True):
                with_options = ", every option" if options else ""
                yield f"{loss.__name__}, N={n}, V={v}, bf16{with_options}", large, n, v, loss, options
    for dtype in HALF_AND_FULL:
        yield f"odd V, misaligned views, {torch.finfo(dtype).dtype}", misaligned, dtype
    yield "few rows, split over the vocabulary", split_rows
    yield "wild logits", wild
    for n, v, d in sizes.heads:
        for loss in (fused_ppl.linear_perplexity, fused_ppl.linear_cross_entropy):
            yield f"{loss.__name__}, N={n}, V={v}, D={d}, bf16", head, n, v, d, loss
    yield "compact head", compact_head
    promises = {
        "determinism": deterministic,
        "no host synchronisation": nothing_waits,
        "CUDA graph, capture and replay": graph,
        "two streams at once": two_streams,
        "two graphs on two streams": two_graphs,
    }
    for title, promise in promises.items():
        for name, make in works(card, sizes).items():
            yield f"{title}: {name}", promise, make
    yield "memory of perplexity, forward and backward", little_memory
    yield "torch.compile", compiled
    yield "a GPU that is not the current one", other_device
