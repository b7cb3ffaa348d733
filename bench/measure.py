# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: interleaved rounds over rotated inputs, and peak memory in a fresh process."""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import Inputs, Setting, make_inputs
from providers import Loss, Provider
from torch import Tensor

Run = Callable[[], object]
MODES = ("forward", "backward", "both")  # that are timed
ROTATED_BYTES = 2**30
MOST_COPIES = 64
FEWEST_ROUNDS = 5
MOST_ROUNDS = 200
DISTURBED = 0.1  # of the processors; a busier neighbour makes a time worthless
PASSES = {"forward": 1, "backward": 2, "both": 3}  # over N x V that a loss from logits must make


# --- time ----------------------------------------------------------------------------------------------------------


def seconds_of(run: Run, device: str) -> float:
    """What one call takes; what it returns is freed within."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e-3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleaved(
    prepare: dict[str, Callable[[], Run]],
    *,
    device: str = "cpu",
    rounds: int | None = None,
    budget: float = 5.0,
) -> dict[str, list[float]]:
    """Seconds of each in each round; every round runs all of them, so that a drift of the machine hits all.

    `prepare` makes the call that is timed. Two rounds warm up; without `rounds`, as many follow as fit the budget of
    seconds. Each round has an order of its own, so that nobody always follows the same neighbour.
    """
    for name in prepare:
        seconds_of(prepare[name](), device)
    once = sum(seconds_of(prepare[name](), device) for name in prepare)
    if rounds is None:
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(budget / max(once, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in prepare}
    order, generator = list(prepare), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(prepare[name](), device))
    return seconds


def copies_of(setting: Setting) -> int:
    """Inputs to go round, so that none is still in the cache when its turn comes; at least two, 1 GiB at most."""
    return max(2, min(MOST_COPIES, ROTATED_BYTES // setting.gradient_bytes))


def rotation(inputs: Inputs, copies: int) -> Iterator[Inputs]:
    return itertools.cycle([inputs, *(inputs.copy() for _ in range(copies - 1))])


def steps(mode: str, loss: Loss, turns: Iterator[Inputs]) -> Callable[[], Run]:
    """Makes the calls that are timed: the loss alone without gradients, its gradient alone, or both."""

    def prepare() -> Run:
        inputs = next(turns)
        tensors, target = inputs.tensors, inputs.target
        if mode == "forward":
            return lambda: _without_gradient(loss, tensors, target)
        if mode == "backward":
            value = loss(*tensors, target)
            return lambda: torch.autograd.grad(value, tensors)
        return lambda: torch.autograd.grad(loss(*tensors, target), tensors)

    return prepare


def _without_gradient(loss: Loss, tensors: tuple[Tensor, ...], target: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(*tensors, target)


def not_leaves(turns: Iterator[Inputs], copies: int) -> Iterator[Inputs]:
    """For who writes over the logits: of its own, destroyed by the first call. Later ones take as long if `small`."""
    own = [next(turns) for _ in range(copies)]
    return itertools.cycle([Inputs(tuple(t.clone() for t in i.copy().tensors), i.target) for i in own])


def small(loss: Loss) -> Loss:
    """With gradients so small that they are harmless as the logits of the next call, whose perplexity is V then.

    The gradient of a perplexity of 50,000 would make the perplexity of the next call inf, which takes longer.
    """
    return lambda *args: loss(*args) * 1e-6


def bare(mode: str, setting: Setting, turns: Iterator[Inputs]) -> tuple[Callable[[], Run], float]:
    """The least that anybody must do, and how many of it: a copy of the logits (two passes), or the products alone."""
    if setting.op == "logits":
        out = next(turns).tensors[0].detach().clone()
        return lambda: _copy(out, next(turns)), PASSES[mode] / 2
    n, v = setting.case.num_tokens, setting.case.num_classes
    like = next(turns).tensors[0].detach()
    gradient = torch.full((n, v), 1e-3, dtype=like.dtype, device=like.device)
    return lambda: _products(mode, next(turns), gradient), 1.0


def _copy(out: Tensor, inputs: Inputs) -> Run:
    source = inputs.tensors[0].detach()
    return lambda: out.copy_(source)


def _products(mode: str, inputs: Inputs, gradient: Tensor) -> Run:
    hidden, weight = (t.detach() for t in inputs.tensors)

    def run() -> list[Tensor]:
        forward = [torch.mm(hidden, weight.t())] if mode != "backward" else []
        backward = [torch.mm(gradient, weight), torch.mm(gradient.t(), hidden)] if mode != "forward" else []
        return forward + backward

    return run


class Others:
    """What share of the processors other programs take, the host's other guests included."""

    def __init__(self) -> None:
        self.before = self._now()

    def share(self) -> float | None:
        if self.before is None or (now := self._now()) is None:
            return None
        busy, own, wall = (after - before for after, before in zip(now, self.before, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _wait, irq, soft, stolen = map(int, stat.read_text().split()[1:9])
        ticks = user + nice + system + irq + soft + stolen
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter()


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 %."""
    ordered = sorted(seconds)
    return tuple(_at(ordered, q) for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def _at(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def paired_ratio(seconds: list[float], base: list[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def bootstrap_ratio(seconds: list[float], base: list[float], draws: int = 1000) -> tuple[float, float, float]:
    """The median of the ratios round by round, with its 95 % bootstrap interval: (low, median, high)."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[draws // 40], statistics.median(ratios), medians[-draws // 40]


# --- memory --------------------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Call it where nothing was allocated before: freed memory hides from the next measurement.

    The process is forked from one that has imported torch and done nothing, which saves seconds each time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "fused_ppl", "providers", "measure"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def peak_bytes(provider: Provider, setting: Setting, threads: int) -> int:
    """Bytes above inputs and one copy of the gradients at the highest point of the second step, in a fresh process.

    The second: what a first step leaves waiting for the next one, as a training loop does, counts. A small step before
    loads the code. Resident memory on a CPU (Linux only), the allocator's statistics on a GPU.
    """
    return int(in_fresh_process(_peak_here, provider, setting, threads))


def _peak_here(provider: Provider, setting: Setting, threads: int) -> int:
    torch.set_num_threads(threads)
    loss = provider.make(setting)
    small = replace(setting, case=replace(setting.case, num_tokens=8, num_classes=64, hidden_size=16))
    inputs, warm = make_inputs(setting), make_inputs(small)
    step = _step(loss, warm, provider.in_place)
    step()
    del step, warm
    step = _step(loss, inputs, provider.in_place)
    del inputs
    meter = _GpuMeter() if setting.device == "cuda" else ResidentMeter()
    step()
    meter.reset()
    kept = step()
    peak = meter.peak()
    del kept
    return peak - setting.gradient_bytes


def _step(loss: Loss, inputs: Inputs, in_place: bool) -> Run:
    tensors = tuple(t.clone() for t in inputs.tensors) if in_place else inputs.tensors
    return lambda: torch.autograd.grad(loss(*tensors, inputs.target), tensors)


class ResidentMeter:
    """Resident memory above that at its birth."""

    def __init__(self) -> None:
        _give_back_what_is_free()
        self.before = _status("VmRSS")

    def reset(self) -> None:
        _give_back_what_is_free()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def peak(self) -> int:
        return _status("VmHWM") - self.before


class _GpuMeter:
    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.before = torch.cuda.memory_allocated()

    def reset(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def _give_back_what_is_free() -> None:
    """Free memory that the allocator of C holds on to, as any provider's, is nobody's."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only.")
