"""Whether text is still what a folder was made of, wherever in its files a change may be.

Of each part of a file that is read two things are kept: when the file was last changed, and a
digest of the part's documents in their order and of what was skipped. A file that has another time
of change later is read again and compared. So a copy, or a file that was only touched, takes one
more reading, and is the same text. (Not seen is what leaves the time as it was: an edit within one
tick of the file system's clock after the reading, or one whose time was set back.)

While a stage works, a unit's records lie beside its result, in `NNNNN.text.json`; in the finished
folder all of them are in

    text.npz    changed: int64 [parts], nanoseconds since 1970; 0 for TFDS, whose sets have versions
                digests: uint8 [parts, 32]; in the order of the units
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import fsspec
import numpy as np
from etils import epath

from pangu_tiny.arrays import read_arrays, write_arrays
from pangu_tiny.errors import UserError
from pangu_tiny.jobs import Job, run_here
from pangu_tiny.text.documents import Unit, document_digest, read_documents
from pangu_tiny.text.formats import TFDS, Part, printable, reading
from pangu_tiny.text.left_out import Skipped
from pangu_tiny.workdir import read_json, write_atomically

TEXT = "text.npz"


class Reading(NamedTuple):
    """How files become documents, as `read_documents` takes it."""

    text_key: str
    bad_utf8: str


class Record(NamedTuple):
    """What is kept of a part that was read; the digest in hexadecimal."""

    changed: int
    digest: str


class Reader:
    """Reads a unit. At its end `records` has those of its parts, `skipped` what was left out."""

    def __init__(self, unit: Unit, reading: Reading):
        self._unit, self._reading = unit, reading
        self.skipped = Skipped()
        self.records: list[Record] = []

    def __iter__(self) -> Iterator[tuple[str, bytes, int]]:
        """Yields each document, its UTF-8 and its `document_digest`."""
        for part in self._unit.parts:
            changed = _changed(part.path)  # before it is opened: a later change is not read
            digest, skipped = hashlib.sha256(), Skipped()
            for text in read_documents(Unit(self._unit.source, (part,)), skipped, *self._reading):
                utf8 = text.encode()
                of_document = document_digest(utf8)
                digest.update(of_document.to_bytes(32, "big"))
                yield text, utf8, of_document
            if skipped.places:
                digest.update(_facts(skipped))
                self.skipped += skipped
            self.records.append(Record(changed, digest.hexdigest()))


@dataclasses.dataclass(frozen=True)
class UnitJob(Job):
    """A unit of text, to be read with a `Reader`."""

    unit: Unit
    reading: Reading

    @property
    def size(self) -> int:
        return self.unit.size

    @property
    def _records(self) -> epath.Path:
        return self.result.with_suffix(".text.json")

    def keep_records(self, records: Sequence[Record]) -> None:
        """Leaves what its parts were beside the result, which has to be written after that."""
        write_atomically(self._records, json.dumps({"parts": records}))

    def kept_records(self) -> list[Record]:
        """What `keep_records` left."""
        file = self._records
        if not file.exists():
            raise UserError(
                f"{file} is missing: {self.result.name} beside it is of an earlier version; choose"
                " another workdir"
            )
        return [Record(*part) for part in read_json(file, "parts")["parts"]]


@dataclasses.dataclass(frozen=True)
class TextRecord:
    """What the text of a stage was when it was read.

    Attributes:
      folder: of the stage.
      reading: as its jobs read.
      processes: that compare; None is one for each core.

    Each method raises UserError where a file has changed; it is named.
    """

    folder: epath.Path
    reading: Reading
    processes: int | None

    def check(self, jobs: Sequence[UnitJob], finished: bool) -> None:
        """Compares the text with what the finished folder was made of, or those jobs that an
        interrupted run has done."""
        if not finished:
            self._compare_units([job for job in jobs if job.result.exists()])
        elif (self.folder / TEXT).exists():
            before = self._read()
            if (after := self._compare(_parts(jobs), before)) != before:
                self._write(after)
        else:
            print(
                f"{self.folder} was made by an earlier version, which kept no digests of its text:"
                " whether that has changed since is not known"
            )

    def keep(self, jobs: Sequence[UnitJob]) -> None:
        """Compares the text of all jobs, now that they are done, and keeps what it was."""
        self._write(self._compare_units(jobs))

    def _compare_units(self, jobs: Sequence[UnitJob]) -> list[Record]:
        units = [job.kept_records() for job in jobs]
        parts = _parts(jobs)
        records = self._compare(parts, list(itertools.chain(*units)))
        rest = iter(records)
        for job, before in zip(jobs, units, strict=True):
            if (after := list(itertools.islice(rest, len(before)))) != before:
                job.keep_records(after)
        return records

    def _compare(self, parts: Sequence[Part], records: Sequence[Record]) -> list[Record]:
        """The same records, with the times of change as they are now."""
        if len(parts) != len(records):
            raise UserError(
                f"the text has {len(parts)} parts, {self.folder} was made of {len(records)}; choose"
                " another workdir"
            )
        paths = {part.path for part in parts}
        with concurrent.futures.ThreadPoolExecutor(32) as pool:  # in a bucket each takes its time
            now = dict(zip(paths, pool.map(_changed, paths), strict=True))
        jobs = [
            _Comparison(part, record.digest, self.reading, os.fspath(self.folder))
            for part, record in zip(parts, records, strict=True)
            if now[part.path] != record.changed
        ]
        if jobs:
            first, *others = dict.fromkeys(printable(job.part.path) for job in jobs)
            files = f"{first} and {len(others):,} more" if others else first
            print(
                f"text changed since it was read for {self.folder}, or is another copy ({files});"
                " comparing it whole",
                flush=True,
            )
            run_here(jobs, None, self.processes, "comparing")
            print("it is the same text")
        return [
            record._replace(changed=now[part.path])
            for part, record in zip(parts, records, strict=True)
        ]

    def _read(self) -> list[Record]:
        arrays = read_arrays(self.folder / TEXT)
        return [
            Record(int(changed), digest.tobytes().hex())
            for changed, digest in zip(arrays["changed"], arrays["digests"], strict=True)
        ]

    def _write(self, records: Sequence[Record]) -> None:
        digests = b"".join(bytes.fromhex(record.digest) for record in records)
        arrays: dict[str, np.ndarray] = {
            "changed": np.array([record.changed for record in records], np.int64),
            "digests": np.frombuffer(digests, np.uint8).reshape(len(records), 32),
        }
        write_arrays(self.folder / TEXT, arrays)


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """A part to read again, and the digest that it had."""

    part: Part
    digest: str
    reading: Reading
    folder: str

    @property
    def size(self) -> int:
        return self.part.size

    def run(self, _: None) -> None:
        reader = Reader(Unit("", (self.part,)), self.reading)
        for _document in reader:
            pass
        if reader.records[0].digest != self.digest:
            raise UserError(
                f"text {printable(self.part.path)} has changed since it was read for {self.folder};"
                " choose another workdir"
            )


def _parts(jobs: Sequence[UnitJob]) -> list[Part]:
    return [part for job in jobs for part in job.unit.parts]


def _changed(path: str) -> int:
    """When a file was last changed, in nanoseconds since 1970."""
    if path.startswith(TFDS):
        return 0
    with reading(printable(path)):
        # Not by epath, which knows whole seconds.
        if "://" not in path:
            return os.stat(path).st_mtime_ns
        filesystem, name = fsspec.core.url_to_fs(path)
        return round(filesystem.modified(name).timestamp() * 1e9)


def _facts(skipped: Skipped) -> bytes:
    """What is told of skipped documents, without the names of files."""
    places = {
        kind: [(place.start, place.line) for place in found]
        for kind, found in skipped.places.items()
    }
    return json.dumps(vars(skipped) | {"places": places}, sort_keys=True).encode()
