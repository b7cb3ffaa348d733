# SPDX-License-Identifier: Apache-2.0
"""The names and operands of PTX instructions, in the form of the table in instructions.h."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import NamedTuple

SPECIAL = ["%tid.x", "%ntid.x", *(f"%{size}.{axis}" for size in ("ctaid", "nctaid") for axis in "xyz")]
SPECIAL += ["%laneid", "%warpid"]
ATOMICS = ["add.u", "add.f", "exch", "max", "min", "cas"]
REDUCTIONS = ["add", "min.s", "max.s", "min.u", "max.u", "and", "or", "xor", "min.f", "max.f", "min.NaN.f", "max.NaN.f"]
SIGN_FREE = {"add", "sub", "mul", "mad", "and", "or", "xor", "not", "neg", "shl", "mov", "selp"}
UNSIGNED_ORDER = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
PREDICATE = 0  # the width of an operand that is one
MASK32, MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


class Unsupported(Exception):
    """The emulator does not know this PTX."""


class Instruction(ctypes.Structure):
    """As in machine.h."""

    _fields_ = [
        ("op", ctypes.c_int32),
        ("guard", ctypes.c_int32),
        ("negated", ctypes.c_int32),
        ("variant", ctypes.c_int32),
        ("d", ctypes.c_int32 * 8),
        ("s", ctypes.c_int32 * 10),
        ("immediate", ctypes.c_int64),
        ("bytes", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("poison", ctypes.c_int32),
        ("line", ctypes.c_int32),
    ]


class Row(NamedTuple):
    """A row of the table in instructions.h."""

    index: int
    widths: tuple[int, ...] | None  # of destination and sources; None if the instruction is written by hand


@functools.cache
def width_of(kind: str) -> int:
    """Bytes of a lane's register: 8, 4, or 0 for a predicate. 16 bits and fewer take 4."""
    return PREDICATE if kind == "pred" else 8 if kind == "f32x2" or kind.endswith("64") else 4


@functools.cache
def bytes_of(kind: str) -> int:
    return int(re.sub(r"\D*(\d+).*", r"\1", kind)) // 8


def operands_of(text: str) -> list[str]:
    """Splits at the commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def elements_of(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


@functools.cache
def constant(text: str) -> int | None:
    """The bits of a literal, or None if it is none."""
    if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
        return int(found[1] or found[2], 16)
    return int(text.rstrip("U"), 0) if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text) else None


@functools.cache
def canonical(opcode: str, num_sources: int) -> str:
    """PTX's name of an arithmetic instruction in the form of the table."""
    op, *rest = opcode.split(".")
    kind = rest[-1]
    if op == "cvt":
        to, of = [m for m in rest if re.fullmatch(r"[usbf]\d+|f16x2|bf16|bf16x2", m)]
        if to[0] in "us" and of[0] in "us":
            to = "b" + to[1:]
        flags = [m for m in rest if m in ("rn", "rni", "rzi", "rmi", "rpi", "ftz")]
        flags = [f for f in flags if f[0] == "r"] + [f for f in flags if f == "ftz"]
        return "_".join(["cvt", *flags, to, of])
    rest = [m for m in rest if m not in ("rn", "lo")]
    if op == "setp":
        rest[0] = UNSIGNED_ORDER.get(rest[0], rest[0])
        rest[-1] = re.sub("^b", "u", kind)
    elif op == "shr":
        rest[-1] = re.sub("^b", "u", kind)
    elif kind[0] in "us" and op in SIGN_FREE and not {"wide", "hi"} & {*rest}:
        rest[-1] = "b" + kind[1:]
    elif op in ("mov", "selp"):
        rest[-1] = re.sub("^f", "b", kind)
    if op in ("min", "max") and num_sources == 3:
        op += "3"
    return "_".join([op, *rest])
