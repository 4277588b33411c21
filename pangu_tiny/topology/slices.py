"""TPU slices by name, and what a chip of each generation can do.

A device is what JAX calls one: a chip, whose cores work as one where it has two (v4, "megacore";
v5p has one device a chip as well). Peaks, memory and links are those that Google's documentation of
the system architecture of each generation gives; a clock follows from its peak: peak / (matrix
units × 2 × size²).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from pangu_tiny.errors import UserError, check_one_of


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a chip can do.

    Attributes:
      kind: how JAX names the device.
      peak: bfloat16 operations per second.
      clock: cycles per second.
      cores: tensor cores that share the work of a device.
      memory: bytes of HBM.
      memory_rate: bytes per second that HBM reads or writes.
      axes: of the torus.
      link_rate: bytes per second that one link carries one way.
      wraps_from: size from which on an axis of the torus is closed to a ring.
      counts_cores: whether the number in a market name (v5p-256) counts cores, two a chip.
    """

    kind: str
    peak: float
    clock: float
    cores: int
    memory: int
    memory_rate: float
    axes: int
    link_rate: float
    wraps_from: int
    counts_cores: bool


GENERATIONS = {
    # 8 matrix units of 128 × 128.
    "v4": Generation("TPU v4", 275e12, 1.05e9, 2, 32 * 2**30, 1.228e12, 3, 45e9, 4, True),
    # 4 of 128 × 128.
    "v5e": Generation("TPU v5 lite", 197e12, 1.5e9, 1, 16 * 2**30, 0.819e12, 2, 45e9, 16, False),
    # 8 of 128 × 128.
    "v5p": Generation("TPU v5", 459e12, 1.75e9, 2, 95 * 2**30, 2.765e12, 3, 90e9, 4, True),
    # 4 of 256 × 256.
    "v6e": Generation("TPU v6 lite", 918e12, 1.75e9, 1, 32 * 2**30, 1.64e12, 2, 90e9, 16, False),
}

_SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
        "8x16x16", "16x16x16",
    ),
}  # fmt: skip
"""The shapes in which slices are sold, by the axes of the torus."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several slices of one generation.

    Attributes:
      generation: its name.
      shape: chips along each axis of the torus.
      slices: how many, joined by the data-centre network.
    """

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def topology(self) -> str:
        """As libtpu names one slice."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def coordinates(self) -> list[tuple[int, ...]]:
        """Of all chips, slice after slice, in the order of their numbers."""
        numbers = itertools.product(*map(range, reversed(self.shape)))
        return [number[::-1] for number in numbers] * self.slices

    def links(self, chips: Sequence[tuple[int, ...]]) -> float:
        """Links that the worst placed chip of a group has for what it receives from the group.

        Along each axis of the torus over which the group reaches: two on a ring, one at the end of
        a line; where its chips lie several apart, other groups have as many of them.
        """
        total = 0.0
        for axis, size in enumerate(self.shape):
            places = sorted({chip[axis] for chip in chips})
            if len(places) > 1:
                apart = min(after - place for place, after in itertools.pairwise(places))
                ring = size >= self.chip.wraps_from and len(places) * apart == size
                total += (2 if ring else 1) / apart
        return total or 1.0

    def distance(self, one: tuple[int, ...], other: tuple[int, ...]) -> int:
        """Links from a chip to another."""
        total = 0
        for size, place, to in zip(self.shape, one, other, strict=False):
            straight = abs(place - to)
            wraps = size >= self.chip.wraps_from
            total += min(straight, size - straight) if wraps else straight
        return total

    def __str__(self) -> str:
        return self.topology if self.slices == 1 else f"{self.slices} × {self.topology}"


def parse_slice(name: str) -> Slice:
    """Reads `v5e:16x16`, `2 × v5e:16x16` (or `2*v5e:16x16`), or a market name such as `v5p-256`.

    Market names of v4 and v5p count cores, two a chip; those of v5e and v6e count chips.
    """
    match = re.fullmatch(
        r"(?:([1-9]\d*) ?[×x*] ?)?(v\d[a-z]*)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip()
    )
    if not match:
        raise UserError(
            f"topology {name!r} is not known, expected GENERATION:SHAPE (v5e:16x16), a market name"
            f" (v5p-256) or several slices (2 × v5e:16x16); generations: {', '.join(GENERATIONS)}"
        )
    slices, generation, shape, number = match.groups()
    check_one_of(f"topology {name!r}: its generation", generation, GENERATIONS)
    chip = GENERATIONS[generation]
    known = _SHAPES[chip.axes]
    if number:
        each = 2 if chip.counts_cores else 1
        numbers = {f"{generation}-{each * _chips(shape)}": shape for shape in known}
        check_one_of("topology", f"{generation}-{number}", numbers)
        shape = numbers[f"{generation}-{number}"]
    check_one_of(f"topology {name!r}: its shape", shape, known)
    return Slice(generation, tuple(map(int, shape.split("x"))), int(slices or 1))


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))
