"""Arrays in files: what is damaged is named, however it is damaged."""

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_tiny.arrays import read_array, read_described, write_arrays
from pangu_tiny.errors import UserError

ARRAYS = {"x": np.arange(20), "y": np.ones((3, 2), np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("arrays"))
    write_arrays(folder / "whole.npz", ARRAYS, {"of": [1, 2]})
    np.save(folder / "whole.npy", ARRAYS["x"])
    return folder


@settings(max_examples=100, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(-2, 7))
@pytest.mark.parametrize(("name", "read"), [("npz", read_described), ("npy", read_array)])
def test_damage_is_one_line_that_names_the_file(folder, name, read, where, bit):
    """Cut off (−1), with a hole (−2), or with a bit flipped, which may go unseen in an npy file."""
    content = bytearray((folder / f"whole.{name}").read_bytes())
    place = int(where * len(content))
    if bit == -1:
        del content[place:]
    elif bit == -2:
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    else:
        content[place] ^= 1 << bit
    damaged = folder / f"damaged.{name}"
    damaged.write_bytes(content)
    try:
        read(damaged)
        assert bit != -1
    except UserError as error:
        assert str(damaged) in str(error)


def test_what_is_written_is_read(folder):
    about, arrays = read_described(folder / "whole.npz")
    assert about == {"of": [1, 2]}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
