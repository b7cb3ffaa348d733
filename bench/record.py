# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: rows, and the machine that they were measured on."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fused-ppl", "torch", "triton", "numpy", "liger-kernel", "cut-cross-entropy", "quack-kernels")


@dataclass(frozen=True)
class Row:
    """One provider in one setting and one mode ("forward", "backward", "both" or "memory")."""

    op: str
    case: str
    num_tokens: int
    num_classes: int
    hidden_size: int
    softcap: float | None
    dtype: str
    kind: str
    objective: str
    provider: str
    ours: bool
    mode: str
    note: str = ""  # why there is no number
    p20: float | None = None  # seconds
    median: float | None = None
    p80: float | None = None
    rounds: int = 0
    over_bare: float | None = None  # median of the ratios to the least that must be done
    over_ours: tuple[float, float, float] | None = None  # of the ratios to fused_ppl, with the 95 % interval
    peak_bytes: int | None = None  # above inputs and gradients
    value_error: float | None = None  # nats
    gradient_error: float | None = None  # relative, Frobenius
    checked_tokens: int = 0  # of which float64 said the truth
    others: float | None = None  # share of the processors that other programs took meanwhile


@dataclass
class Record:
    command: str
    machine: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def save(self, folder: Path, name: str) -> None:
        """JSON and CSV, after every comparison: beside the file and renamed, so that a killed run loses nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = {**asdict(self), "rows": [_sparse(row) for row in self.rows]}
        head = json.dumps({k: v for k, v in whole.items() if k != "rows"}, indent=1)
        lines = ",\n".join("  " + json.dumps(row) for row in whole["rows"])
        _replace(folder / f"{name}.json", f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
        partial = folder / f"{name}.csv.partial"
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        os.replace(partial, folder / f"{name}.csv")


def load(path: Path) -> Record:
    whole = json.loads(path.read_text())
    rows = [Row(**{**r, "over_ours": tuple(r["over_ours"]) if r.get("over_ours") else None}) for r in whole["rows"]]
    return Record(whole["command"], whole["machine"], whole["settings"], rows)


def _sparse(row: Row) -> dict[str, Any]:
    """Without what says nothing, numbers to six digits."""
    short = {k: v for k, v in asdict(row).items() if v not in (None, "", 0) or (k == "peak_bytes" and v == 0)}
    for name, value in short.items():
        if isinstance(value, float):
            short[name] = float(f"{value:.6g}")
        elif isinstance(value, tuple):
            short[name] = [float(f"{v:.6g}") for v in value]
    return {**short, "softcap": row.softcap, "ours": row.ours}


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a record needs to be worth quoting: device, driver, threads, versions, commit, date."""
    found: dict[str, Any] = {
        "processor": _from_file("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_products": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "last_level_cache": _cache(),
        "memory": _from_file("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory": torch.cuda.get_device_properties(0).total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return found


def commit() -> str:
    """Of the checkout that this file lies in; "+" where tracked files differ from it."""
    folder = str(Path(__file__).parent)
    name = _output("git", "-C", folder, "rev-parse", "--short=10", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return (name or "unknown") + ("+" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _from_file(path: str, key: str) -> str | None:
    if not Path(path).exists():
        return None
    lines = (line.split(":", 1) for line in Path(path).read_text().splitlines() if line.startswith(key))
    return next((value.strip() for _, value in lines), None)


def _cache() -> str | None:
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text().strip() if sizes else None
