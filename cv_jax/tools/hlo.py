"""Reads the text of a program that XLA:TPU has compiled and scheduled.

The compiler writes "estimated_cycles" beside each fusion, copy and slice. It writes none beside
collectives and some other instructions, such as select-and-scatter, the gradient of a windowed
maximum. This module counts the bytes of those, so that every instruction is counted.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Opcodes without work of their own: they name values, run beside other work (copies and slices
# that start early), or stand for computations that are counted themselves.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
FREE |= {"custom-call", "partition-id", "while", "call", "conditional", "opt-barrier"}

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One instruction of a scheduled program.

    Attributes:
        name: name in the text.
        opcode: opcode in the text.
        cycles: the compiler's estimate for one execution; None without an estimate.
        result_bytes: bytes of the result, without the padding of its layout.
        operand_bytes: bytes of all operands, without the padding of their layouts.
        line: the whole line.
    """

    name: str
    opcode: str
    cycles: int | None
    result_bytes: int
    operand_bytes: int
    line: str

    @property
    def collective(self) -> str | None:
        """Returns which of COLLECTIVES the instruction is or starts; None for another."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def unestimated(self) -> bool:
        """Returns whether the instruction works on arrays but has no estimate."""
        beside = self.opcode.endswith(("-start", "-done")) or self.collective
        return self.cycles is None and not beside and self.opcode not in FREE


Program = dict[str, list[Instruction]]  # computation -> its instructions; "" is the entry


def parse(text: str) -> Program:
    """Reads the computations of a module; the name of the entry is ""."""
    program: Program = {}
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            instructions = program.setdefault("" if match[1] else match[2], [])
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            sizes[name] = array_bytes(shape)
            operands = re.findall(r"%([^\s,()]+)", rest.split("), ")[0])
            cycles = re.search(r'"estimated_cycles":"?(\d+)', rest)
            instructions.append(
                Instruction(
                    name,
                    opcode,
                    int(cycles[1]) if cycles else None,
                    sizes[name],
                    sum(sizes.get(operand, 0) for operand in operands),
                    line,
                )
            )
    return program


def array_bytes(shape: str) -> int:
    """Counts the bytes of an array or tuple of an HLO shape: "(f32[64]{0}, bf16[2,3]{1,0})"."""
    total = 0
    for kind, bits, sides in _ARRAY.findall(shape):
        count = math.prod(int(side) for side in sides.split(",") if side)
        total += count * (8 if kind == "pred" else int(bits)) // 8
    return total


def executed(program: Program, computation: str = "") -> Iterator[tuple[Instruction, int]]:
    """Yields (instruction, number of executions), through loops, calls and the costliest branch.

    Instructions inside a fusion are skipped: the fusion has the estimate. A loop runs
    "known_trip_count" times; without that, up to the only constant of its condition; else once.
    """
    for instruction in program[computation]:
        yield instruction, 1
        times = _trips(program, instruction.line) if instruction.opcode == "while" else 1
        bodies = [list(executed(program, name)) for name in _bodies(instruction)]
        if instruction.opcode == "conditional":
            bodies = [max(bodies, key=lambda body: sum((i.cycles or 0) * n for i, n in body))]
        for body in bodies:
            yield from ((inner, times * count) for inner, count in body)


def _bodies(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs; none for a fusion."""
    attribute = {
        "while": r"\bbody=%?([^\s,]+)",
        "call": r"\bto_apply=%?([^\s,]+)",
        "async-start": r"\bcalls=%?([^\s,]+)",
        "conditional": r"(?:true|false)_computation=%?([^\s,]+)|branch_computations=\{([^}]*)\}",
    }.get(instruction.opcode)
    found = re.findall(attribute, instruction.line) if attribute else []
    names = ",".join(name if isinstance(name, str) else "".join(name) for name in found)
    return [name.strip().lstrip("%") for name in names.split(",") if name]


def _trips(program: Program, line: str) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', line):
        return int(known[1])
    condition = program[re.search(r"\bcondition=%?([^\s,]+)", line)[1]]
    limits = [re.search(r" constant\((\d+)\)", i.line) for i in condition]
    limits = [int(limit[1]) for limit in limits if limit]
    return limits[0] if len(limits) == 1 else 1


def source_lines(text: str) -> dict[str, str]:
    """Reads the tables at the head of a module: stack frame id -> "models/n94.py:49"."""
    files = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.M))
    places = {
        place: f"{'/'.join(Path(files[file]).parts[-2:])}:{line}"
        for place, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _table(text, "FileLocations"), re.M
        )
    }
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", _table(text, "StackFrames"), re.M)
    return {frame: places[place] for frame, place in frames}


def _table(text: str, title: str) -> str:
    _, _, rest = text.partition(f"\n{title}\n")
    return rest.partition("\n\n")[0]


def origin(instruction: Instruction, lines: dict[str, str]) -> str:
    """Returns the origin: "linen/pooling.py:73 jvp(N94)/group1/.../reduce_window_max"."""
    frame = re.search(r"stack_frame_id=(\d+)", instruction.line)
    name = re.search(r'op_name="([^"]*)"', instruction.line)
    place = lines.get(frame[1]) if frame else None
    path = re.sub(r"^jit\(\w+\)/", "", name[1]) if name else None
    return " ".join(part for part in (place, path) if part) or "?"
