"""The one exception that means: the user can mend this; and the checks of single settings.

Any public function may raise it; docstrings name only errors that a caller can act on.
"""

import math
from collections.abc import Collection
from typing import Any


class UserError(Exception):
    """A mistake in a file, binding, flag or folder; its text is one line naming what was found
    and what was expected. The command line prints it without a stack trace and exits with 2."""


def one_line(error: BaseException) -> str:
    """What an error says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def check_one_of(name: str, value: Any, known: Collection[Any]) -> None:
    """Refuses a setting that is not one of the known values.

    Args:
      name: of the binding, for the message.
    """
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
    """Refuses a number outside of its bounds; None, where a setting may be left open, passes.

    Args:
      name: of the binding, for the message.
      least, most: bounds that are allowed themselves.
      above, below: bounds that are not; `below=math.inf` refuses infinity.
    """
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
