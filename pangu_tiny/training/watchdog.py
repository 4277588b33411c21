"""A watchdog: steps that do not come back end a run of several processes, which can start again.

Where one of them hangs, all others wait for it in the next program on the mesh, for ever.
"""

import faulthandler
import math
import statistics
import sys
import threading
import time
from collections import deque

from pangu_tiny.topology import ending, processes

_TIMES = 10
_REMEMBERED = 100
_LOOK_SECONDS = 1.0


class Watchdog:
    """Watches from the first finished step on, where there are several processes.

    Args:
      minutes: without a finished step after which the run ends; 10 times the median step, if that
        is longer. None never ends it.
    """

    def __init__(self, minutes: float | None):
        self._least = None if minutes is None else 60 * minutes
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._sign: float | None = None
        self._step = 0
        self._resting = False
        self._over = threading.Event()

    def finished(self, step: int) -> None:
        """To be called when a step has come back."""
        before, self._sign, self._step = self._sign, time.monotonic(), step
        if before is not None:
            self._durations.append(self._sign - before)
        elif self._least is not None and processes.several():
            threading.Thread(target=self._watch, daemon=True).start()

    def alive(self) -> None:
        """To be called when other work on the mesh has come back."""
        if self._sign is not None:
            self._sign, self._resting = time.monotonic(), False

    def rest(self) -> None:
        """To be called before what has time limits of its own; until `alive` nothing is watched."""
        self._resting = True

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        limit = math.inf
        while self._resting or time.monotonic() - self._sign < limit:
            if self._over.wait(_LOOK_SECONDS):
                return
            limit = max(self._least, _TIMES * statistics.median(list(self._durations) or [0.0]))
        faulthandler.dump_traceback(sys.stderr)
        ending.give_up(
            f"{processes.named()}: what follows step {self._step} has not come back for "
            f"{limit:.0f} s, the stacks of its threads are above; the same command resumes"
        )
