"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

import io
import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Counts work towards `total` units, with rate and time left.

    Args:
      label: what is being done, in a few words.
      total: units of work in all, or None where that is not known.
      unit: name of one unit; "B" prints as kB, MB, GB.
      initial: units done before (by an interrupted run); they do not count for the rate.
      log_every: seconds between two lines where standard error is no terminal.
      shown: whether anything is; of several processes that work together, one shows it.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "it",
        initial: int = 0,
        log_every: float = 10.0,
        shown: bool = True,
    ):
        self._interval = log_every
        self._last = time.monotonic()
        terminal = sys.stderr.isatty()
        self._shown, self._logs = shown, shown and not terminal
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=label,
            unit=unit,
            unit_scale=unit == "B",
            dynamic_ncols=True,
            file=sys.stderr if terminal else _Silent(),
            disable=not shown,
        )

    def update(self, units: int = 1, **figures: Any) -> None:
        """Adds units done; `figures` (name=value) are shown beside the bar."""
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(units)
        if self._logs and time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            self.say(str(self._bar))

    def say(self, line: str) -> None:
        """Prints a line to standard error without breaking the bar."""
        if self._shown:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        if self._logs:
            self.say(str(self._bar))
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Silent(io.StringIO):
    """Swallows the bar where there is no terminal to draw it on."""

    def write(self, _: str) -> int:
        return 0
