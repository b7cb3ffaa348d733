# SPDX-License-Identifier: Apache-2.0
"""What gpu_acceptance.py times: our kernels against the roofline, and our losses against the peers.

A roofline is the bytes that must move over the bandwidth of the card. Every loss is first asked for its value on the
same inputs, and one that is wrong gets no time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gpu_truth
import torch
import torch.nn.functional as F
from gpu_checks import Sizes, head_inputs
from gpu_device import Card, StandIn
from gpu_truth import TRITON, fill_logits, head_options, make_target
from roofline import CARDS as DATA_SHEETS
from torch import Tensor

import fused_ppl
from fused_ppl import backends
from fused_ppl.spec import LossSpec

# words of a card's name -> bytes a second, from its data sheet; the first that fits
CARDS = (
    (("H100", "NVL"), 3.9e12),
    (("H100", "PCIe"), 2.0e12),
    (("A100", "40GB"), 1.555e12),
    (("A100", "PCIe", "80GB"), 1.935e12),
    *(((name.split()[0],), card.bandwidth) for name, card in DATA_SHEETS.items()),
)
UNKNOWN = "unknown card: share of measured copy bandwidth"
KERNEL_PASSES = {"nll_forward": 1, "nll_backward": 2, "nll_forward_backward": 2}  # over N * V; reads and writes
DISTANCE = 0.02  # of a peer's perplexity from ours; some sum in bf16


@dataclass(frozen=True)
class Timing:
    group: str  # "kernels", "logits" or "head"
    provider: str
    mode: str
    shape: tuple[int, ...]
    note: str = ""  # why there is no time
    milliseconds: tuple[float, float, float] | None = None  # 20 %, 50 %, 80 %
    bytes: int = 0  # that must move
    flops: int = 0
    share: float | None = None  # of the roofline: least possible time over the median


@dataclass(frozen=True)
class Roofline:
    bandwidth: float  # bytes a second
    source: str

    def share(self, moved: int, milliseconds: float) -> float:
        return moved / self.bandwidth / (milliseconds * 1e-3)


def roofline(card: Card | StandIn) -> Roofline:
    """Of the card's data sheet, or what a copy reaches on it."""
    for words, bandwidth in CARDS:
        if all(word.lower() in card.name.lower() for word in words):
            return Roofline(bandwidth, f"data sheet of {' '.join(words)}: {bandwidth / 1e12:.2f} TB/s")
    measured = card.copy_bandwidth()
    return Roofline(measured, f"{UNKNOWN}, {measured / 1e12:.3f} TB/s")


# --- the kernels by themselves -----------------------------------------------------------------------------------


def row_functions(logits: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    """Those of backends/triton_rows.py, which allocate and launch, ready to be called again and again."""
    backend, spec = backends.load("triton"), LossSpec()
    rows, out = logits.unsqueeze(0), logits.clone()
    at_target = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1).float()
    stats, totals = backend.nll_forward(rows, target, spec, None, None, None, None)
    of_s = totals.perplexity_factor.float().expand(len(target))
    saved = (rows, target, stats.lse, stats.nll, of_s, None, spec, None, None)
    return {
        "nll_forward": lambda: backend.nll_forward(rows, target, spec, None, None, None, None),
        "nll_backward": lambda: backend.nll_backward(*saved, torch.empty_like(rows), None),
        # over its own result: its time does not depend on what the logits are
        "nll_forward_backward": lambda: backend.nll_forward_backward(
            out, at_target, target, spec, None, None, 1.0, None
        ),
    }


def kernel_timings(card: Card | StandIn, sizes: Sizes, limit: Roofline) -> Iterator[Timing]:
    for n, v in sizes.timed:
        target = make_target(n, v, card.device, 1)
        logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0)
        for name, run in row_functions(logits, target).items():
            times, moved = card.milliseconds(run), KERNEL_PASSES[name] * n * v * logits.itemsize
            yield Timing("kernels", name, "", (n, v), "", times, moved, 0, limit.share(moved, times[1]))


# --- whole losses, ours and the peers' ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A perplexity of somebody; `package` has to be installed for it."""

    name: str
    package: str | None
    make: Callable[[], Callable[..., Tensor]]

    def missing(self) -> str | None:
        if self.package is None or importlib.util.find_spec(self.package.split()[0]) is not None:
            return None
        return f"not installed (pip install {self.package.split()[1]})"


def eager(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float(), target).exp()


def eager_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target).exp()


def _exp_of(module: str, name: str) -> Callable[..., Tensor]:
    loss = getattr(importlib.import_module(module), name)
    return lambda *args: loss(*args).exp()


def _torch_chunked() -> Callable[..., Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()  # torch >= 2.13
    return lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options).exp()


