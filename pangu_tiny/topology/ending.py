"""How the processes of a run end: together, and each says why.

Each tells the others every two seconds that it is there. One that is not heard of for 40 seconds is
lost, and the others end, in an order that lets each say which one it was. What a process is refused
for, or fails by, it tells as well.
"""

import atexit
import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jax._src import distributed

from pangu_tiny.errors import Unreached, one_line
from pangu_tiny.topology.processes import (
    KEYS,
    POLL_SECONDS,
    Refused,
    client,
    count,
    gather,
    index,
    named,
    refusal,
    refuse,
    several,
)

BEAT_SECONDS = 2.0
SILENT_SECONDS = 40.0
"""After which a process is lost. Its end is said within a minute; nothing that training does keeps
a process from its threads as long."""
_MEND = "once all processes are there, the same command resumes"
_ENDING_SECONDS = 10.0  # for a process to end in order once another one ended


class Beats:
    """What was heard of the other processes.

    Attributes:
      hosts: of all processes, in their order.
      number: of exchanges that are done.
    """

    def __init__(self, hosts: Sequence[str]):
        self.hosts = hosts
        now = time.monotonic()
        self._heard = dict.fromkeys(range(count()), now)
        self._told: dict[str, str] = {}
        self.number = 0

    def exchange(self) -> None:
        """Tells the others of this process, and hears of them."""
        service, place = client(), f"{KEYS}/beats/"
        service.key_value_set(f"{place}{index():06d}", str(self.number), True)
        found = dict(service.key_value_dir_get(place))
        now = time.monotonic()
        for key, number in found.items():
            if self._told.get(key) != number:
                self._heard[int(key.rpartition("/")[2])] = now
        self._told = found
        self.number += 1

    def forgive(self) -> None:
        """To be called when this process itself was held up."""
        self._heard = dict.fromkeys(self._heard, time.monotonic())

    def quiet_since(self, moment: float) -> list[int]:
        """Processes of which nothing was heard from then on. Where this one reaches the service no
        more, that is the first, which keeps it."""
        quiet = [process for process, heard in self._heard.items() if heard <= moment]
        return [0] if index() in quiet else quiet

    def lost(self) -> str | None:
        """Which processes are lost, if any is."""
        quiet = self.quiet_since(time.monotonic() - SILENT_SECONDS)
        names = ", ".join(named(process, self.hosts[process]) for process in quiet)
        verb = "is" if len(quiet) == 1 else "are"
        silence = f"nothing was heard for {SILENT_SECONDS:.0f} s"
        return f"{names} {verb} lost, {silence}; {_MEND}" if quiet else None


_beats: Beats | None = None
_giving_up = threading.Lock()
_done = threading.Event()


def watch_others() -> None:
    """To be called once when all processes have come together: from now on this one ends where
    another one does."""
    global _beats
    _beats = Beats(gather(socket.gethostname()))
    if index():
        ctypes.CDLL(None).signal(signal.SIGABRT, _ABORTED)
    threads = [
        threading.Thread(target=work, args=(_beats,), daemon=True) for work in (_beat, _guard)
    ]
    for thread in threads:
        thread.start()
    atexit.register(_stop_watching, threads)


def _stop_watching(threads: Sequence[threading.Thread]) -> None:
    """Ends the watch once all processes have done their work, before JAX's client goes and before
    the interpreter does: a thread, or a handler, that outlives one of them crashes."""
    try:
        gather(None)
    except Refused as refused:
        _print(str(refused))
        _leave(refused.code)
    except RuntimeError:  # the service is gone, and the first process with it
        give_up(f"{named(0, _beats.hosts[0])} is lost; {_MEND}")
    _done.set()
    for thread in threads:
        thread.join()
    ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)


def _beat(beats: Beats) -> None:
    """In a thread: where the first process hangs, this one does."""
    while not _done.is_set():
        with contextlib.suppress(RuntimeError):
            beats.exchange()
            if refused := refusal():
                # Time for this process to notice by itself, unless it waits in a program on the
                # mesh.
                time.sleep(_ENDING_SECONDS)
                _print(str(refused))
                _leave(refused.code)
        _done.wait(BEAT_SECONDS)


def _guard(beats: Beats) -> None:
    """In a thread."""
    last = time.monotonic()
    while not _done.is_set():
        if time.monotonic() - last > 5 * BEAT_SECONDS:
            beats.forgive()
        last = time.monotonic()
        if lost := beats.lost():
            give_up(lost)
        _done.wait(BEAT_SECONDS / 2)


def _find_lost(beats: Beats) -> str | None:
    """Which processes are lost; waits until each is heard of again, has told why it ends, or is."""
    # By the end of the second exchange from here on, what was told before now is heard.
    asked, number = math.inf, beats.number + 2
    while beats.quiet_since(asked) and not refusal():
        if lost := beats.lost():
            return lost
        if asked == math.inf and beats.number >= number:
            asked = time.monotonic()
        time.sleep(POLL_SECONDS)
    return None


def give_up(line: str) -> NoReturn:
    """Ends this process, and tells the others why, if they can be told. Exit code 1: whoever
    started the run may start it again."""
    _giving_up.acquire()  # two threads may find the same
    _print(line)
    late = threading.Timer(_ENDING_SECONDS, os._exit, [1])
    late.daemon = True
    late.start()
    with contextlib.suppress(RuntimeError):
        refuse(line, 1)
        _leave(1)
    os._exit(1)


def end(error: BaseException, code: int, trace: bool = False) -> None:
    """Ends this process, if it is one of several, without waiting for those that still compute;
    they are told why. A single process just goes on, to its own end.

    The first process goes last: the service that it keeps must outlive the others, or JAX ends
    them with stack traces.

    Args:
      error: by which this process failed; where its code is 1, another one may have been lost.
      trace: whether its stack trace is to be printed.
    """
    if not several():
        return
    with contextlib.suppress(RuntimeError):  # the service may be gone
        if not isinstance(error, Refused) and _beats:
            if code == Unreached.code and (lost := _find_lost(_beats)):
                give_up(lost)
            refuse(f"{named()}: {one_line(error)}", code)
            code = refusal().code
        if trace:
            traceback.print_exception(error)
        _leave(code)
    os._exit(code)


def _print(line: str) -> None:
    print(f"pangu-tiny: {line}", file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """Exits; the first process, where the others have."""
    sys.stdout.flush()
    sys.stderr.flush()
    place = f"{KEYS}/left/"
    client().key_value_set(f"{place}{index():06d}", "", True)
    deadline = time.monotonic() + 1.5 * _ENDING_SECONDS
    while index() == 0 and time.monotonic() < deadline:
        if len(client().key_value_dir_get(place)) == count():
            break
        time.sleep(POLL_SECONDS)
    os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _ABORTED(number: int) -> None:
    """JAX aborts a process at once where it reaches the service of the first one no more. What it
    prints names neither."""
    address, _, port = distributed.global_state.coordinator_address.rpartition(":")
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
        line = f"{named()} was aborted by its runtime, see above"
    except OSError:
        line = f"{named(0, _beats.hosts[0] if _beats else None)} is lost; {_MEND}"
    _print(line)
    os._exit(1)
