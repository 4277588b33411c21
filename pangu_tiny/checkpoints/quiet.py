"""What threads of Orbax and TensorStore print of a failure that is said in one line elsewhere."""

import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

_LOGGERS = [logging.getLogger(name) for name in ("absl", "asyncio")]


class _Traces(logging.Filter):
    """Keeps records with a stack trace for itself, and lets all others pass."""

    def __init__(self):
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        self.records.append(record)
        return False


_TRACES = _Traces()


def hold_traces() -> None:
    """Holds back the stack traces that absl and asyncio log while a checkpoint is written, until it
    is known whether that failed; then the line that says it stands for them."""
    _TRACES.records.clear()
    for logger in _LOGGERS:
        logger.addFilter(_TRACES)


def release_traces() -> None:
    """To be called where the write went well: they are of something else."""
    for logger in _LOGGERS:
        logger.removeFilter(_TRACES)
    for record in _TRACES.records:
        logging.getLogger(record.name).handle(record)
    _TRACES.records.clear()


def ignore_leftovers() -> None:
    """Silences what the chunks that were under way print when a read or write has failed, each a
    stack trace, once the event loop that they belong to is closed."""
    if not isinstance(sys.unraisablehook, _WithoutLeftovers):
        sys.unraisablehook = _WithoutLeftovers(sys.unraisablehook)  # type: ignore[assignment]


class _WithoutLeftovers(NamedTuple):
    before: Callable[[Any], None]

    def __call__(self, unraisable: Any) -> None:
        source = getattr(unraisable.object, "cr_code", None)
        of_orbax = source and ocp.__path__[0] in source.co_filename
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            self.before(unraisable)