def logits_peers() -> list[Peer]:
    ours = functools.partial(fused_ppl.perplexity, options=TRITON)
    return [
        Peer("fused_ppl", None, lambda: ours),
        Peer("torch eager", None, lambda: eager),
        Peer("torch.compile", None, lambda: torch.compile(eager)),
        # writes its gradient over the logits, so that the second call sees others, which take it as long
        Peer("Liger", "liger_kernel liger-kernel", lambda: _exp_of("liger_kernel.transformers.functional", "liger_cross_entropy")),  # noqa: E501
        Peer("quack", "quack quack-kernels", lambda: _exp_of("quack.cross_entropy", "cross_entropy")),
    ]  # fmt: skip


def head_peers() -> list[Peer]:
    ours = functools.partial(fused_ppl.linear_perplexity, options=head_options())
    return [
        Peer("fused_ppl", None, lambda: ours),
        Peer("torch eager", None, lambda: eager_head),
        Peer("torch.compile", None, lambda: torch.compile(eager_head)),
        Peer("F.linear_cross_entropy, chunked", None, _torch_chunked),
        Peer("Liger", "liger_kernel liger-kernel", lambda: _exp_of("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")),  # noqa: E501
        Peer("cut-cross-entropy", "cut_cross_entropy cut-cross-entropy", lambda: _exp_of("cut_cross_entropy", "linear_cross_entropy")),  # noqa: E501
        Peer("quack", "quack quack-kernels", lambda: _exp_of("quack.linear_cross_entropy", "chunked_linear_cross_entropy")),  # noqa: E501
    ]  # fmt: skip


def _time(
    card: Card | StandIn,
    peer: Peer,
    fresh: Callable[[], list[Tensor]],  # leaves, of which a peer may destroy the values
    target: Tensor,
    truth: float,
) -> dict[str, tuple[float, float, float]] | str:
    """Times of the modes, or why there are none. A peer's failure is its own: it is stated, and the rest is timed."""
    if (why := peer.missing()) is not None:
        return why
    if card.stand_in and peer.name == "torch.compile":
        return "not run in a dry run: it compiles for minutes"
    try:
        loss, leaves = peer.make(), fresh()
        value = float(loss(*leaves, target).detach())
        if not abs(value / truth - 1) <= DISTANCE:
            return f"no time for a wrong value: {value:.6g}, should be {truth:.6g}"

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(*leaves, target)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(*leaves, target), leaves)

        return {"forward": card.milliseconds(forward), "forward + backward": card.milliseconds(both)}
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def logits_timings(card: Card | StandIn, sizes: Sizes, limit: Roofline) -> Iterator[Timing]:
    for n, v in sizes.timed:
        target = make_target(n, v, card.device, 1)
        logits = fill_logits(torch.empty(n, v, dtype=torch.bfloat16, device=card.device), target, 0)
        truth = _perplexity_in_chunks(lambda rows, x=logits: x[rows], target, sizes.chunk)
        for peer in logits_peers():
            found = _time(card, peer, lambda x=logits: [x.clone().requires_grad_()], target, truth)
            if isinstance(found, str):
                yield Timing("logits", peer.name, "", (n, v), found)
                continue
            for (mode, times), passes in zip(found.items(), (1, 3), strict=True):
                moved = passes * n * v * logits.itemsize
                yield Timing("logits", peer.name, mode, (n, v), "", times, moved, 0, limit.share(moved, times[1]))


def head_timings(card: Card | StandIn, sizes: Sizes) -> Iterator[Timing]:
    """The roofline of the head is the matrix products alone, timed beside it: one forward, three with gradients."""
    n, v, d = sizes.timed_head
    hidden, weight, target = head_inputs(card, n, v, d)
    truth = _perplexity_in_chunks(lambda rows: hidden[rows] @ weight.t(), target, sizes.chunk)
    bare = _bare_products(card, hidden, weight)
    flops = dict(zip(bare, (2 * n * v * d, 6 * n * v * d), strict=True))
    for mode, times in bare.items():
        yield Timing("head", "the matrix products alone", mode, (n, v, d), "", times, 0, flops[mode], 1.0)
    for peer in head_peers():
        found = _time(card, peer, lambda: [t.clone().requires_grad_() for t in (hidden, weight)], target, truth)
        if isinstance(found, str):
            yield Timing("head", peer.name, "", (n, v, d), found)
            continue
        for mode, times in found.items():
            share = bare[mode][1] / times[1]
            yield Timing("head", peer.name, mode, (n, v, d), "", times, 0, flops[mode], share)


def _bare_products(card: Card | StandIn, hidden: Tensor, weight: Tensor) -> dict[str, tuple[float, float, float]]:
    gradient = hidden @ weight.t()

    def three() -> tuple[Tensor, ...]:
        return hidden @ weight.t(), gradient @ weight, gradient.t() @ hidden

    return {"forward": card.milliseconds(lambda: hidden @ weight.t()), "forward + backward": card.milliseconds(three)}


def _perplexity_in_chunks(logits: Callable[[slice], Tensor], target: Tensor, chunk: int) -> float:
    parts = [
        F.cross_entropy(logits(rows).double(), target[rows], reduction="sum")
        for rows in gpu_truth.chunks(len(target), chunk)
    ]
    return float((sum(parts) / (target != gpu_truth.IGNORED).sum()).exp())
