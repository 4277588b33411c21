"""What a compiled step spends its time on, by the compiled program's own schedule.

Computation: the cycles that the compiler estimates for each instruction, those of a loop's body
times its turns. Exchanges: exposed is link time less the cycles between start and end, at least 0;
a synchronous one is exposed whole. Copies to fast memory that are started ahead: likewise. What has
no estimate (kernels, some instructions) is listed with a bound and never counted as nothing: the
bytes that it reads and writes at the rate of the memory.
"""

import dataclasses
from typing import NamedTuple

from pangu_tiny.planning.collectives import (
    Collective,
    Placed,
    exchange,
    exchange_of_slices,
    kind_of,
    rendezvous,
)
from pangu_tiny.planning.hlo import Computation, Instruction, Program
from pangu_tiny.planning.loops import Arguments, trip_count, unknown, within_loop

_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "call",
    "conditional", "partition-id", "replica-id", "after-all", "opt-barrier", "iota",
    "async-update",
}  # fmt: skip
_BOOKKEEPING = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked", "AsyncCollectiveStart", "AsyncCollectiveDone",
}  # fmt: skip
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
_PRODUCTS = ("convolution", "dot")
_KERNEL = "tpu_custom_call"
_SMALL = 1024  # bytes; what has no estimate and is no larger is left out


class Work(NamedTuple):
    """Cycles of an instruction, each time, and how often it runs in a step. Where there is no
    matrix product in it, it is a pass over memory."""

    cycles: int
    times: int
    op_name: str
    product: bool


class Uncosted(NamedTuple):
    """What the compiler gives no estimate for; `bytes` that it reads and writes, each time."""

    name: str
    bytes: int
    times: int


@dataclasses.dataclass
class Schedule:
    """The time of one step.

    Attributes:
      cycles: of all computation.
      waits: seconds that copies to fast memory are waited for.
      kernels: custom kernels; their cycles are not among `cycles`.
      unknown_loops: names of loops whose turns do not follow from the text; counted once.
    """

    cycles: int = 0
    work: list[Work] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    waits: float = 0.0
    kernels: list[Uncosted] = dataclasses.field(default_factory=list)
    uncosted: list[Uncosted] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)


def read_schedule(program: Program, placed: Placed) -> Schedule:
    """Walks through a program."""
    walk = _Walk(program, placed)
    walk.schedule.cycles = walk.through(program.entry, 1, unknown)
    return walk.schedule


