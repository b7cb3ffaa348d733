# SPDX-License-Identifier: Apache-2.0
"""Compiles a launch ahead of time, for a GPU that is not there, and reads the machine code.

What a launch would compile is captured from the launcher itself. Static numbers only; nothing here is a time.
budgets.py holds the limits, static.py the kernels to them and prints the table.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


def links_for_amd() -> bool:
    """False where Triton, before 3.5, looks for the linker of ROCm and the machine has none."""
    from triton.backends.amd.compiler import HIPBackend

    find = getattr(HIPBackend, "path_to_rocm_lld", None)
    try:
        return find is None or bool(find())
    except Exception:
        return False


if not links_for_amd():
    TARGETS = {name: target for name, target in TARGETS.items() if target.backend != "hip"}
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint32: "u32"}
_EXP = ("MUFU.EX2", "v_exp_f32")
_MUFU = ("MUFU", "v_exp_f", "v_log_f", "v_rcp_f", "v_sqrt_f", "v_rsq_f")
_LOADS = ("LDG", "global_load", "buffer_load")
_STORES = ("STG", "global_store", "buffer_store")
_LOCAL = ("LDL", "STL", "scratch_")
_BARRIERS = ("BAR", "SHFL", "s_barrier", "ds_")


@dataclass(frozen=True)
class Loop:
    """An innermost loop over logits."""

    instructions: int
    exps: int  # exponentials: every logit takes one, or one and a few for a running maximum
    mufu: int  # special-function instructions of any kind
    loads: tuple[str, ...]
    stores: tuple[str, ...]
    barriers: int
    local: int

    def per_logit(self, itemsize: int) -> float:
        return self.instructions / self.logits(itemsize)

    def logits(self, itemsize: int) -> int:
        """Logits a thread handles in an iteration, by the bytes of its widest loads; class weights come in others."""
        widths = [access_bytes(op) for op in self.loads]
        return sum(w for w in widths if w == max(widths)) // itemsize


@dataclass(frozen=True)
class Report:
    registers: int
    stack: int  # bytes
    shared: int  # bytes
    spills: int  # local-memory instructions of the whole program
    instructions: int
    loops: tuple[Loop, ...]  # innermost, with an exponential, in program order
    num_warps: int = 0

    @property
    def passes(self) -> dict[str, Loop]:
        """The hot loops: the first that only reads, before any that redoes its row, and the first that writes most at
        once, not that of rows with the largest of numbers."""
        most = max((len(loop.stores) for loop in self.loops), default=0)
        hot = [loop for loop in self.loops if len(loop.stores) in (0, most)]
        loops = {"gradient" if loop.stores else "sum": loop for loop in reversed(hot)}
        return {name: loops[name] for name in ("sum", "gradient") if name in loops}


def access_bytes(opcode: str) -> int:
    """Width of a global load or store: LDG.E.128 and global_load_dwordx4 are 16."""
    if opcode.startswith(("LDG", "STG")):
        bits = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", opcode)
        return int(bits[1]) // 8 if bits else 4
    for name, width in (
        ("dwordx4", 16),
        ("dwordx3", 12),
        ("dwordx2", 8),
        ("dword", 4),
        ("short", 2),
        ("ushort", 2),
        ("b128", 16),
    ):
        if name in opcode:
            return width
    return 1


def capture(kernel: Any, launch: Callable[[], object]) -> dict[str, Any]:
    """The keyword arguments of the one launch of `kernel` inside `launch()`; nothing runs."""
    calls: list[dict[str, Any]] = []
    kernel.run = lambda *args, grid, warmup, **kwargs: calls.append(
        {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    )
    try:
        launch()
    finally:
        del kernel.run
    (call,) = calls
    return call


def source(kernel: Any, kwargs: dict[str, Any]) -> ASTSource:
    """What the JIT would compile for a captured launch: integers of value 1 as constants, multiples of 16 declared,
    tensors taken as aligned, unless the kernel says do_not_specialize."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, path: tuple[int, ...], param: Any) -> Any:
        if isinstance(value, tuple):
            types = [type_of(v, (*path, i), param) for i, v in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        free = not (param.do_not_specialize or isinstance(value, float))
        if param.is_constexpr or value is None or (free and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        aligned = isinstance(value, torch.Tensor) and not param.do_not_specialize_on_alignment
        if free and (aligned or (isinstance(value, int) and value % 16 == 0)):
            attrs[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i64" if abs(value) >= 2**31 else "i32"

    for i, param in enumerate(kernel.params):
        signature[param.name] = type_of(kwargs.get(param.name), (i,), param)
    return ASTSource(kernel, signature, constexprs=constants, attrs=attrs)


def compile_call(kernel: Any, kwargs: dict[str, Any], target: GPUTarget) -> Any:
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")}
    return triton.compile(source(kernel, kwargs), target=target, options=options)


def read(kernel: Any) -> Report:
    """Registers, spills and loops of a compiled kernel."""
    found = _read_gcn(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _read_sass(*disassemble(kernel.asm["cubin"]))
    # what is asked for at launch does not stand in the code
    return dataclasses.replace(found, shared=kernel.metadata.shared, num_warps=kernel.metadata.num_warps)


def disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (["nvdisasm", "-c"], ["cuobjdump", "--dump-resource-usage"])
        texts = [
            subprocess.run(
                [os.path.join(TOOLS, tool), *flags, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, *flags in commands
        ]
    return texts[0], texts[1]


def _read_sass(text: str, usage: str) -> Report:
    numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    lines = re.findall(r"^\s*(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([^;\n]*);", text, re.M)
    count, loops = _loops(lines, r"BRA.*\((\.L_x_\d+)\)")
    return Report(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], numbers["SHARED"], *count, loops)


def _read_gcn(text: str) -> Report:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    lines = re.findall(r"^(\.LBB\d+_\d+):|^\t([a-z][a-z0-9]*_[^\n;]*)", text, re.M)
    count, loops = _loops(lines, r"s_cbranch\w*\s+(\.LBB\d+_\d+)")
    stack = number("private_segment_fixed_size") + number("vgpr_spill_count")
    return Report(number("vgpr_count"), stack, number("group_segment_fixed_size"), *count, loops)


def _loops(lines: list[tuple[str, str]], branch: str) -> tuple[tuple[int, int], tuple[Loop, ...]]:
    """(local-memory instructions, instructions), and the innermost loops with an exponential: backward branches."""
    code: list[str] = []
    labels, spans = {}, []
    for label, instruction in lines:
        if label:
            labels[label] = len(code)
            continue
        code.append(instruction)
        target = re.search(branch, instruction)
        if target and target[1] in labels:
            spans.append((labels[target[1]], len(code)))
    opcodes = [instruction.split()[0] for instruction in code]
    innermost = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    bodies = [opcodes[a:b] for a, b in sorted(innermost)]

    def starting(body: list[str], prefixes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(op for op in body if op.startswith(prefixes))

    loops = tuple(
        Loop(
            instructions=len(body),
            exps=len(starting(body, _EXP)),
            mufu=len(starting(body, _MUFU)),
            loads=starting(body, _LOADS),
            stores=starting(body, _STORES),
            barriers=len(starting(body, _BARRIERS)),
            local=len(starting(body, _LOCAL)),
        )
        for body in bodies
        if starting(body, _EXP) and starting(body, _LOADS)
    )
    return (len(starting(opcodes, _LOCAL)), len(opcodes)), loops
