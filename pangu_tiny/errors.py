"""The one exception that means: the user can mend this; and the checks of single settings.

Any public function may raise it; docstrings name only errors that a caller can act on.
"""

import contextlib
import errno
import math
import os
from collections.abc import Collection, Iterator
from typing import Any


class UserError(Exception):
    """A mistake in a file, binding, flag or folder; its text is one line naming what was found
    and what was expected. The command line prints it without a stack trace and exits with `code`.
    """

    code = 2


class Unreached(UserError):
    """Storage or other processes did not answer; the same command, given again, may find them."""

    code = 1


class Diverged(UserError):
    """A loss came out NaN or infinite."""


class Stopped(UserError):
    """SIGTERM or ^C asked a stage to stop, which saved what was done; the same command resumes."""

    code = 143


def one_line(error: BaseException) -> str:
    """What an error says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException) -> str:
    """The first line of what a library first raised, which may be pages long or empty; where it
    names the file at its start, it names the cause at its end."""
    while error.__cause__:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) < 300 else f"{lines[0][:100]} … {lines[0][-200:]}"


_LASTING = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE,
    errno.ENFILE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip
_PASSING = (
    *map(os.strerror, (errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT)),
    *map(os.strerror, (errno.ECONNRESET, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EPIPE)),
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "timed out", "Timeout",
)  # fmt: skip


def kind_of(error: BaseException) -> type[UserError]:
    """`Unreached` where what storage raised may be gone at the next try: a network, a mount or a
    server that does not answer; else, as for a full disk or a folder without permission,
    `UserError`."""
    while error.__cause__:
        error = error.__cause__
    if isinstance(error, OSError):
        passes = error.errno is not None and error.errno not in _LASTING
    else:
        passes = any(words in str(error) for words in _PASSING)
    return Unreached if passes else UserError


@contextlib.contextmanager
def failing_as(
    what: str, *kinds: type[BaseException], library: str = "", advice: str = ""
) -> Iterator[None]:
    """Makes a `UserError` of what is raised within: 'WHAT: reason', and `advice` after it; an
    `Unreached` where the same may go well the next time.

    Args:
      kinds: of errors; by default any. A `UserError` passes through, since it says all.
      library: whose words the reason is; then 'WHAT (LIBRARY: reason)'.
    """
    kinds = kinds or (Exception,)
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        why = f" ({library}: {reason(error)})" if library else f": {reason(error)}"
        raise kind_of(error)(f"{what}{why}{advice}") from error


def check_one_of(name: str, value: Any, known: Collection[Any]) -> None:
    """Refuses a setting, named by its binding, that is not one of the known values."""
    if value not in known:
        names = ", ".join(map(str, known))
        raise UserError(f"{name} is {value!r}, expected one of {names}")


def check_number(
    name: str,
    value: float | None,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Refuses a number, named by its binding, outside of its bounds, of which `least` and `most`
    are allowed themselves; `below=math.inf` refuses infinity. None, a setting left open, passes."""
    bounds = [
        (least, f"at least {least:,}" if least is not None else "", lambda x: x >= least),
        (above, f"more than {above:,}" if above is not None else "", lambda x: x > above),
        (most, f"at most {most:,}" if most is not None else "", lambda x: x <= most),
        (below, "finite" if below == math.inf else f"below {below}", lambda x: x < below),
    ]
    given = [(text, holds) for bound, text, holds in bounds if bound is not None]
    if value is not None and not all(holds(value) for _, holds in given):
        expected = " and ".join(text for text, _ in given)
        raise UserError(f"{name} is {value}, expected {expected}")
