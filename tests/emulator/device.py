# SPDX-License-Identifier: Apache-2.0
"""Puts the emulated GPU under Triton: its JIT, its compiler, ptxas and its launcher run unchanged, over CPU tensors.

`install` builds the stub of libcuda.so.1 with gcc, makes Triton load it, and registers the tensors of every launch, so
that each access can be checked against them. A launch that does what a GPU would not allow raises `Fault`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emulator.opcodes import Instruction, Row
from emulator.ptx import Parser
from emulator.ptx import Program as Parsed

HERE = Path(__file__).parent
SOURCES = ("run.c", "memory.c", "driver.c", "machine.h", "instructions.h")
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-Wall", "-fvisibility=hidden"]
FLAGS += ["-Wl,-soname,libcuda.so.1"]
SHARED_BASE = 1024  # as in machine.h
MASKED_BYTES = 64 << 20  # storages up to this size are checked to the element, larger ones to their ends


class Fault(RuntimeError):
    """The program did what a GPU forbids or leaves undefined."""


class _Constant(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_int32), ("bytes", ctypes.c_int32), ("value", ctypes.c_uint64)]


class _Program(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 256),
        ("code", ctypes.POINTER(Instruction)),
        ("length", ctypes.c_int32),
        ("constants", ctypes.POINTER(_Constant)),
        ("num_constants", ctypes.c_int32),
        ("register_bytes", ctypes.c_int32),
        ("param_offset", ctypes.c_int32 * 128),
        ("param_bytes", ctypes.c_int32 * 128),
        ("num_params", ctypes.c_int32),
        ("params_size", ctypes.c_int32),
        ("special", ctypes.c_int32 * 10),
        ("required_threads", ctypes.c_int32),
        ("registers", ctypes.c_int32),
        ("max_shared", ctypes.c_int32),
        ("hits", ctypes.POINTER(ctypes.c_uint64)),
    ]


SETTINGS = ("capability", "sms", "resident", "quantum", "shuffle", "ulps_low", "ulps_high", "check_races")
COUNTERS = ("launches", "ctas", "warp_instructions", "lane_instructions", "barriers", "shuffles", "atomics")
COUNTERS += ("divergences",)


class Settings(ctypes.Structure):
    """How the device behaves; machine.h says what each field means."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in SETTINGS),
        ("seed", ctypes.c_uint64),
        ("max_instructions", ctypes.c_int64),
    ]


class Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in COUNTERS]


def problem() -> str | None:
    """Why this machine cannot emulate, or None."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"Triton's launcher is built for Linux, and this is {platform.system()} on {platform.machine()}"
    return None if shutil.which("gcc") else "it is built by gcc, which is not installed"


def build() -> Path:
    """The folder with libcuda.so.1, in the user's cache. It is built once for each state of the sources."""
    native = ["-march=native"] if platform.machine() == "x86_64" else []  # only faster
    key = hashlib.sha256(" ".join(FLAGS + native).encode())
    key.update(Path("/proc/cpuinfo").read_text().split("\n\n")[0].partition("flags")[2].encode() if native else b"")
    for name in SOURCES:
        key.update((HERE / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fused_ppl_emulator" / key.hexdigest()[:16]
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            units = [str(HERE / name) for name in SOURCES if name.endswith(".c")]
            subprocess.run(["gcc", *FLAGS, *native, "-o", str(built), *units, "-lm"], check=True)
            built.replace(library)
    return folder


class Device:
    """The one emulated GPU of a process."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        call = self.library
        call.emu_row.restype = call.emu_fault.restype = ctypes.c_char_p
        call.emu_program.restype = ctypes.c_void_p
        call.emu_load.argtypes = [ctypes.c_void_p]
        call.emu_add_region.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_char_p]
        sizes = [ctypes.sizeof(structure) for structure in (Instruction, _Program, Settings)]
        assert [call.emu_sizes(k) for k in range(3)] == sizes, "machine.h and this file differ"
        self.settings = Settings.in_dll(call, "emu_settings")
        self.counters = Counters.in_dll(call, "emu_counters")
        self.rows = {}
        for index in range(call.emu_rows()):
            operands, widths = ctypes.c_int32(), (ctypes.c_int32 * 5)()
            name = call.emu_row(index, ctypes.byref(operands), widths).decode()
            self.rows[name] = Row(index, None if operands.value < 0 else tuple(widths)[: operands.value])
        self.programs: dict[str, tuple[int, Parsed]] = {}  # by PTX: the handle, which is an address of a Program
        self.traffic: list[tuple[int, int, int]] | None = None  # of each launch: storage, bytes loaded and stored

    def program(self, ptx: str) -> int:
        """The handle of a program."""
        if ptx not in self.programs:
            parsed = Parser(ptx, self.rows, SHARED_BASE).program
            given = _Program(name=parsed.name.encode(), length=len(parsed.code), register_bytes=parsed.register_bytes)
            given.code = (Instruction * len(parsed.code))(*parsed.code)
            given.constants = (_Constant * (len(parsed.constants) + 1))(*(_Constant(*c) for c in parsed.constants))
            given.num_constants, given.num_params = len(parsed.constants), len(parsed.params)
            for k, (offset, size) in enumerate(parsed.params):
                given.param_offset[k], given.param_bytes[k], given.params_size = offset, size, offset + size
            given.special[:] = parsed.special
            given.required_threads = parsed.required_threads
            self.programs[ptx] = (self.library.emu_program(ctypes.byref(given)), parsed)
        return self.programs[ptx][0]

    def structure(self, handle: int) -> _Program:
        """The program of a handle, in place."""
        return _Program.from_address(handle)

    @contextlib.contextmanager
    def memory(self, arguments: Iterable[Any]) -> Iterator[None]:
        """The tensors among the arguments of a launch are what it may touch."""
        storages: dict[int, tuple[torch.UntypedStorage, list[Tensor], list[str]]] = {}
        for name, tensor in _tensors(arguments):
            storage = tensor.untyped_storage()
            _, views, names = storages.setdefault(storage.data_ptr(), (storage, [], []))
            views.append(tensor)
            names.append(name)
        regions = []
        for start, (storage, views, names) in storages.items():
            if storage.nbytes():
                label = " and ".join(names)[:60].encode()
                index = self.library.emu_add_region(start, storage.nbytes(), _elements(storage, views), label)
                assert index >= 0, "a launch has too many tensors"
                regions.append((index, start))
        try:
            yield
        finally:
            for index, start in regions:
                loaded, stored = ctypes.c_uint64(), ctypes.c_uint64()
                self.library.emu_traffic(index, ctypes.byref(loaded), ctypes.byref(stored))
                if self.traffic is not None:
                    self.traffic.append((start, loaded.value, stored.value))
            self.library.emu_clear_regions()

    @contextlib.contextmanager
    def using(self, **changes: int) -> Iterator[None]:
        """Other settings for a while."""
        before = {name: getattr(self.settings, name) for name in changes}
        for name, value in changes.items():
            setattr(self.settings, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.settings, name, value)

    def explain(self, handle: int) -> str | None:
        """The fault of the last launch, with its instruction and its place in the Python source."""
        text = self.library.emu_fault().decode()
        ptx = next((ptx for ptx, (known, _) in self.programs.items() if known == handle), "")
        if found := re.search(r"ptx line (\d+)", text):
            lines = ptx.split("\n")[: int(found[1])]
            place = next((line.strip() for line in reversed(lines) if line.lstrip().startswith(".loc")), "")
            text += f"\n    {lines[-1].strip()}\n    {place}"
        return text or None

    def coverage(self) -> tuple[int, int]:
        """Instructions of all programs, and how many of them have run."""
        hits = [self.structure(handle).hits[k] for handle, p in self.programs.values() for k in range(len(p.code))]
        return len(hits), sum(1 for count in hits if count)

    def report(self) -> str:
        counts = ", ".join(f"{getattr(self.counters, name):,} {name}" for name in COUNTERS)
        total, ran = self.coverage()
        target = f"sm_{self.settings.capability}"
        return f"emulated {target}: {len(self.programs)} programs, {ran} of {total} instructions ran; {counts}"


def _tensors(arguments: Iterable[Any], prefix: str = "argument ") -> Iterator[tuple[str, Tensor]]:
    for k, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            yield f"{prefix}{k}", argument
        elif isinstance(argument, tuple | list):
            yield from _tensors(argument, f"{prefix}{k}.")


def _elements(storage: torch.UntypedStorage, views: list[Tensor]) -> bytes | None:
    """1 for each byte of a storage that is part of an element of a view; None if that would take too long."""
    if storage.nbytes() > MASKED_BYTES:
        return None
    mask = np.zeros(storage.nbytes(), dtype=np.uint8)  # numpy's: torch's default device and memory are the test's
    for view in views:
        if view.numel():
            size, start = view.itemsize, view.storage_offset() * view.itemsize
            strides = (*(stride * size for stride in view.stride()), 1)
            np.lib.stride_tricks.as_strided(mask[start:], (*view.shape, size), strides)[...] = 1
    return mask.tobytes()


def install(capability: int) -> Device:
    """Makes the emulated GPU Triton's device. Call it before a kernel is imported."""
    folder = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ.pop("TRITON_INTERPRET", None)
    device = Device(folder)
    device.settings.capability = capability

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    class Launcher(CudaLauncher):  # type: ignore[misc]  # triton is untyped
        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            # after the kernel's metadata and the hooks, which are four, come its arguments
            with device.memory(rest[4:]):
                try:
                    super().__call__(x, y, z, stream, function, *rest)
                except RuntimeError as error:
                    raise Fault(device.explain(function) or str(error)) from error

    class Driver(CudaDriver):  # type: ignore[misc]  # triton is untyped
        def __init__(self) -> None:
            super().__init__()
            self.launcher_cls = Launcher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda index: None
            self.get_current_stream = lambda index: 0
            self.get_device_capability = lambda index=0: divmod(capability, 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    active = Driver()
    loading: list[CompiledKernel] = []
    load_binary, init_handles = active.utils.load_binary, CompiledKernel._init_handles

    def load_with_ptx(*arguments: Any) -> Any:
        device.library.emu_load(device.program(loading[-1].asm["ptx"]))
        return load_binary(*arguments)

    def init_handles_noting(kernel: CompiledKernel) -> Any:
        loading.append(kernel)
        try:
            return init_handles(kernel)
        finally:
            loading.pop()

    active.utils.load_binary = load_with_ptx
    CompiledKernel._init_handles = init_handles_noting
    driver.set_active(active)
    return device
