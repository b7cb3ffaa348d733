# SPDX-License-Identifier: Apache-2.0
"""The measurements of a run: steps, validations and memory. Also the machine and the versions of libraries."""

from __future__ import annotations

import math
import platform
import threading
from dataclasses import dataclass, field
from typing import Any

import psutil
import tokenizers
import torch

import fused_ppl


@dataclass
class Run:
    """One training run with one loss. It records perplexities for every loss, so that runs can be compared."""

    loss: str
    tokens_per_step: int
    steps: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    memory_peak: int = 0
    finished: bool = False

    @property
    def perplexity(self) -> float:
        """The perplexity of the last training step."""
        return self.steps[-1]["perplexity"]

    def add_step(self, *, loss: float, gradient_norm: float, seconds: float) -> None:
        tokens = (len(self.steps) + 1) * self.tokens_per_step
        perplexity = loss if self.loss == "perplexity" else torch.tensor(loss).exp().item()
        if not math.isfinite(perplexity + gradient_norm):
            step = len(self.steps) + 1
            raise ArithmeticError(
                f"The perplexity and the gradient must be finite; step {step} got {perplexity} and {gradient_norm}"
            )
        record = {"tokens": tokens, "loss": loss, "perplexity": perplexity}
        self.steps.append({**record, "gradient_norm": gradient_norm, "seconds": seconds})

    def add_validation(self, metric: fused_ppl.Perplexity, bytes_per_token: float) -> None:
        bits = float(metric.bits_per_token)
        point: dict[str, float] = {"step": len(self.steps), "tokens": len(self.steps) * self.tokens_per_step}
        point |= {"perplexity": float(metric.compute()), "bits_per_token": bits}
        self.validation.append(point | {"bits_per_byte": bits / bytes_per_token})

    def summary(self) -> dict[str, Any]:
        """Return the numbers of the table. The speed leaves out the first step, which includes start-up costs."""
        timed = self.steps[1:] or self.steps
        seconds = sum(step["seconds"] for step in timed)
        last = self.validation[-1] if self.validation else {}
        return {
            "finished": self.finished,
            "steps": len(self.steps),
            "tokens": len(self.steps) * self.tokens_per_step,
            "train_seconds": sum(step["seconds"] for step in self.steps),
            "tokens_per_second": len(timed) * self.tokens_per_step / seconds if seconds else None,
            "validation_perplexity": last.get("perplexity"),
            "bits_per_token": last.get("bits_per_token"),
            "bits_per_byte": last.get("bits_per_byte"),
            "memory_peak_mb": self.memory_peak / 2**20,
        }


class PeakMemory:
    """Measures the peak memory of a `with` block: allocated memory on a GPU, resident memory on a CPU.

    Not every system can reset the peak of the resident memory, so a thread reads the current value repeatedly.
    """

    def __init__(self, run: Run, device: str, interval: float = 0.005) -> None:
        self.run, self.device, self.interval = run, device, interval
        self.cuda = device.startswith("cuda")
        self.process, self.stop = psutil.Process(), threading.Event()
        self.thread = threading.Thread(target=self._sample_repeatedly, daemon=True)

    def __enter__(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self._sample()

    def _sample_repeatedly(self) -> None:
        while not self.stop.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        used = torch.cuda.max_memory_allocated(self.device) if self.cuda else self.process.memory_info().rss
        self.run.memory_peak = max(self.run.memory_peak, used)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "fused_ppl": fused_ppl.__version__,
    }


def machine(device: str) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability() + " " + (platform.processor() or platform.machine()),
        "cores": psutil.cpu_count(logical=True),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }
