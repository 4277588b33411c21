"""The workdir of a stage that runs in several processes: one claim, by the first of them."""

import contextlib
import importlib.metadata
import json
import os
import uuid
from typing import Any

from etils import epath

import pangu_tiny
from pangu_tiny.errors import UserError
from pangu_tiny.topology import processes
from pangu_tiny.workdir import absolute, claim, difference, naming_what_cannot_be_written


def claim_together(
    workdir: str, stage: str, identity: dict[str, Any], advice: dict[str, str] | None = None
) -> epath.Path:
    """`claim` for a stage of several JAX processes on one shared folder, by the first of them."""

    if not processes.several():
        return claim(workdir, stage, identity, advice)
    versions = {"pangu_tiny": pangu_tiny.__version__, "jax": importlib.metadata.version("jax")}
    facts = json.loads(json.dumps({"stage": stage, "version": versions, **identity}))
    processes.check_alike(facts, difference)
    with processes.led() as leads:
        if leads:
            claim(workdir, stage, identity, advice)
    _check_shared(absolute(workdir))
    return absolute(workdir)


def _check_shared(folder: epath.Path) -> None:
    """Refuses a folder that is not one and the same for all processes, or not to be written."""
    nonce = processes.from_first(lambda: uuid.uuid4().hex)
    marks = [folder / f".{nonce}.{index}.tmp" for index in range(processes.count())]
    mine = marks[processes.index()]
    try:
        processes.check_everywhere(lambda: _leave_mark(mine))
        others = marks if processes.first() else marks[:1]
        processes.check_everywhere(lambda: _check_seen(folder, others))
    finally:
        with contextlib.suppress(OSError):  # it cannot be removed where it could not be written
            mine.unlink(missing_ok=True)


def _leave_mark(mark: epath.Path) -> None:
    if not mark.parent.exists() and "://" not in os.fspath(mark):
        raise UserError(
            f"workdir {mark.parent} is not there, though process 0 has it: expected a folder that "
            f"all processes share"
        )
    with naming_what_cannot_be_written(mark.parent):
        mark.write_text("")


def _check_seen(folder: epath.Path, marks: list[epath.Path]) -> None:
    if missing := [index for index, mark in enumerate(marks) if not mark.exists()]:
        raise UserError(
            f"workdir {folder} does not show what process {missing[0]} wrote there: expected a "
            f"folder that all processes share"
        )
