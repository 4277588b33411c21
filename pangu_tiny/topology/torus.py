"""Closed paths of linked chips, along which a mesh axis is laid."""

import itertools
import math
from collections.abc import Sequence

Chip = tuple[int, ...]


def closed_paths(chips: Sequence[Chip], length: int) -> list[list[Chip]] | None:
    """Cuts a torus into blocks of chips and goes through each by way of neighbours.

    No link that closes the torus is used: some slices do not let chips send over it beside
    computation.

    Args:
      chips: the coordinates of all.
      length: of a path.

    Returns:
      Paths of which each chip is linked to the next and the last to the first, all chips together;
      None where the torus has no such blocks. Blocks are as near to cubes as can be.
    """
    sizes = [max(chip[axis] for chip in chips) + 1 for axis in range(len(chips[0]))]
    if math.prod(sizes) != len(chips):
        return None
    divisors = ([side for side in range(1, size + 1) if size % side == 0] for size in sizes)
    blocks = [block for block in itertools.product(*divisors) if math.prod(block) == length]
    for block in sorted(blocks, key=lambda block: (max(block), block)):
        if path := _closed_path(block):
            corners = itertools.product(
                *(range(0, size, side) for size, side in zip(sizes, block, strict=True))
            )
            return [[_sum(corner, step) for step in path] for corner in corners]
    return None


def _sum(corner: Chip, step: Chip) -> Chip:
    return tuple(place + more for place, more in zip(corner, step, strict=True))


def _closed_path(block: Chip) -> list[Chip] | None:
    """Through all chips of a block: along its first side and back through the rest."""
    for first, size in enumerate(block):
        others = _open_path((*block[:first], *block[first + 1 :]))
        if size >= 2 and len(others) >= 2 and len(others) % 2 == 0:
            flat = [(x, others[0]) for x in range(size)]
            for turn, rest in enumerate(others[1:]):
                sides = range(1, size) if turn % 2 else range(size - 1, 0, -1)
                flat += [(x, rest) for x in sides]
            flat += [(0, rest) for rest in reversed(others[1:])]
            return [(*rest[:first], x, *rest[first:]) for x, rest in flat]
    return [(0,) * len(block)] if math.prod(block) == 1 else _pair(block)


def _pair(block: Chip) -> list[Chip] | None:
    """Two chips, which send to each other over the one link between them."""
    return _open_path(block) if math.prod(block) == 2 else None


def _open_path(block: Chip) -> list[Chip]:
    """Through all chips of a block, to and fro."""
    if not block:
        return [()]
    rest = _open_path(block[1:])
    return [(x, *step) for x in range(block[0]) for step in (rest[::-1] if x % 2 else rest)]
