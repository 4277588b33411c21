"""How often the loops of a compiled program run.

The text of a program for TPUs does not say it. It follows from the few integers that a loop's
condition reads: they are evaluated from their first values on, a turn at a time.
"""

import re
from collections.abc import Callable

from pangu_tiny.planning.hlo import Computation, Instruction, Program

_MOST_TURNS = 100_000
_PASSED = ("copy", "bitcast", "convert", "reshape", "broadcast", "bitcast-convert", "opt-barrier")

Arguments = Callable[[int, int | None], int | None]
"""The value of a parameter by its number, or of an element of it where it is a tuple; None where it
is not known."""


def unknown(number: int, element: int | None) -> None:
    """The arguments of the computation that runs first."""


def trip_count(
    program: Program, loop: Instruction, outside: Computation, arguments: Arguments
) -> int | None:
    """How often a loop's body runs; None where that does not follow from the text.

    Args:
      loop: a while instruction of the computation `outside`.
      arguments: of `outside`.
    """
    if (known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)) is not None:
        return int(known[1])
    condition = program.computations[loop.called("condition")]
    body = program.computations[loop.called("body")]
    counters: dict[int, int | None] = {
        element: _value(program, outside, loop.operands[0], element, arguments)
        for element in _elements_read(condition)
    }
    for turns in range(_MOST_TURNS):
        if None in counters.values():
            return None
        held = dict(counters)

        def inside(_: int, element: int | None) -> int | None:
            return held.get(element)  # noqa: B023 (used in this turn alone)

        goes_on = _value(program, condition, condition.root, None, inside)
        if not goes_on:
            return turns if goes_on == 0 else None
        counters = {
            element: _value(program, body, body.root, element, inside) for element in counters
        }
        if counters == held:
            return None
    return None


def within_loop(
    program: Program, loop: Instruction, outside: Computation, arguments: Arguments
) -> Arguments:
    """The arguments of a loop's body: what goes through it unchanged is known inside of it."""
    body = program.computations[loop.called("body")]

    def inside(number: int, element: int | None) -> int | None:
        if element is None or not _goes_through(body, element):
            return None
        return _value(program, outside, loop.operands[0], element, arguments)

    return inside


def _elements_read(condition: Computation) -> list[int]:
    found = (i.integer("index") for i in condition if i.opcode == "get-tuple-element")
    return sorted({index for index in found if index is not None})


def _goes_through(body: Computation, element: int) -> bool:
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return False
    source = body.instructions.get(root.operands[element])
    while source is not None and source.opcode in _PASSED:
        source = body.instructions.get(source.operands[0])
    if source is None or source.opcode != "get-tuple-element":
        return False
    taken = body.instructions.get(source.operands[0])
    return taken is not None and taken.opcode == "parameter" and source.integer("index") == element


def _value(
    program: Program,
    computation: Computation,
    name: str,
    element: int | None,
    arguments: Arguments,
) -> int | None:
    """An integer that an instruction gives, or an element of the tuple that it gives."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None

    def operand(number: int, part: int | None = None) -> int | None:
        return _value(program, computation, instruction.operands[number], part, arguments)

    opcode = instruction.opcode
    if opcode == "constant":
        text = instruction.operands[0].strip()
        names = {"true": 1, "false": 0}
        return names.get(text, int(text) if re.fullmatch(r"-?\d+", text) else None)
    if opcode == "parameter":
        return arguments(int(instruction.operands[0]), element)
    if opcode == "tuple":
        return None if element is None else operand(element)
    if opcode == "get-tuple-element":
        return operand(0, instruction.integer("index"))
    if opcode == "while":  # after it, what went through it is what it was before
        body = program.computations[instruction.called("body")]
        goes = element is not None and _goes_through(body, element)
        return operand(0, element) if goes else None
    if opcode in ("fusion", "call"):
        called = instruction.called("calls") or instruction.called("to_apply")
        inner = program.computations[called]
        return _value(program, inner, inner.root, element, operand)
    if opcode in _PASSED or opcode in ("copy-done", "copy-start"):
        value = operand(0, element)
        return value if value is None else _wrapped(value, instruction)
    values = [operand(number) for number in range(len(instruction.operands))]
    if opcode == "select" and values[0] is not None:
        return values[1] if values[0] else values[2]
    if opcode not in _ARITHMETIC or None in values:
        return None
    if opcode == "compare":
        direction = re.search(r"direction=(\w+)", instruction.attributes)
        return int(_COMPARISONS[direction[1]](*values))
    return _wrapped(_ARITHMETIC[opcode](*values), instruction)


def _wrapped(value: int, instruction: Instruction) -> int:
    """As 32 bits hold it."""
    dtype = instruction.arrays[0].dtype if instruction.arrays else ""
    if dtype == "u32":
        return value % 2**32
    return (value + 2**31) % 2**32 - 2**31 if dtype == "s32" else value


_COMPARISONS: dict[str, Callable[..., bool]] = {
    "LT": lambda x, y: x < y,
    "LE": lambda x, y: x <= y,
    "GT": lambda x, y: x > y,
    "GE": lambda x, y: x >= y,
    "EQ": lambda x, y: x == y,
    "NE": lambda x, y: x != y,
}
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "compare": lambda *_: 0,
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "not": lambda x: int(not x),
    "minimum": min,
    "maximum": max,
    "clamp": lambda low, x, high: min(max(x, low), high),
}
