# SPDX-License-Identifier: Apache-2.0
"""What this machine has: versions, devices, and which backend a call on each device would use."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import fused_ppl
from fused_ppl import backends
from fused_ppl.spec import BACKENDS

ENVIRONMENT = ("FUSED_PPL_BACKEND", "FUSED_PPL_DEBUG", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Choice:
    """What a call on one device in one dtype would do."""

    device: str
    dtype: str
    chosen: str | None  # None where the call would raise
    refused: dict[str, str]  # backend that cannot run here -> why
    error: str | None = None  # what the call would raise

    def sentence(self) -> str:
        if self.error is not None:
            return self.error
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.refused.items())
        return f"{self.chosen} ({why})" if why else str(self.chosen)


def versions() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fused_ppl": fused_ppl.__version__,
        "triton": triton_version(metadata.packages_distributions().get("triton", [])),
    }


def triton_version(providers: Sequence[str]) -> str:
    """The version of triton with the distribution that brought it: each GPU build of torch has its own."""
    names = sorted(set(providers))
    if not names:
        return "not installed"
    found = " and ".join(f"{metadata.version(name)} from the distribution {name}" for name in names)
    if len(names) == 1:
        return found
    return f"{found}: they overwrite each other. Uninstall all of them and install torch again"


def environment() -> dict[str, str]:
    """The variables that change what a call does, where they are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def devices() -> dict[str, str]:
    """Every device that torch can use, with a description; the CPU first."""
    found = {"cpu": _describe_cpu()}
    for i in range(torch.cuda.device_count()):
        found[f"cuda:{i}"] = _describe_card(i)
    for i in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        found[f"xpu:{i}"] = torch.xpu.get_device_name(i)
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU, Metal"
    return found


def _describe_cpu() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {torch.get_num_threads()} threads, {capability}"


def _describe_card(index: int) -> str:
    card = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        built = f"{getattr(card, 'gcnArchName', 'unknown architecture')}, ROCm {torch.version.hip}"
    else:
        built = f"compute capability {card.major}.{card.minor}, CUDA {torch.version.cuda}"
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {built}"


def choice(backend: str | None, device: torch.device, dtype: torch.dtype) -> Choice:
    """What `Options(backend=backend)` would run here, and why not something else."""
    refused = {name: reason for name in BACKENDS if (reason := backends.refusal(name, device, dtype)) is not None}
    place = (str(device), str(dtype).removeprefix("torch."))
    try:
        return Choice(*place, backends.choose(backend, device, dtype), refused)
    except (NotImplementedError, ValueError) as error:
        return Choice(*place, None, refused, str(error))
