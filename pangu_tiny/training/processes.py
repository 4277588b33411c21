"""What the processes of one run agree on, and say once."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from pangu_tiny.errors import UserError


def say(line: str) -> None:
    """Prints a line, once however many processes there are."""
    if jax.process_index() == 0:
        print(line, flush=True)


def everywhere(value: bool) -> bool:
    """Whether it holds on all processes, each of which has to ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def anywhere(value: bool) -> bool:
    """Whether it holds on one process at least; each of them has to ask."""
    return not everywhere(not value)


@contextlib.contextmanager
def led(work: str) -> Iterator[bool]:
    """Yields whether this is the first process, which alone does what stands within; the others
    wait for it, and fail where it fails.

    Raises:
      UserError: the first process failed; it says why itself.
    """
    done = False
    try:
        yield jax.process_index() == 0
        done = True
    finally:
        done_everywhere = everywhere(done)
    if not done_everywhere:
        raise UserError(f"{work} failed in the first process, which says why")


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