class _Walk:
    def __init__(self, program: Program, placed: Placed):
        self._program, self._placed = program, placed
        self._clock = placed.where.chip.clock
        self.schedule = Schedule()

    def through(self, name: str, times: int, arguments: Arguments) -> int:
        """The cycles of a computation, each time that it runs, which is `times` in a step."""
        computation = self._program.computations[name]
        total, now = 0, 0.0  # `now` waits for exchanges too
        started: dict[str, tuple[float, Collective | float]] = {}
        for instruction in computation:
            cycles = self._cycles(instruction, computation, times, arguments)
            total += cycles
            now += self._exchanges(instruction, times, now, started) * self._clock + cycles
        return total

    def _cycles(
        self, instruction: Instruction, computation: Computation, times: int, arguments: Arguments
    ) -> int:
        """Of one instruction, with all that it calls."""
        if instruction.opcode == "while":
            return self._loop(instruction, computation, times, arguments)
        if instruction.opcode == "conditional":
            branches = instruction.attributes.partition("branch_computations={")[2].partition("}")[
                0
            ]
            names = [name.strip().lstrip("%") for name in branches.split(",") if name.strip()]
            names = names or [
                instruction.called(f"{holds}_computation") or "" for holds in ("true", "false")
            ]
            return max(self.through(name, times, unknown) for name in names)
        if instruction.opcode == "call":
            return self.through(instruction.called("to_apply") or "", times, unknown)
        estimate = instruction.integer("estimated_cycles")
        if estimate is None:
            self._note_uncosted(instruction, computation, times)
            return 0
        self.schedule.work.append(
            Work(estimate, times, instruction.op_name, self._is_product(instruction))
        )
        return estimate

    def _is_product(self, instruction: Instruction) -> bool:
        called = instruction.called("calls")
        if called is None:
            return instruction.opcode in _PRODUCTS
        return any(map(self._is_product, self._program.computations[called]))

    def _loop(
        self, loop: Instruction, computation: Computation, times: int, arguments: Arguments
    ) -> int:
        turns = trip_count(self._program, loop, computation, arguments)
        if turns is None:
            self.schedule.unknown_loops.append(loop.name)
        inside = within_loop(self._program, loop, computation, arguments)
        turns = 1 if turns is None else turns
        return turns * self.through(loop.called("body") or "", times * turns, inside)

    def _note_uncosted(
        self, instruction: Instruction, computation: Computation, times: int
    ) -> None:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-start", "-done")) or kind_of(instruction):
            return
        if instruction.target in _BOOKKEEPING or self._exchanges_of(instruction):
            return
        if rendezvous(instruction):
            return
        operands = [computation.instructions.get(name) for name in instruction.operands]
        read = sum(array.bytes for operand in operands if operand for array in operand.arrays)
        moved = read + sum(array.bytes for array in instruction.arrays)
        if instruction.target == _KERNEL:
            self.schedule.kernels.append(Uncosted(instruction.name, moved, times))
        elif moved > _SMALL:
            self.schedule.uncosted.append(Uncosted(opcode, moved, times))

    def _exchanges(
        self,
        instruction: Instruction,
        times: int,
        now: float,
        started: dict[str, tuple[float, Collective | float]],
    ) -> float:
        """Seconds that the step waits at an instruction for what is on its way."""
        opcode = instruction.opcode
        if opcode.endswith("-done"):
            begun = started.pop(instruction.operands[0], None)
            return self._end(begun, times, now) if begun else 0.0
        if meeting := rendezvous(instruction):
            found = exchange_of_slices(instruction, self._placed, times)
            begun = started.pop(meeting, (now, found))  # by the send, which comes first
            started[meeting if opcode == "send" else instruction.name] = begun
        elif kind_of(instruction):
            found = exchange(instruction, self._placed, times)
            if not opcode.endswith("-start"):
                self.schedule.collectives.append(found)
                return found.seconds
            started[instruction.name] = (now, found)
        elif opcode == "async-start" and (offloaded := self._offloaded(instruction)):
            started[instruction.name] = (now, exchange(offloaded, self._placed, times))
        elif opcode == "async-update" and instruction.operands[0] in started:
            _, begun_there = started.pop(instruction.operands[0])  # which had no operand yet
            started[instruction.name] = (now, begun_there)
        elif opcode.endswith("-start") and opcode.removesuffix("-start") in _COPIES:
            sizes = [array.bytes for array in instruction.arrays if array.bytes > 8]
            seconds = min(sizes, default=0) / self._placed.where.chip.memory_rate
            started[instruction.name] = (now, seconds)
        return sum(
            self._fused(fused, stage, times, now, started)
            for fused, stage in self._exchanges_of(instruction)
        )

    def _exchanges_of(self, instruction: Instruction) -> list[tuple[Instruction, str]]:
        """Exchanges inside of a fusion, and whether it starts, goes on with or ends them."""
        called = instruction.called("calls") if instruction.opcode == "fusion" else None
        if called is None:
            return []
        inner = self._program.computations[called]
        targets = {other.target for other in inner}
        stage = "whole"
        for name in ("Start", "Done"):
            stage = name if f"AsyncCollective{name}" in targets else stage
        return [(other, stage) for other in inner if kind_of(other)]

    def _offloaded(self, instruction: Instruction) -> Instruction | None:
        """The exchange that sparse cores do, in what an instruction calls."""
        if kind_of(instruction):
            return instruction
        for attribute in ("calls", "called_computations"):
            called = instruction.called(attribute)
            inner = self._program.computations[called] if called else ()
            if found := next(filter(None, map(self._offloaded, inner)), None):
                return found
        return None

    def _fused(
        self,
        instruction: Instruction,
        stage: str,
        times: int,
        now: float,
        started: dict[str, tuple[float, Collective | float]],
    ) -> float:
        channel = f"channel {instruction.integer('channel_id')}"
        if stage == "Start":
            started[channel] = (now, exchange(instruction, self._placed, times))
            return 0.0
        if channel in started:
            return self._end(started.pop(channel), times, now) if stage == "Done" else 0.0
        if stage == "whole":
            found = exchange(instruction, self._placed, times)
            self.schedule.collectives.append(found)
            return found.seconds
        return 0.0

    def _end(self, begun: tuple[float, Collective | float], times: int, now: float) -> float:
        """Seconds that an exchange or a copy takes longer than what ran since it was started."""
        start, what = begun
        hidden = (now - start) / self._clock
        seconds = what.seconds if isinstance(what, Collective) else what
        exposed = max(0.0, seconds - hidden)
        if isinstance(what, Collective):
            found = what._replace(exposed=exposed, synchronous=False)
            self.schedule.collectives.append(found)
        else:
            self.schedule.waits += exposed * times
        return exposed
