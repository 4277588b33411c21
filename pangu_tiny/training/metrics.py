"""What a run writes while it trains: metrics step by step, and the loss of every row."""

import json
import math
import shutil
import tempfile
import time
import uuid
from typing import Any

import jax
import numpy as np
from etils import epath

from pangu_tiny.errors import UserError
from pangu_tiny.workdir import write_atomically

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""bfloat16 operations per second of one device, by the start of its name, as its vendor says."""

MFU_FORMULA = (
    "MFU = tokens/s × (6 × multiplying weights + 6 × depth × sequence × heads × head_dim) "
    "/ (devices × peak FLOP/s)"
)

ROW_DTYPE = np.dtype([("step", "<i8"), ("row", "<i8"), ("nats", "<f4"), ("targets", "<i4")])
"""One trained row: the step (from 0), its row id, the sum of its losses, how many targets."""


def peak_flops() -> float | None:
    """Of all devices together; None where the kind of device is not known (a CPU, say)."""
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] * jax.device_count() if names else None


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Nats summed over all targets of some documents, per raw UTF-8 byte of them, in bits."""
    return nats / math.log(2) / text_bytes


class MetricsLog:
    """`metrics/FIRST.jsonl`, the figures of the steps from FIRST to the next checkpoint, and
    TensorBoard events of the same; on a resumed run, what came later is dropped.

    A line is appended where the folder is local. Objects of gs:// and the like cannot be appended
    to: there a file is written whole, with the checkpoint.

    Args:
      folder: the run's workdir.
      start: first step that this process will log.
      tensorboard: whether to write events as well.
    """

    def __init__(self, folder: epath.Path, start: int, tensorboard: bool = True):
        self._folder, self._first = folder / "metrics", start
        self._folder.mkdir(parents=True, exist_ok=True)
        self._local = "://" not in str(folder)
        self._lines: list[str] = []
        for first, path in _metrics_files(folder).items():
            if first >= start:
                path.unlink()
        self._events = Events(folder / "tensorboard", start) if tensorboard else None

    def log(self, step: int, **figures: Any) -> None:
        """Adds a line for `step` (0 is the first)."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **figures})
        self._lines.append(f"{line}\n")
        if self._local:
            with self._path.open("a") as file:
                file.write(self._lines.pop())
        if self._events:
            self._events.add(step, figures)

    def flush(self, end: int) -> None:
        """To be called with every checkpoint, of so many steps: a run that resumes from it finds
        what came before."""
        if self._lines:
            write_atomically(self._path, "".join(self._lines))
        self._first, self._lines = end, []
        if self._events:
            self._events.flush()

    def close(self) -> None:
        self.flush(self._first)
        if self._events:
            self._events.close()

    @property
    def _path(self) -> epath.Path:
        return self._folder / f"{self._first:09d}.jsonl"


class Events:
    """TensorBoard's; where the folder is not local, a file of them is copied there with every
    checkpoint."""

    def __init__(self, folder: epath.Path, start: int):
        self._folder = folder if "://" in str(folder) else None
        self._here = tempfile.mkdtemp() if self._folder else str(folder)
        self._purged: int | None = start  # events from this step on, of a run that went further
        self._writer: Any = None

    def add(self, step: int, figures: dict[str, Any]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # Files that are begun within a second must not have the same name.
            suffix = f".{uuid.uuid4().hex[:8]}"
            self._writer = SummaryWriter(
                self._here, purge_step=self._purged, filename_suffix=suffix
            )
            self._purged = None
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def flush(self) -> None:
        if self._folder and self._writer:
            self._writer.close()
            self._writer = None
            self._folder.mkdir(parents=True, exist_ok=True)
            for file in epath.Path(self._here).iterdir():
                (self._folder / file.name).write_bytes(file.read_bytes())
                file.unlink()

    def close(self) -> None:
        self.flush()
        if self._writer:
            self._writer.close()
        if self._folder:
            shutil.rmtree(self._here)


def _metrics_files(folder: epath.Path) -> dict[int, epath.Path]:
    """The files of `MetricsLog` below a folder, by their first step, in order."""
    place = folder / "metrics"
    paths = place.iterdir() if place.exists() else ()
    files = [path for path in paths if path.name[:1] != "."]  # not what a kill left
    for path in files:
        if not (path.suffix == ".jsonl" and path.stem.isdecimal()):
            raise UserError(f"{path} is not a file of figures, which are named FIRST.jsonl")
    return dict(sorted((int(path.stem), path) for path in files))


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """All lines of a run's `metrics/`."""
    files = _metrics_files(epath.Path(workdir)).values()
    return [line for path in files for line in _read_lines(path)]


