# SPDX-License-Identifier: Apache-2.0
"""The device that gpu_acceptance.py runs on: a GPU, or a CPU that stands in for one so that the plumbing is run.

Both have the same methods. The stand-in computes the same results one after another; what it cannot show (that nothing
waits, that memory stays small) it raises `Skipped` for.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]


class Skipped(Exception):
    """What is asked for cannot be shown here, and why."""


class Card:
    """The current GPU."""

    stand_in = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": self.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(self.device)),
            "runtime": torch.version.cuda or torch.version.hip,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, run: Run) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """A CUDA graph of `run`, as a function that replays it, and the tensors that a replay writes."""
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return graph.replay, outputs

    def at_once(self, functions: Sequence[Callable[[], Any]], rounds: int) -> list[list[Any]]:
        """What each function returns in each round, every function on a stream of its own."""
        self.synchronize()
        streams = [torch.cuda.Stream() for _ in functions]
        results: list[list[Any]] = [[] for _ in functions]
        for _ in range(rounds):
            for function, stream, found in zip(functions, streams, results, strict=True):
                with torch.cuda.stream(stream):
                    found.append(function())
        self.synchronize()
        return results

    @contextlib.contextmanager
    def nothing_waits(self) -> Iterator[None]:
        """Whatever makes the host wait for the device raises."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most bytes alive at once during a call, beyond those alive before it."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        kept = run()
        self.synchronize()
        del kept
        return torch.cuda.max_memory_allocated(self.device) - before

    def milliseconds(self, run: Callable[[], object]) -> tuple[float, float, float]:
        """20 %, 50 % and 80 % of the times of a call; L2 is overwritten before each."""
        import triton.testing

        low, middle, high = triton.testing.do_bench(run, warmup=50, rep=300, quantiles=[0.2, 0.5, 0.8])
        return low, middle, high

    def graph_milliseconds(self, run: Callable[[], object]) -> float:
        """The median time of a call inside a CUDA graph, so that the host takes no part in it. L2 stays warm."""
        import triton.testing

        with torch.cuda.stream(torch.cuda.Stream()):
            return float(triton.testing.do_bench_cudagraph(run, rep=20, return_mode="median"))

    def host_microseconds(self, run: Callable[[], object]) -> float:
        """The median time that the host needs to put a call on the stream, while the device waits for nothing."""
        times = []
        for _ in range(5):
            run()
        for _ in range(30):
            self.synchronize()
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
        self.synchronize()
        return statistics.median(times)

    def is_healthy(self) -> bool:
        """Whether the device still computes. After a sticky CUDA error no call of this process does."""
        try:
            self.synchronize()
            return float(torch.ones(2, device=self.device).sum()) == 2
        except Exception:  # whatever a broken context raises
            return False

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy of 1 GiB."""
        source = torch.empty(2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / (self.milliseconds(lambda: target.copy_(source))[1] * 1e-3)

    def release(self) -> None:
        torch.cuda.empty_cache()


class StandIn:
    """A CPU, with Triton's interpreter."""

    stand_in = True
    device = torch.device("cpu")
    name = "no GPU (dry run)"

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "processor": platform.machine()}

    def synchronize(self) -> None:
        pass

    def capture(self, run: Run) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        outputs = tuple(t.clone() for t in run())

        def replay() -> None:
            for output, fresh in zip(outputs, run(), strict=True):
                output.copy_(fresh)

        return replay, outputs

    def at_once(self, functions: Sequence[Callable[[], Any]], rounds: int) -> list[list[Any]]:
        results: list[list[Any]] = [[] for _ in functions]
        for _ in range(rounds):
            for function, found in zip(functions, results, strict=True):
                found.append(function())
        return results

    @contextlib.contextmanager
    def nothing_waits(self) -> Iterator[None]:
        raise Skipped("only a GPU can be waited for")
        yield

    def peak_bytes(self, run: Callable[[], object]) -> int:
        raise Skipped("the memory of a GPU is not there to be counted")

    def milliseconds(self, run: Callable[[], object]) -> tuple[float, float, float]:
        start = time.perf_counter()
        run()
        once = (time.perf_counter() - start) * 1e3
        return once, once, once

    def graph_milliseconds(self, run: Callable[[], object]) -> float:
        return self.milliseconds(run)[1]

    def host_microseconds(self, run: Callable[[], object]) -> float:
        return self.milliseconds(run)[1] * 1e3

    def is_healthy(self) -> bool:
        return True

    def copy_bandwidth(self) -> float:
        source = torch.zeros(2**20)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (self.milliseconds(lambda: target.copy_(source))[1] * 1e-3)

    def release(self) -> None:
        pass
