"""What the processes of one run agree on, and say once."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def say(line: str) -> None:
    """Prints a line, once however many processes there are."""
    if jax.process_index() == 0:
        print(line, flush=True)


def everywhere(value: bool) -> bool:
    """Whether it holds on all processes, each of which has to ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
