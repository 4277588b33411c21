"""How the processes of a run find one another.

On several hosts of Cloud TPU or GKE JAX is told by the platform which processes there are, and they
join by themselves. Where it is not, flags say it.
"""

import contextlib
import errno
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator

import jax
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster

from pangu_tiny.errors import Unreached, UserError, check_number, reason
from pangu_tiny.topology import ending
from pangu_tiny.topology.processes import gather

_JOIN_SECONDS = 300
"""Within which all processes have to start."""
_SLICE_SECONDS = 2 * 3600
"""The same where the platform starts them: another slice may have to be found first."""


def start(
    found_by_jax: bool, coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Joins the processes of a run: those that the platform tells of, or that the flags
    --distributed, --coordinator, --processes and --process do. --processes=1 joins none."""
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [flag for flag, value in flags.items() if value is not None]
    if found_by_jax and given:
        raise UserError(f"--distributed finds all by itself, expected it without {given[0]}")
    if given == ["--processes"] and processes == 1:
        return
    if given:
        _check(coordinator, processes, process)
    elif not found_by_jax and not _told_by_platform():
        return
    shown = " ".join(f"{flag}={value}" for flag, value in flags.items() if value is not None)
    shown = shown or ("--distributed" if found_by_jax else "processes of this TPU slice")
    patience = _JOIN_SECONDS if given or found_by_jax else _SLICE_SECONDS
    with _joining(shown, patience):
        try:
            jax.distributed.initialize(
                coordinator, processes, process, initialization_timeout=patience + 60
            )
            gather(None)  # refuses another number of processes, for which JAX would wait
            jax.devices()  # which all find together, so before one of them is refused
        except (RuntimeError, ValueError, OSError) as error:
            kind = UserError if isinstance(error, ValueError) else Unreached
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            if found_by_jax and "be defined" in why:
                why = (
                    "JAX knows no cluster here (Cloud TPU, GKE, Slurm, Open MPI), expected "
                    "--coordinator=HOST:PORT, --processes and --process, or none of them"
                )
            raise kind(f"{shown}: {why}") from error
    ending.watch_others()


def _told_by_platform() -> bool:
    """Whether this is one of several hosts of a TPU slice, or of several slices. JAX would wait for
    ever where it is asked to join the processes of a single one."""
    if not cloud_tpu_init.running_in_cloud_tpu_vm:
        return False
    kinds = (cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster)
    try:
        found = next((kind for kind in kinds if kind.is_env_present()), None)
        return found is not None and found.get_process_count() > 1
    except OSError as error:
        raise Unreached(
            f"the metadata of this TPU host cannot be read, expected them, or --processes=1 where "
            f"it is alone: {reason(error)}"
        ) from error


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
def _joining(flags: str, patience: int) -> Iterator[None]:
    """Says that others are waited for; ends the process where they do not come within so many
    seconds, in one line, before JAX does in many."""

    def give_up() -> None:
        print(
            f"{flags}: after {patience} s not all processes have come together at the "
            f"coordinator; is process 0 running there, and can all of them reach it?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(Unreached.code)

    waiting = threading.Timer(
        10, lambda: print(f"{flags}: waiting for the other processes", file=sys.stderr, flush=True)
    )
    late = threading.Timer(patience, give_up)
    for timer in (waiting, late):
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        waiting.cancel()
        late.cancel()
