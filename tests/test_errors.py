"""The checks of single settings: what passes, and the sentence that names what does not."""

import errno
import math

import pytest

from pangu_tiny.errors import Unreached, UserError, check_number, check_one_of, failing_as


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "said"),
    [
        ({"least": 1}, [1, 7], [0, -1, math.nan], "expected at least 1"),
        ({"least": 0, "most": 1}, [0, 0.5, 1], [-0.1, 1.1], "expected at least 0 and at most 1"),
        ({"above": 0, "most": 1}, [0.1, 1], [0, 2], "expected more than 0 and at most 1"),
        ({"least": 0, "below": 1}, [0, 0.99], [1, -1], "expected at least 0 and below 1"),
        ({"above": 0, "below": math.inf}, [1e9], [0, math.inf], "more than 0 and finite"),
        ({"least": 1024}, [1024], [1023], "expected at least 1,024"),
    ],
)
def test_bounds_of_a_number(bounds, good, bad, said):
    for value in good:
        check_number("x.y", value, **bounds)
    for value in bad:
        with pytest.raises(UserError) as refused:
            check_number("x.y", value, **bounds)
        assert str(refused.value).startswith(f"x.y is {value}, expected ")
        assert said in str(refused.value)


def test_what_may_be_left_open_passes():
    check_number("x.y", None, 1)


def test_known_values_are_listed():
    check_one_of("x.y", None, (None, "a"))
    with pytest.raises(UserError, match=r"^x.y is 'b', expected one of None, a$"):
        check_one_of("x.y", "b", (None, "a"))


PASSING = [
    OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ValueError("UNAVAILABLE: 503 in GetObject"),
    RuntimeError("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer"),
]
LASTING = [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied"),
    ValueError("RESOURCE_EXHAUSTED: No space left on device"),
    ValueError("DATA_LOSS: checksum"),
    FileNotFoundError("bucket/o/x"),  # a library's, with no number
]


@pytest.mark.parametrize(
    ("error", "kind"),
    [*((error, Unreached) for error in PASSING), *((error, UserError) for error in LASTING)],
    ids=str,
)
def test_what_may_go_well_the_next_time_is_no_mistake(error, kind):
    """Also where a library raises something else because of it."""
    with pytest.raises(UserError) as raised, failing_as("x cannot be read"):
        raise KeyError("x") from error
    assert type(raised.value) is kind and raised.value.code == (1 if kind is Unreached else 2)
