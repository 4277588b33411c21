"""The processes of one run: how they start, what they agree on, what is said once, how they end.

They talk through JAX's coordination service, which needs no device. So nothing here starts a
program on the mesh, and a process that is refused can tell the others, wherever they are.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the client of the service has no public name

from pangu_tiny.errors import UserError, check_number, one_line

_KEYS = "pangu_tiny"
_POLL_SECONDS = 0.1
_JOIN_SECONDS = 300  # within which all processes have to start
_ENDING_SECONDS = 10.0  # for a process to end in order once another one is refused
_numbers = itertools.count()  # of what was gathered; every process gathers the same, in order


class Refused(UserError):
    """Another process was refused; the text says which one, and why."""


def start(
    found_by_jax: bool, coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Joins the processes of a run, as the flags --distributed, --coordinator, --processes and
    --process say; without them, does nothing."""
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [flag for flag, value in flags.items() if value is not None]
    if found_by_jax and given:
        raise UserError(f"--distributed finds all by itself, expected it without {given[0]}")
    if not (found_by_jax or given):
        return
    if not found_by_jax:
        _check(coordinator, processes, process)
    shown = " ".join(f"{flag}={value}" for flag, value in flags.items() if value is not None)
    with _joining(shown or "--distributed"):
        try:
            jax.distributed.initialize(
                coordinator, processes, process, initialization_timeout=_JOIN_SECONDS + 60
            )
            gather(None)  # refuses another number of processes, for which JAX would wait
            jax.devices()  # which all find together, so before one of them is refused
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if found_by_jax and "be defined" in reason:
                reason = (
                    "JAX knows no cluster here (Cloud TPU, GKE, Slurm, Open MPI), expected "
                    "--coordinator=HOST:PORT, --processes and --process, or none of them"
                )
            raise UserError(f"{shown or '--distributed'}: {reason}") from error
    threading.Thread(target=_end_with_others, daemon=True).start()


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise UserError(
            "--coordinator=HOST:PORT of process 0, --processes=HOW_MANY and --process=WHICH_ONE "
            f"go together, found {coordinator}, {processes} and {process}"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator is {coordinator!r}, expected HOST:PORT of process 0")
    check_number("--processes", processes, 1)
    check_number("--process", process, 0, processes - 1)
    if process == 0:
        _check_port(coordinator, int(port))


def _check_port(coordinator: str, port: int) -> None:
    """Refuses a port that is in use, beside which gRPC would open it once more, or crash."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(
                    f"--coordinator is {coordinator}, but process 0 cannot open port {port}: "
                    f"{error.strerror}"
                ) from error


@contextlib.contextmanager
def _joining(flags: str) -> Iterator[None]:
    """Says that others are waited for; ends the process where they do not come, in one line,
    before JAX does in many."""

    def give_up() -> None:
        print(
            f"{flags}: after {_JOIN_SECONDS} s not all processes have come together at the "
            f"coordinator; is process 0 running there, and can all of them reach it?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    waiting = threading.Timer(
        10, lambda: print(f"{flags}: waiting for the other processes", file=sys.stderr, flush=True)
    )
    late = threading.Timer(_JOIN_SECONDS, give_up)
    for timer in (waiting, late):
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        waiting.cancel()
        late.cancel()


def several() -> bool:
    """Whether this process is one of several."""
    return count() > 1


def first() -> bool:
    """Whether this process is the first, which says and writes what is said and written once."""
    return index() == 0


def count() -> int:
    """How many processes there are. Does not start the devices, as `jax.process_count` does."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """Which of them this is, from 0."""
    return distributed.global_state.process_id or 0


def say(line: str) -> None:
    """Prints a line, once however many processes there are."""
    if first():
        print(line, flush=True)


def gather(value: Any) -> list[Any]:
    """The value (JSON) that each process gives, in their order; all of them have to call it.

    Raises:
      Refused: a process was refused, and will never call it.
    """
    if not several():
        return [value]
    client = distributed.global_state.client
    place = f"{_KEYS}/gathered/{next(_numbers)}/"
    client.key_value_set(f"{place}{index():06d}", json.dumps([count(), value]))
    while True:
        if refusals := _refusals():
            raise Refused("; ".join(refusals))
        found = [json.loads(text) for _, text in sorted(client.key_value_dir_get(place))]
        if counts := {count for count, _ in found} - {count()}:
            raise UserError(
                f"--processes is {count()} in process {index()}, {counts.pop()} in another one"
            )
        if len(found) == count():
            return [value for _, value in found]
        time.sleep(_POLL_SECONDS)


def anywhere(value: bool) -> bool:
    """Whether it holds on one process at least; each of them has to ask."""
    return any(gather(bool(value)))


def from_first(decide: Callable[[], Any]) -> Any:
    """What the first process decides (JSON), told to all; the others do not call `decide`.

    Raises:
      Refused: the first process could not.
    """
    with alone() as leads:
        value = decide() if leads else None
    return gather(value)[0]


@contextlib.contextmanager
def alone() -> Iterator[bool]:
    """Yields whether this is the first process, which alone does what stands within. Nothing may
    run on the mesh there: it would wait for the other processes in vain."""
    leads = first()
    with jax.no_execution() if leads and several() else contextlib.nullcontext():
        yield leads


@contextlib.contextmanager
def led() -> Iterator[bool]:
    """`alone`, and the others wait until it is done.

    Raises:
      Refused: the first process failed.
    """
    with alone() as leads:
        yield leads
    gather(None)


def check_everywhere(check: Callable[[], Any]) -> None:
    """Refuses all processes where `check` fails in one of them.

    Raises:
      UserError, OSError: what `check` raises here.
      Refused: it failed in another process.
    """
    try:
        check()
    except (UserError, OSError) as error:
        gather(f"{_here()}: {one_line(error)}")
        raise
    if reasons := [other for other in gather(None) if other]:
        raise Refused("; ".join(reasons))


def check_alike(facts: dict[str, Any], difference: Callable[[Any, Any, str, str], str]) -> None:
    """Refuses all processes where one of them is about to do something else.

    Args:
      facts: what has to be the same.
      difference: names what differs of the first two, and in which process.
    """
    (first_process, expected), *others = gather([_here(), facts])
    for process, found in others:
        if found != expected:
            named = difference(expected, found, f"in {first_process}", f"in {process}")
            raise Refused(f"the processes do not do the same: {named}")


def end(error: BaseException, code: int) -> None:
    """Ends this process, if it is one of several, without waiting for those that still compute;
    they are told why. A single process just goes on, to its own end.

    The first process goes last: the service that it keeps must outlive the others, or JAX ends
    them with stack traces.
    """
    if not several():
        return
    with contextlib.suppress(RuntimeError):  # the service may be gone
        if not isinstance(error, Refused):
            client = distributed.global_state.client
            client.key_value_set(f"{_KEYS}/refused/{index():06d}", f"{_here()}: {one_line(error)}")
        _leave(code)
    os._exit(code)


def _here() -> str:
    return f"process {index()} ({socket.gethostname()})"


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    client = distributed.global_state.client
    client.key_value_set(f"{_KEYS}/left/{index():06d}", "")
    deadline = time.monotonic() + 1.5 * _ENDING_SECONDS
    while index() == 0 and time.monotonic() < deadline:
        if len(client.key_value_dir_get(f"{_KEYS}/left/")) == count():
            break
        time.sleep(_POLL_SECONDS)
    os._exit(code)


def _refusals() -> list[str]:
    found = distributed.global_state.client.key_value_dir_get(f"{_KEYS}/refused/")
    return [line for _, line in sorted(found)]


def _end_with_others() -> None:
    """In a thread: ends this process where another one is refused and it does not notice by
    itself, since it computes, or waits in a program on the mesh."""
    while distributed.global_state.client is not None:
        with contextlib.suppress(RuntimeError):
            if refusals := _refusals():
                time.sleep(_ENDING_SECONDS)
                print(f"pangu-tiny: {'; '.join(refusals)}", file=sys.stderr, flush=True)
                _leave(2)
        time.sleep(10 * _POLL_SECONDS)
