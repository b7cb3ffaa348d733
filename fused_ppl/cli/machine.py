# SPDX-License-Identifier: Apache-2.0
"""Describes this machine: versions, devices, and the backend that a call on each device would use."""

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
    """The backend that a call on one device in one dtype would use, or the error that it would raise."""

    device: str
    dtype: str
    chosen: str | None  # None if the call would raise
    refused: dict[str, str]  # the name of each backend that cannot run here, and the reason
    error: str | None = None  # the message of the error that the call would raise

    def sentence(self) -> str:
        if self.error is not None:
            return self.error
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refused.items())
        return f"{self.chosen} ({reasons})" if reasons else str(self.chosen)


def versions() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fused_ppl": fused_ppl.__version__,
        "triton": triton_version(metadata.packages_distributions().get("triton", [])),
    }


def triton_version(providers: Sequence[str]) -> str:
    """The version of triton and the name of its distribution. Each GPU build of torch installs another one."""
    names = sorted(set(providers))
    if not names:
        return "not installed"
    found = " and ".join(f"{metadata.version(name)} from the distribution {name}" for name in names)
    if len(names) == 1:
        return found
    return f"{found}: they overwrite each other. Uninstall all of them and install torch again"


def environment() -> dict[str, str]:
    """The environment variables that change how a loss is computed and that are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def devices() -> dict[str, str]:
    """The name of every device that torch can use, with a description. The CPU comes first."""
    descriptions = {"cpu": _describe_cpu()}
    for i in range(torch.cuda.device_count()):
        descriptions[f"cuda:{i}"] = _describe_gpu(i)
    for i in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        descriptions[f"xpu:{i}"] = torch.xpu.get_device_name(i)
    if torch.backends.mps.is_available():
        descriptions["mps"] = "Apple GPU, Metal"
    return descriptions


def _describe_cpu() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {torch.get_num_threads()} threads, {capability}"


def _describe_gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        build = f"{getattr(gpu, 'gcnArchName', 'unknown architecture')}, ROCm {torch.version.hip}"
    else:
        build = f"compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}"
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {build}"


def choice(backend: str | None, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend that `Options(backend=backend)` would use, and the reasons why others cannot run."""
    refused = {name: reason for name in BACKENDS if (reason := backends.refusal(name, device, dtype)) is not None}
    chosen, message = None, None
    try:
        chosen = backends.choose(backend, device, dtype)
    except (NotImplementedError, ValueError) as error:
        message = str(error)
    return Choice(str(device), str(dtype).removeprefix("torch."), chosen, refused, message)
