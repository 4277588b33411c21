"""What devices exchange in a compiled program, and how long their links take for it.

Bytes are those that one chip must receive. Of n chips and a result of r bytes that is r · (n − 1)/n
for all-gather and all-to-all, twice that for all-reduce, r · (n − 1) for reduce-scatter. They come
over all links that the worst placed chip has to others of the n; those of a permutation over one,
which chips share where it goes over several.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pangu_tiny.planning.hlo import Instruction
from pangu_tiny.topology.slices import Slice

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """An exchange.

    Attributes:
      kind: one of `KINDS`.
      dtype: of what is exchanged.
      bytes: that a chip receives, each time.
      chips: that exchange with one another.
      network: "ICI", or "DCN" where they lie in several slices.
      seconds: of the links, each time.
      exposed: seconds of them that no computation hides.
      synchronous: whether nothing else runs meanwhile, so that all of it is exposed.
      times: a step.
      op_name: of the operation that it belongs to.
    """

    kind: str
    dtype: str
    bytes: float
    chips: int
    network: str
    seconds: float
    exposed: float
    synchronous: bool
    times: int
    op_name: str


def kind_of(instruction: Instruction) -> str | None:
    """The kind of an instruction that starts or does an exchange."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


class Placed(NamedTuple):
    """Where a program runs.

    Attributes:
      where: the slices.
      dcn_rate: bytes per second that a chip receives from other slices.
      chips: the coordinates of the chip that runs each partition of the program.
    """

    where: Slice
    dcn_rate: float
    chips: Sequence[tuple[int, ...]]


def exchange(instruction: Instruction, placed: Placed, times: int) -> Collective:
    """The exchange of an instruction, as if nothing hid it."""
    kind = kind_of(instruction)
    if kind is None:
        raise ValueError(f"{instruction.opcode} exchanges nothing")
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start"):  # operands, then results, then flags
        largest = max(arrays, key=lambda array: array.bytes)
        arrays = [largest if kind == "all-gather" else arrays[0]]
    where = placed.where
    group = _group(instruction, len(placed.chips))
    chips, result = len(group), sum(array.bytes for array in arrays)
    share = (chips - 1) / chips
    factors = {"all-gather": share, "all-to-all": share, "all-reduce": 2 * share}
    received = result * (chips - 1 if kind == "reduce-scatter" else factors.get(kind, 1.0))
    per_slice = where.chips // where.slices
    crosses = len({member // per_slice for member in group}) > 1
    if kind == "collective-permute":
        chips_of = ([placed.chips[member] for member in pair] for pair in _pairs(instruction))
        links = 1 / max([1, *(where.distance(*pair) for pair in chips_of)])
    else:
        links = where.links([placed.chips[member] for member in group])
    rate = placed.dcn_rate if crosses else links * where.chip.link_rate
    seconds = received / rate
    network = "DCN" if crosses else "ICI"
    return Collective(
        kind, arrays[0].dtype, received, chips, network, seconds, seconds, True, times,
        instruction.op_name,
    )  # fmt: skip


def rendezvous(instruction: Instruction) -> str | None:
    """What the two halves of an exchange between slices, a send and a recv, have in common."""
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
    return match[1] if match and instruction.opcode in ("send", "recv") else None


def exchange_of_slices(instruction: Instruction, placed: Placed, times: int) -> Collective:
    """The exchange between slices that a send begins, as if nothing hid it."""
    match = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    kind = match[1].lower().replace("_", "-") if match else "collective-permute"
    array, slices = instruction.arrays[0], placed.where.slices
    share = (slices - 1) / slices
    factors = {"all-gather": slices - 1, "all-reduce": 2 * share, "collective-permute": 1}
    received = array.bytes * factors.get(kind, share)
    seconds = received / placed.dcn_rate
    return Collective(
        kind, array.dtype, received, slices, "DCN", seconds, seconds, True, times,
        instruction.op_name,
    )  # fmt: skip


def _group(instruction: Instruction, partitions: int) -> list[int]:
    """The devices of one group, by number."""
    text = instruction.attributes
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(number) for number in match[1].split(",")]
    if pairs := _pairs(instruction):
        return pairs[0]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", text):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        used = re.findall(r"'([^']+)'", match[2])
        numbers = np.arange(np.prod(list(axes.values()))).reshape(list(axes.values()))
        first = tuple(slice(None) if name in used else 0 for name in axes)
        return numbers[first].reshape(-1).tolist()
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = [int(size) for size in match[3].split(",")]
        numbers = np.arange(np.prod(sizes)).reshape(sizes)
        if match[4]:
            numbers = numbers.transpose([int(axis) for axis in match[4].split(",")])
        return numbers.reshape(int(match[1]), int(match[2]))[0].tolist()
    return list(range(partitions))


def _pairs(instruction: Instruction) -> list[list[int]]:
    """Of a permutation: the device that sends and the one that receives."""
    match = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", instruction.attributes)
    found = re.findall(r"\{(\d+),(\d+)\}", match[1]) if match else ()
    return [[int(number) for number in pair] for pair in found]
