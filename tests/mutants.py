# SPDX-License-Identifier: Apache-2.0
"""How much of a compiled kernel do the cases of mutation_cases.MUTATED see? One instruction is changed at a time.

    python tests/mutants.py [--count 150] [--seed 0] [--only REGEX] [--target sm_90]

A mutant that no case notices survives, and is printed with its PTX and its place in the kernel. Every barrier and
atomic is changed, and of the other instructions that run a random `count` for each program. A survivor may be
equivalent to the original: `EQUIVALENT` names the kinds that are, each with its reason.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator

import on_device
import torch
from emulator import Device, Fault
from emulator.opcodes import Instruction
from emulator.ptx import Program

SWAPS = {
    "add_b32": "sub_b32", "sub_b32": "add_b32", "add_b64": "sub_b64", "sub_b64": "add_b64", "mul_b32": "add_b32",
    "mul_b64": "add_b64", "div_s32": "mul_b32", "min_s32": "max_s32", "max_s32": "min_s32", "min_s64": "max_s64",
    "max_s64": "min_s64", "and_b32": "or_b32", "or_b32": "and_b32", "xor_b32": "and_b32", "shl_b32": "shr_u32",
    "shl_b64": "shr_u64", "neg_b64": "mov_b64", "and_pred": "or_pred", "or_pred": "and_pred", "not_pred": "mov_pred",
    "add_f32": "sub_f32", "sub_f32": "add_f32", "mul_f32": "add_f32", "max_f32": "min_f32", "min_f32": "max_f32",
    "neg_f32": "mov_b32", "abs_f32": "mov_b32", "add_f64": "sub_f64", "sub_f64": "add_f64", "mul_f64": "add_f64",
    "div_f64": "mul_f64", "div_full_f32": "mul_f32", "ex2_approx_ftz_f32": "mov_b32", "rsqrt_approx_ftz_f32": "mov_b32",
    "cvt_rmi_ftz_f32_f32": "mov_b32", "barrier": "nop", "warp_barrier": "nop",
}  # fmt: skip
ORDERS = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "neu": "equ", "geu": "ltu"}
BOUNDARIES = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
# Changes that change no result, by a pattern of `what: instruction`; each counts only if no case has seen it.
EQUIVALENT = {
    r"store_global: guard \w+: st\.global\.b(32|64)": "all lanes hold the same value; another one would be a race",
    r"store_global: two elements swapped: .*\{ (%\w+), \1, \1": "all elements are the same",
    r"setp_\w+: at the boundary: setp.* 0[fd][0-9A-F]+;?$": "both formulas hold at the threshold between them",
    r"fma_\w+: operands swapped: \S+ %\w+, %\w+, (%\w+), \1": "both operands are the same",
    r"barrier -> nop: bar.sync": "two barriers follow each other; without both of them test_emulator.py finds a race",
}

Mutant = tuple[int, str, Instruction]  # index, what has changed, the instruction


def mutants_of(program: Program, names: list[str], index: int) -> Iterator[Mutant]:
    """The changes of one instruction."""
    original = program.code[index]
    name = names[original.op]

    def changed(what: str, **fields: int) -> Mutant:
        mutant = Instruction.from_buffer_copy(original)
        for key, value in fields.items():
            setattr(mutant, key, value)
        return index, what, mutant

    def swapped(what: str, part: str, a: int, b: int) -> Mutant:
        _, _, mutant = changed(what)
        places = getattr(mutant, part)
        places[a], places[b] = places[b], places[a]
        return index, what, mutant

    if name in SWAPS:
        yield changed(f"{name} -> {SWAPS[name]}", op=names.index(SWAPS[name]))
    if original.guard >= 0:
        yield changed(f"{name}: guard negated", negated=1 - original.negated)
        if name != "bra":
            yield changed(f"{name}: guard gone", guard=-1)
    if name.startswith(("load_global", "load_shared", "store")):
        yield changed(f"{name}: an element off", immediate=original.immediate + original.bytes * original.count)
        if original.count > 1:
            yield swapped(f"{name}: two elements swapped", *(("d", 0, 1) if "load" in name else ("s", 1, 2)))
    if name.startswith("store"):
        yield changed(f"{name}: gone", op=names.index("nop"))
    if name.startswith("setp"):
        _, order, *kind = name.split("_")
        for what, table in (("reversed", ORDERS), ("at the boundary", BOUNDARIES)):
            if order in table:
                yield changed(f"{name}: {what}", op=names.index("_".join(["setp", table[order], *kind])))
    if name.startswith(("selp", "sub_f", "fma")):
        yield swapped(f"{name}: operands swapped", "s", *((1, 2) if name.startswith("fma") else (0, 1)))
    if name == "shuffle":
        yield changed("shuffle: its own value", op=names.index("mov_b32"))
    if name == "atomic":
        yield changed("atomic: no release", variant=original.variant & ~256)
        yield changed("atomic: no acquire", variant=original.variant & ~512)
        yield changed("atomic: gone", op=names.index("nop"))


def place(ptx: str, line: int) -> str:
    before = [text for text in ptx.split("\n")[:line] if text.lstrip().startswith(".loc")]
    return before[-1].partition("//")[2].strip() if before else ""


def notices(cases: list[Callable[[], object]]) -> str | None:
    """How a case notices the mutant, or None."""
    try:
        for case in cases:
            case()
    except Fault:
        return "fault"
    except AssertionError:
        return "wrong numbers"
    return None


def judge(gpu: Device, title: str, cases: list[Callable[[], object]], arguments: argparse.Namespace) -> Counter[str]:
    """Runs the cases as they are, and then with each mutant of the programs that they have launched."""
    names = list(gpu.rows)
    for handle, _ in gpu.programs.values():
        structure = gpu.structure(handle)
        ctypes.memset(structure.hits, 0, 8 * structure.length)
    assert notices(cases) is None, f"{title}: the cases fail without a mutant"
    total: Counter[str] = Counter()
    hits = {ptx: gpu.structure(handle).hits for ptx, (handle, _) in gpu.programs.items()}
    runs = {ptx: [k for k in range(len(gpu.programs[ptx][1].code)) if counts[k]] for ptx, counts in hits.items()}
    for ptx, ran in ((ptx, ran) for ptx, ran in runs.items() if ran):
        handle, program = gpu.programs[ptx]
        structure = gpu.structure(handle)
        mutants = [m for k in ran for m in mutants_of(program, names, k)]
        if arguments.only:
            mutants = [m for m in mutants if re.search(arguments.only, f"{m[1]} {place(ptx, program.code[m[0]].line)}")]
        random.Random(arguments.seed).shuffle(mutants)
        mutants.sort(key=lambda m: not re.match("barrier|warp_barrier|atomic", m[1]))
        always = sum(1 for m in mutants if re.match("barrier|warp_barrier|atomic", m[1]))
        found: Counter[str] = Counter()
        survivors = []
        for index, what, mutant in mutants[: always + arguments.count]:
            described = f"{what}: {program.text[index]}"
            structure.code[index] = mutant
            outcome = notices(cases)
            structure.code[index] = program.code[index]
            if outcome is None and any(re.search(pattern, described) for pattern in EQUIVALENT):
                outcome = "equivalent"
            found[outcome or "survived"] += 1
            if outcome is None:
                survivors.append((program.code[index].line, what, program.text[index]))
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))
        print(f"{title}, {program.name}: {len(ran)} of {len(program.code)} instructions ran; {counts}", flush=True)
        for line, what, text in sorted(survivors):
            print(f"    {line:5} {what:36} {text[:76]:76} {place(ptx, line)}", flush=True)
        total += found
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=150, help="random mutants of each program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="mutants whose kind and place match this pattern")
    parser.add_argument("--target", default="sm_90")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on_device.emulate(f"{arguments.target},shuffle=1,max_instructions=3000000")
    gpu = on_device.emulated
    assert gpu is not None
    import mutation_cases

    total: Counter[str] = Counter()
    for title, cases in mutation_cases.MUTATED.items():
        torch.manual_seed(0)
        total += judge(gpu, title, cases(), arguments)
    considered = sum(total.values()) - total["equivalent"]
    killed = total["fault"] + total["wrong numbers"]
    print(f"killed {killed} of {considered} mutants ({100 * killed / considered:.1f} %): {dict(total)}")


if __name__ == "__main__":
    main()
