"""Paths of linked chips, on tori of every shape in which slices are sold."""

import math

import pytest

from pangu_tiny.topology.slices import Slice
from pangu_tiny.topology.torus import closed_paths


@pytest.mark.parametrize("shape", [
    (2, 2), (2, 4), (4, 4), (4, 8), (8, 16), (16, 16), (2, 2, 1), (2, 2, 4), (4, 4, 8), (8, 8, 16),
])  # fmt: skip
def test_neighbours_on_a_path_are_linked(shape):
    """Without the links that close the torus, of which v5e has none below 16."""
    chips = Slice("v5e", shape).coordinates
    for length in (1, 2, 4, 8, 16, 32, math.prod(shape)):
        if math.prod(shape) % length:
            continue
        paths = closed_paths(chips, length)
        assert sorted(chip for path in paths for chip in path) == sorted(chips)
        for path in paths:
            assert len(path) == length
            for chip, after in zip(path, path[1:] + path[:1], strict=True):
                apart = sum(abs(a - b) for a, b in zip(chip, after, strict=True))
                assert apart == (1 if length > 1 else 0)


def test_blocks_are_as_near_to_cubes_as_can_be():
    (path, *_) = closed_paths(Slice("v5e", (16, 16)).coordinates, 16)
    assert {chip[0] for chip in path} == {chip[1] for chip in path} == set(range(4))


def test_where_there_is_no_path():
    """Of an odd number of chips, or where the slice has holes."""
    assert closed_paths([(x, y) for x in range(3) for y in range(3)], 9) is None
    assert closed_paths([(x, 0) for x in range(4)], 4) is None
    assert closed_paths([(0, 0), (1, 1)], 2) is None
