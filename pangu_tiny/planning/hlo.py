"""A compiled program as its text: computations, instructions, shapes.

The text is XLA's after scheduling, so that the instructions of a computation stand in the order in
which they are issued.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_END = re.compile(r'\}(, execution_thread="\w+")?$')
_INSTRUCTION = re.compile(r"^  (ROOT )?%?(\S+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")


class Array(NamedTuple):
    """An array's type; tuples are several of them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      type: as the text has it.
      operands: names; of a constant or parameter, what stands in its parentheses.
      attributes: all that follows the operands.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return arrays_of(self.type)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        match = re.search(rf"\b{attribute}=\{{?%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def integer(self, attribute: str) -> int | None:
        match = re.search(rf'\b{attribute}"?[=:]"?(\d+)', self.attributes)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """What the program's source calls it, as in jit(step)/blocks/ffn/dot_general."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they are issued, by name."""

    instructions: dict[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and the one that runs."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Reads the text of one module.

    Raises:
      ValueError: it has no entry.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in _logical_lines(text):
        if match := _COMPUTATION.match(line):
            name, instructions, root = match[2], {}, ""
            entry = name if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            instruction = _parse_instruction(match[2], match[3])
            instructions[instruction.name] = instruction
            root = instruction.name if match[1] else root
        elif _END.match(line) and name:
            computations[name] = Computation(instructions, root or next(reversed(instructions)))
            name = ""
    if entry not in computations:
        raise ValueError("the text of the program has no entry computation")
    return Program(computations, entry)


def arrays_of(type_text: str) -> list[Array]:
    return [
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(type_text)
        if dtype in _BITS
    ]


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, those of a constant that goes over several put together."""
    held = ""
    for line in text.split("\n"):
        starts = _END.match(line) or _COMPUTATION.match(line) or _INSTRUCTION.match(line)
        if starts or not line:
            if held:
                yield held
            held = line
        elif held:
            held += f" {line.strip()}"
    if held:
        yield held


def _parse_instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    opcode, inside = rest[:opens], rest[opens + 1 : closes]
    parts = [inside]
    if opcode not in ("constant", "parameter"):
        listed = _split(re.sub(r"/\*.*?\*/", "", inside))
        parts = [part.strip().rpartition(" ")[2].lstrip("%") for part in listed]
    operands = tuple(parts)
    return Instruction(name, type_text, opcode, operands, rest[closes + 1 :])


def _closing(text: str, opens: int) -> int:
    """The place of the parenthesis that closes the one at `opens`."""
    depth = 0
    for place in range(opens, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"a parenthesis is never closed: {text[:100]}")


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]
