"""The processes of one run: what they agree on, what is said and done once. How they start is in
`joining.py`, how they end in `ending.py`.

They talk through JAX's coordination service, which needs no device. So nothing here starts a
program on the mesh, and a process that is refused can tell the others, wherever they are.
"""

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the client of the service has no public name

from pangu_tiny.errors import UserError, one_line

KEYS = "pangu_tiny"
"""Where all that processes tell each other lies."""
POLL_SECONDS = 0.1
_numbers = itertools.count()  # of what was gathered; every process gathers the same, in order


class Refused(UserError):
    """Another process ended; the text says which one, and why.

    Attributes:
      code: its exit code.
    """

    def __init__(self, line: str, code: int = UserError.code):
        super().__init__(line)
        self.code = code


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


def client() -> Any:
    """Of the coordination service; None where there is one process, or this one ends."""
    return distributed.global_state.client


def named(process: int | None = None, host: str | None = None) -> str:
    """How a process is named, this one by default."""
    return f"process {index() if process is None else process} ({host or socket.gethostname()})"


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
    place = f"{KEYS}/gathered/{next(_numbers)}/"
    client().key_value_set(f"{place}{index():06d}", json.dumps([count(), value]))
    while True:
        if refused := refusal():
            raise refused
        found = [json.loads(text) for _, text in sorted(client().key_value_dir_get(place))]
        if counts := {count for count, _ in found} - {count()}:
            raise UserError(
                f"--processes is {count()} in process {index()}, {counts.pop()} in another one"
            )
        if len(found) == count():
            return [value for _, value in found]
        time.sleep(POLL_SECONDS)


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
        gather(f"{named()}: {one_line(error)}")
        raise
    if reasons := [other for other in gather(None) if other]:
        raise Refused("; ".join(reasons))


def check_alike(facts: dict[str, Any], difference: Callable[[Any, Any, str, str], str]) -> None:
    """Refuses all processes where one of them is about to do something else.

    Args:
      facts: what has to be the same.
      difference: names what differs of the first two, and in which process.
    """
    (first_process, expected), *others = gather([named(), facts])
    for process, found in others:
        if found != expected:
            differs = difference(expected, found, f"in {first_process}", f"in {process}")
            raise Refused(f"the processes do not do the same: {differs}")


def refuse(line: str, code: int) -> None:
    """Tells the other processes why this one ends, and with which exit code; what it told first
    stands."""
    with contextlib.suppress(RuntimeError):
        client().key_value_set(f"{KEYS}/refused/{index():06d}", json.dumps([line, code]))


def refusal() -> Refused | None:
    """What other processes, or this one, told by `refuse`."""
    found = [json.loads(text) for _, text in sorted(client().key_value_dir_get(f"{KEYS}/refused/"))]
    if not found:
        return None
    # What no user has to mend decides: a mistake may follow from it, not it from a mistake.
    code = next((code for _, code in found if code != UserError.code), UserError.code)
    return Refused("; ".join(line for line, _ in found), code)
