"""Compiling for slices that are not there, by libtpu; what it refuses for want of memory."""

import contextlib
import importlib.util
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from pangu_tiny.errors import UserError, one_line
from pangu_tiny.planning.memory import need
from pangu_tiny.planning.programs import Planned
from pangu_tiny.topology.slices import Slice

_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any that there is; topologies are named apart
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""Settings of libtpu, which else asks a cloud for the machine, and complains that there is none."""
_USED = re.compile(r"Ran out of memory in memory space hbm\b.*?Used ([\d.]+)([KMGT]?) of", re.S)
_TEMPORARIES = re.compile(
    r"Ran out of memory on HBM\b.*?required for HLO temporaries \(([\d.]+)([KMGT]?)\)", re.S
)


class Compiled(NamedTuple):
    """What libtpu made of a program, or found that it needs.

    Attributes:
      need: bytes of HBM that a chip needs.
      seconds: to compile.
      text: of the program; None where it does not fit.
      analysis: of its memory; None where it does not fit.
    """

    need: int
    seconds: float
    text: str | None = None
    analysis: Any = None


def devices_of(where: Slice) -> list[Any]:
    """Those of slices that are not there."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": where.slices} if where.slices > 1 else {}
    if where.generation == "v4":
        options["chip_config_name"] = "megacore"
    from jax.experimental import topologies

    with _naming_failures(where):
        found = topologies.get_topology_desc(where.topology, platform="tpu", **options)
    return list(found.devices)


def compile_for(planned: Planned, where: Slice) -> Compiled:
    """Compiles a program, whether or not it fits."""
    began = time.monotonic()
    with _naming_failures(where), jax.set_mesh(planned.mesh):
        lowered = planned.function.lower(*planned.arguments, **planned.settings)
        try:
            compiled, text = _compile(lowered)
        except jax.errors.JaxRuntimeError as error:
            if (needed := refused(str(error), planned.held_bytes)) is None:
                raise
            return Compiled(needed, time.monotonic() - began)
    found = compiled.memory_analysis()
    return Compiled(need(found), time.monotonic() - began, text, found)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """A program and its text: from a file, since `as_text` fails where sparse cores gather."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (file,) = pathlib.Path(folder).glob("*.after_codegen.txt")
        return compiled, file.read_text()


def refused(message: str, held: int) -> int | None:
    """Bytes of HBM that a chip would need by libtpu's complaint that it has less; None for any
    other complaint.

    Args:
      held: bytes of the arguments, which one form of the complaint leaves out.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, beside in ((_USED, 0), (_TEMPORARIES, held)):
        if match := pattern.search(message):
            power = " KMGT".index(match[2] or " ")
            return int(float(match[1]) * 1024**power) + beside
    return None


@contextlib.contextmanager
def _naming_failures(where: Slice) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # jaxlib's own kinds, for anything that libtpu says
        reason = f"{one_line(error):.300}"
        advice = ""
        if importlib.util.find_spec("libtpu") is None:
            advice = "plan needs libtpu: pip install 'pangu_tiny[plan]'; "
        elif "lock" in reason.lower():
            advice = "another process has libtpu open, wait for its end; "
        raise UserError(f"{where} cannot be planned: {advice}{reason}") from error
