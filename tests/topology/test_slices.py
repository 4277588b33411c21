"""Slices by all their names, and what follows from their shape."""

import pytest

from pangu_tiny.errors import UserError
from pangu_tiny.topology.slices import GENERATIONS, Slice, parse_slice


@pytest.mark.parametrize(
    ("name", "expected", "chips", "links"),
    [
        ("v5e:16x16", Slice("v5e", (16, 16)), 256, 4),
        ("v5e:4x4", Slice("v5e", (4, 4)), 16, 2),
        ("v5e-16", Slice("v5e", (4, 4)), 16, 2),
        ("v5e-256", Slice("v5e", (16, 16)), 256, 4),
        ("v6e-256", Slice("v6e", (16, 16)), 256, 4),
        ("v5p-256", Slice("v5p", (4, 4, 8)), 128, 6),
        ("v4-256", Slice("v4", (4, 4, 8)), 128, 6),
        ("v5p:2x2x1", Slice("v5p", (2, 2, 1)), 4, 2),
        ("2 × v5e:16x16", Slice("v5e", (16, 16), 2), 512, 4),
        ("4x v5p-256", Slice("v5p", (4, 4, 8), 4), 512, 6),
        ("2*v5e-16", Slice("v5e", (4, 4), 2), 32, 2),
    ],
)
def test_names(name, expected, chips, links):
    """Market names of v4 and v5p count cores, two a chip."""
    found = parse_slice(name)
    assert (found, found.chips, found.links(found.coordinates)) == (expected, chips, links)
    assert len(found.coordinates) == chips
    assert parse_slice(str(found)) == found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5litepod-16", "its generation is 'v5litepod', expected one of v4, v5e, v5p, v6e"),
        ("TPU", r"expected GENERATION:SHAPE \(v5e:16x16\)"),
        ("v7:4x4", "its generation is 'v7', expected one of v4, v5e, v5p, v6e"),
        ("v5e:3x3", "its shape is '3x3', expected one of 1x1, 2x2"),
        ("v5p:16x16", "its shape is '16x16', expected one of 2x2x1"),
        ("v5p-100", "is 'v5p-100', expected one of v5p-8, v5p-16, v5p-32"),
        ("v5e-0", "is 'v5e-0', expected one of v5e-1"),
        ("", "generations: v4, v5e, v5p, v6e"),
    ],
)
def test_unknown_names_list_the_known_ones(name, said):
    with pytest.raises(UserError, match=said):
        parse_slice(name)


@pytest.mark.parametrize(("name", "units", "size"), [
    ("v4", 8, 128), ("v5e", 4, 128), ("v5p", 8, 128), ("v6e", 4, 256),
])  # fmt: skip
def test_clocks_follow_from_peaks(name, units, size):
    chip = GENERATIONS[name]
    assert chip.clock == pytest.approx(chip.peak / (units * 2 * size**2), rel=5e-3)


def test_links_of_a_group_and_distances():
    """A ring along an axis that wraps has two, a block of it one at each side, and chips that lie
    four apart share what they have with three other groups."""
    wrapped, open_ = parse_slice("v5e:16x16"), parse_slice("v5e:4x4")
    assert wrapped.links([(x, 3) for x in range(16)]) == 2
    assert wrapped.links([(x, y) for x in range(4) for y in range(4)]) == 2
    assert wrapped.links([(x, y) for x in range(0, 16, 4) for y in range(0, 16, 4)]) == 1
    assert open_.links([(x, 0) for x in range(4)]) == 1
    assert wrapped.distance((0, 0), (15, 2)) == 3 and open_.distance((0, 0), (3, 2)) == 5