def _read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a file, without a last one that a kill left unfinished."""
    *lines, _ = path.read_bytes().split(b"\n")
    return [_parse_line(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]


def _parse_line(place: str, line: bytes) -> dict[str, Any]:
    try:
        figures = json.loads(line.decode())
        int(figures["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{place} is damaged: {line!r:.60}; take the line out") from error
    return figures


class RowLosses:
    """The loss of every row that was trained, in one file of `ROW_DTYPE` records per checkpoint.

    The file of steps [a, b) is `row_losses/a-b.bin`, written when the checkpoint of step b is, so
    that a run that resumes from b finds exactly the rows that its parameters have seen.
    """

    def __init__(self, folder: epath.Path, start: int):
        self._folder = folder / "row_losses"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._start = start
        self._records: list[np.ndarray] = []
        for (_, end), path in row_loss_files(folder).items():
            if end > start:
                path.unlink()

    def add(
        self, step: int | np.ndarray, row_ids: np.ndarray, nats: np.ndarray, targets: np.ndarray
    ) -> None:
        records = np.empty(len(row_ids), ROW_DTYPE)
        records["step"], records["row"] = step, row_ids
        records["nats"], records["targets"] = nats, targets
        self._records.append(records)

    def flush(self, end: int) -> None:
        """Writes what was added since the last flush, as the rows of the steps before `end`."""
        if end > self._start:
            content = np.concatenate(self._records).tobytes()
            write_atomically(self._folder / f"{self._start:09d}-{end:09d}.bin", content)
        self._start, self._records = end, []


def row_loss_files(folder: epath.Path) -> dict[tuple[int, int], epath.Path]:
    """What `RowLosses` wrote below a folder: the files by [first, last) step, in order."""
    place = folder / "row_losses"
    paths = place.iterdir() if place.exists() else ()
    found = {_range(path): path for path in paths if path.suffix == ".bin"}
    return dict(sorted(found.items()))


def read_records(path: epath.Path) -> np.ndarray:
    """The records of one of these files, a structured array of `ROW_DTYPE`."""
    start, end = _range(path)
    content = path.read_bytes()
    each, rest = divmod(len(content), (end - start) * ROW_DTYPE.itemsize)
    if each and not rest:
        records = np.frombuffer(content, ROW_DTYPE)
        if (records["step"] == np.repeat(np.arange(start, end), each)).all():
            return records
    raise UserError(
        f"{path} is damaged: it holds {len(content)} bytes, expected as many records of"
        f" {ROW_DTYPE.itemsize} bytes for each step from {start} to {end - 1}"
    )


def read_row_losses(workdir: str) -> np.ndarray:
    """All rows that a run trained, in order: a structured array of `ROW_DTYPE`."""
    files = row_loss_files(epath.Path(workdir)).values()
    return np.concatenate([np.empty(0, ROW_DTYPE), *map(read_records, files)])


def _range(path: epath.Path) -> tuple[int, int]:
    start, _, end = path.stem.partition("-")
    if not (start.isdecimal() and end.isdecimal() and int(start) < int(end)):
        raise UserError(f"{path} is not a file of row losses, which are named FIRST-END.bin")
    return int(start), int(end)
