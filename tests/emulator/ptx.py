# SPDX-License-Identifier: Apache-2.0
"""Reads PTX, the text that Triton compiles a kernel to, into instructions of the emulator.

What an arithmetic instruction does is known to the table in instructions.h alone; this file brings its name into the
table's form and gives each operand a place among the registers of a warp. An instruction that is not known raises
`Unsupported` here, before anything runs.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass, field

from emulator.opcodes import (
    ATOMICS,
    MASK32,
    MASK64,
    PREDICATE,
    REDUCTIONS,
    SPECIAL,
    Instruction,
    Row,
    Unsupported,
    bytes_of,
    canonical,
    constant,
    elements_of,
    operands_of,
    width_of,
)


@dataclass
class Program:
    """What a kernel is to the emulator."""

    name: str = ""
    code: list[Instruction] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # of each instruction
    constants: list[tuple[int, int, int]] = field(default_factory=list)  # offset, width, value
    params: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes
    register_bytes: int = 0
    required_threads: int = 0
    special: list[int] = field(default_factory=list)


class Parser:
    """Reads the one kernel of a PTX module. `rows` is the table of instructions.h by name."""

    def __init__(self, ptx: str, rows: dict[str, Row], shared_base: int) -> None:
        self.rows, self.program = rows, Program()
        self.registers: dict[str, tuple[int, int]] = {}  # offset and width
        self.families: list[tuple[str, int]] = []  # %r<100>: its prefix and width
        self.constants: dict[tuple[int, int], int] = {}
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[int, str]] = []
        self.scopes: list[dict[str, str]] = []
        self.symbols: dict[str, int] = {}
        self.line = 0
        self.statement = ""
        self.guard = (-1, 0)
        self.text = "ret"
        lines = [re.sub(r"//.*", "", line) for line in ptx.split("\n")]
        text = "\n".join("" if line.lstrip().startswith((".loc", ".file")) else line for line in lines)
        for name, size in re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
            if size:
                raise Unsupported("static shared memory")
            self.symbols[name] = shared_base
        self._header(text)
        self._body(text)
        for index, label in self.branches:
            self.program.code[index].immediate = self.labels[label]
        self.guard = (-1, 0)
        self._emit("ret")
        self._mark_poison()
        self.program.constants = [(offset, width, value) for (value, width), offset in self.constants.items()]
        self.program.special = [self.registers.get(name, (-1, 0))[0] for name in SPECIAL]

    def _header(self, text: str) -> None:
        entries = re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.S)
        if len(entries) != 1 or re.search(r"\.func\b", text):
            raise Unsupported("other than one entry, or functions")
        self.program.name, params, directives = entries[0]
        self.param_offsets: dict[str, int] = {}
        offset = 0
        for param in operands_of(params):
            found = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+.*?([\w$]+)(?:\[(\d+)\])?", param, re.S)
            if found is None:
                raise Unsupported(f"parameter {param}")
            element = bytes_of(found[2])
            offset = -(-offset // int(found[1] or element)) * int(found[1] or element)
            self.param_offsets[found[3]] = offset
            self.program.params.append((offset, element * int(found[4] or 1)))
            offset += element * int(found[4] or 1)
        threads = re.search(r"\.reqntid\s+(\d+)", directives)
        self.program.required_threads = int(threads[1]) if threads else 0

    def _body(self, text: str) -> None:
        start = text.index("{", text.index(".entry")) + 1
        for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[\w$]+?)<\d+>", text):
            self.families.append((prefix, width_of(kind)))
        self.families.sort(key=lambda family: -len(family[0]))
        line, depth = 1 + text.count("\n", 0, start), 1
        # statements end with ; and blocks are not statements, but braces also hold vectors
        for part in re.split(r"(;|\n)", text[start:]):
            if part == "\n":
                line += 1
                self.statement += " "
            elif part == ";":
                self._statement(" ".join(self.statement.split()))
                self.statement = ""
            else:
                if part.strip() and not self.statement.strip():
                    self.line = line
                depth += part.count("{") - part.count("}")
                self.statement += part
                if depth == 0:
                    return

    # -- places
    def _allocate(self, width: int) -> int:
        offset = self.program.register_bytes
        self.program.register_bytes += 64 if width == PREDICATE else 32 * width
        return offset

    def _register(self, name: str, width: int | None = None) -> int:
        """The offset of a register, which must have this width."""
        for scope in self.scopes:
            name = scope.get(name, name)
        if name not in self.registers:
            families = (w for prefix, w in self.families if re.fullmatch(re.escape(prefix) + r"\d+", name))
            found = 4 if name in SPECIAL else next(families, None)
            if found is None:
                raise Unsupported(f"register {name}")
            self.registers[name] = (self._allocate(found), found)
        offset, has = self.registers[name]
        if width is not None and has != width:
            raise Unsupported(f"{name} has {has} bytes and {width} are wanted")
        return offset

    def _width(self, name: str) -> int:
        self._register(name)
        for scope in self.scopes:
            name = scope.get(name, name)
        return self.registers[name][1]

    def _source(self, text: str, width: int) -> int:
        value = self.symbols.get(text, constant(text))
        if value is None:
            return self._register(text, width)
        if width == PREDICATE:
            value = MASK32 if value else 0
        key = (value & (MASK64 if width == 8 else MASK32), width)
        if key not in self.constants:
            self.constants[key] = self._allocate(width)
        return self.constants[key]

    def _destination(self, text: str, width: int | None = None) -> int:
        return -1 if text == "_" else self._register(text, width)

    def _address(self, text: str) -> tuple[int, int, int]:
        """Register, offset and variant (4: it has 64 bits) of [register + offset]."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if found is None:
            raise Unsupported(f"address {text}")
        wide = found[1] in self.symbols or self._width(found[1]) == 8
        return self._source(found[1], 8 if wide else 4), int(found[2] or "0", 0), 4 if wide else 0

    # -- statements
    def _statement(self, text: str) -> None:
        while found := re.match(r"([{}])\s*|([$\w]+):\s*", text):
            if found[1] == "{":
                self.scopes.append({})
            elif found[1] == "}":
                self.scopes.pop()
            else:
                self.labels[found[2]] = len(self.program.code)
            text = text[found.end() :]
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            return self._declare(text)
        self.guard = (-1, 0)
        if found := re.match(r"@(!?)([%\w$]+)\s+", text):
            self.guard = (self._register(found[2], PREDICATE), int(bool(found[1])))
            text = text[found.end() :]
        opcode, _, operands = text.partition(" ")
        self.text = text
        try:
            self._instruction(opcode, operands_of(operands))
        except (Unsupported, LookupError, ValueError) as error:
            raise Unsupported(f"PTX line {self.line}: {text}: {error}") from error

    def _declare(self, text: str) -> None:
        _, kind, names = text.replace(".reg .", ".reg ").split(" ", 2)
        if "<" in names:
            return
        for name in elements_of(names):
            unique = f"{name} of scope {len(self.program.code)}"
            if self.scopes:
                self.scopes[-1][name] = unique
            self.registers[unique if self.scopes else name] = (self._allocate(width_of(kind)), width_of(kind))

    def _emit(self, name: str, d: tuple[int, ...] = (), s: tuple[int, ...] = (), **fields: int) -> None:
        instruction = Instruction(op=self.rows[name].index, line=self.line, count=1)
        instruction.guard, instruction.negated = self.guard
        instruction.d[:] = [*d, *[-1] * (8 - len(d))]
        instruction.s[:] = [*s, *[-1] * (10 - len(s))]
        for key, value in fields.items():
            setattr(instruction, key, value)
        self.program.code.append(instruction)
        self.program.text.append(self.text)

    def _mark_poison(self) -> None:
        """Loads and atomics whose destination nothing else writes: a lane that is off then holds nothing defined."""
        writes = Counter(offset for instruction in self.program.code for offset in instruction.d if offset >= 0)
        reading = {self.rows[name].index for name in ("load_global", "load_shared", "atomic")}
        for instruction in self.program.code:
            alone = all(writes[offset] == 1 for offset in instruction.d if offset >= 0)
            instruction.poison = int(instruction.op in reading and instruction.guard >= 0 and alone)

    # -- instructions
    def _instruction(self, opcode: str, operands: list[str]) -> None:
        op, *modifiers = opcode.split(".")
        by_hand = getattr(self, f"on_{op}", None)
        if by_hand is not None:
            return by_hand(modifiers, operands)
        self._arithmetic(opcode, operands)

    def _arithmetic(self, opcode: str, operands: list[str]) -> None:
        name = canonical(opcode, len(operands) - 1)
        if name not in self.rows:
            raise Unsupported(f"no row {name} in instructions.h")
        widths = self.rows[name].widths or (4, 4)
        if len(widths) != len(operands):
            raise Unsupported(f"{len(operands)} operands and not {len(widths)}")
        if opcode.endswith("f64"):  # a literal may be a float32
            operands = [self._as_double(text) for text in operands]
        sources = tuple(self._source(*pair) for pair in zip(operands[1:], widths[1:], strict=True))
        self._emit(name, (self._destination(operands[0], widths[0]),), sources)

    @staticmethod
    def _as_double(text: str) -> str:
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            (value,) = struct.unpack(">f", bytes.fromhex(found[1]))
            return "0d" + struct.pack(">d", value).hex()
        return text

    def on_mov(self, modifiers: list[str], operands: list[str]) -> None:
        to, of = operands
        if to.startswith("{"):
            parts = elements_of(to)
            bits = bytes_of(modifiers[-1]) * 8
            name = f"part_{bits // len(parts)}_of_{bits}"
            whole = self._source(of, self.rows[name].widths[1])
            for k, part in enumerate(parts):
                if part != "_":
                    self._emit(name, (self._destination(part, 4),), (whole, self._source(str(k), 4)))
        elif of.startswith("{"):
            parts = elements_of(of)
            name = f"pack_{len(parts)}x{bytes_of(modifiers[-1]) * 8 // len(parts)}"
            sources = tuple(self._source(part, 4) for part in parts)
            self._emit(name, (self._destination(to, self.rows[name].widths[0]),), sources)
        else:
            self._arithmetic("mov." + modifiers[-1], operands)

    def on_ret(self, modifiers: list[str], operands: list[str]) -> None:
        self._emit("ret")

    on_exit = on_ret

    def on_bra(self, modifiers: list[str], operands: list[str]) -> None:
        self.branches.append((len(self.program.code), operands[0]))
        self._emit("bra")

    def on_bar(self, modifiers: list[str], operands: list[str]) -> None:
        if modifiers == ["warp", "sync"]:
            return self._emit("warp_barrier")
        if "sync" not in modifiers or operands != ["0"]:
            raise Unsupported("barrier of a part of a CTA")
        self._emit("barrier")

    on_barrier = on_bar

    def on_membar(self, modifiers: list[str], operands: list[str]) -> None:
        self._emit("nop")  # it orders memory, and atomics carry the order here

    on_fence = on_griddepcontrol = on_membar

    def on_trap(self, modifiers: list[str], operands: list[str]) -> None:
        self._emit("trap")

    @staticmethod
    def _access(modifiers: list[str]) -> tuple[str, str, int]:
        """Space, type and number of elements."""
        spaces = [m.split("::")[0] for m in modifiers]
        space = next((s for s in spaces if s in ("param", "global", "shared", "local", "const")), "generic")
        count = next((int(m[1]) for m in modifiers if re.fullmatch(r"v[248]", m)), 1)
        return space, modifiers[-1], count

    def on_ld(self, modifiers: list[str], operands: list[str]) -> None:
        space, kind, count = self._access(modifiers)
        names = elements_of(operands[0])
        widened = any(name != "_" and self._width(name) == 8 for name in names)
        signed = kind[0] == "s" and bytes_of(kind) < (8 if widened else 4)
        fields = {"variant": signed + 2 * (widened and bytes_of(kind) < 8), "bytes": bytes_of(kind), "count": count}
        destinations = tuple(self._destination(name) for name in names)
        if space == "param":
            name, offset = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+)\s*)?\]", operands[1]).groups()
            fields["immediate"] = self.param_offsets[name] + int(offset or 0)
            return self._emit("load_param", destinations, **fields)
        if space not in ("global", "shared"):
            raise Unsupported(f"{space} memory")
        address, offset, wide = self._address(operands[1])
        fields["variant"] |= wide if space == "shared" else 0
        self._emit(f"load_{space}", destinations, (address,), immediate=offset, **fields)

    def on_st(self, modifiers: list[str], operands: list[str]) -> None:
        space, kind, count = self._access(modifiers)
        if space not in ("global", "shared"):
            raise Unsupported(f"{space} memory")
        address, offset, wide = self._address(operands[0])
        values = tuple(self._source(text, width_of(kind)) for text in elements_of(operands[1]))
        variant = wide if space == "shared" else 0
        fields = {"variant": variant, "immediate": offset, "bytes": bytes_of(kind), "count": count}
        self._emit(f"store_{space}", (), (address, *values), **fields)

    def _matrix(self, name: str, modifiers: list[str], operands: list[str]) -> None:
        if "m8n8" not in modifiers or modifiers[-1] != "b16":
            raise Unsupported("shape of a matrix")
        count = next(int(m[1]) for m in modifiers if re.fullmatch(r"x[124]", m))
        load = name == "load_matrix"
        address, offset, wide = self._address(operands[1 if load else 0])
        values = tuple(self._register(text, 4) for text in elements_of(operands[0 if load else 1]))
        variant = wide + 8 * ("trans" in modifiers) + 16
        fields = {"variant": variant, "immediate": offset, "bytes": 16, "count": count}
        self._emit(name, values if load else (), (address,) if load else (address, *values), **fields)

    def on_ldmatrix(self, modifiers: list[str], operands: list[str]) -> None:
        self._matrix("load_matrix", modifiers, operands)

    def on_stmatrix(self, modifiers: list[str], operands: list[str]) -> None:
        self._matrix("store_matrix", modifiers, operands)

    def on_atom(self, modifiers: list[str], operands: list[str]) -> None:
        if "global" not in modifiers or "cta" in modifiers:
            raise Unsupported("an atomic that is not for all of global memory")
        kind = modifiers[-1]
        what = next(m for m in modifiers if m in ("add", "exch", "max", "min", "cas"))
        if what == "add":
            what += ".f" if kind == "f32" else ".u"
        elif what in ("max", "min") and kind != "s32":
            raise Unsupported("type of an atomic")
        variant = ATOMICS.index(what)
        variant += 256 * bool({"release", "acq_rel"} & {*modifiers}) + 512 * bool({"acquire", "acq_rel"} & {*modifiers})
        to, where, *values = operands
        address, offset, _ = self._address(where)
        sources = tuple(self._source(text, width_of(kind)) for text in values)
        fields = {"variant": variant, "immediate": offset, "bytes": bytes_of(kind)}
        self._emit("atomic", (self._destination(to),), (address, *sources), **fields)

    def on_red(self, modifiers: list[str], operands: list[str]) -> None:
        self.on_atom(modifiers, ["_", *operands])

    def on_shfl(self, modifiers: list[str], operands: list[str]) -> None:
        to, _, inside = operands[0].partition("|")
        destinations = (self._destination(to, 4), self._destination(inside or "_"))
        sources = tuple(self._source(text, 4) for text in operands[1:])
        self._emit("shuffle", destinations, sources, variant=["bfly", "idx", "up", "down"].index(modifiers[1]))

    def on_redux(self, modifiers: list[str], operands: list[str]) -> None:
        what, kind = modifiers[1], modifiers[-1][0]
        name = what if what in REDUCTIONS else f"{what}{'.NaN' if 'NaN' in modifiers else ''}.{kind}"
        sources = tuple(self._source(text, 4) for text in operands[1:])
        self._emit("reduce", (self._destination(operands[0], 4),), sources, variant=REDUCTIONS.index(name))

    def on_vote(self, modifiers: list[str], operands: list[str]) -> None:
        what = ["ballot", "any", "all"].index(modifiers[1])
        destination = self._destination(operands[0], PREDICATE if what else 4)
        self._emit("vote", (destination,), (self._source(operands[1], PREDICATE),), variant=what)
