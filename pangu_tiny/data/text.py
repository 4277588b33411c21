"""Documents from text files and text data sets, and the one rule for holding some of them out.

    .txt                               one document a file
    .jsonl  .jsonl.gz  .jsonl.zst      one document a line, under a key
    .parquet                           one document a row, in a column
    a folder or a glob                 all such files in it, in the order of their paths
    tfds:NAME[:SPLIT]                  a TFDS data set (or the folder of one), stored as ArrayRecord

Paths go through epath, so gs:// and s3:// work. Text is cut into units that can be read on their
own and in any order; which units there are depends on the text alone.
"""

import dataclasses
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import zstandard
from etils import epath

from pangu_tiny.data.formats import (
    SUFFIXES,
    TFDS,
    Part,
    Place,
    read_part,
    split_file,
    tfds_name,
    tfds_source,
)
from pangu_tiny.errors import UserError

Text = str | list[str] | dict[str, str | list[str]]

_NAMED = 5  # skipped documents named, of each kind
_BATCH = 2**20  # characters
_SMALLEST_UNIT = 1024  # bytes; each leaves a file


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: by the sha256 of its UTF-8, in every stage alike."""
    return is_held_out(document_digest(text.encode()), fraction)


def is_held_out(digest: int, fraction: float) -> bool:
    """`held_out`, of a digest that is known."""
    return digest >> 192 < fraction * 2**64


def document_digest(utf8: bytes) -> int:
    """sha256 of a document, as a number of 256 bits."""
    return int.from_bytes(hashlib.sha256(utf8).digest(), "big")


@dataclasses.dataclass(frozen=True)
class Source:
    """A named corpus: its files, with their sizes in bytes."""

    name: str
    files: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)

    def fingerprint(self) -> str:
        """A digest of the size, first and last 64 KiB of every file, not of paths."""
        digest = hashlib.sha256()
        for path, size in self.files:
            digest.update(f"{size}\n".encode())
            if path.startswith(TFDS):
                info = tfds_source(path).dataset_info
                digest.update(f"{info.full_name} {len(tfds_source(path))}".encode())
                continue
            with epath.Path(path).open("rb") as file:
                digest.update(file.read(2**16))
                file.seek(max(0, size - 2**16))
                digest.update(file.read())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """What `workdir.claim` compares."""
        return {
            "name": self.name,
            "files": len(self.files),
            "bytes": self.size,
            "fingerprint": self.fingerprint(),
        }


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one process reads at a time: neighbouring parts of one source."""

    source: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


@dataclasses.dataclass
class Skipped:
    """Documents left out, counted by kind, with the places of the first few."""

    empty: int = 0
    bad_utf8: int = 0
    empty_places: list[Place] = dataclasses.field(default_factory=list)
    bad_utf8_places: list[Place] = dataclasses.field(default_factory=list)

    def add(self, other: "Skipped") -> None:
        self.empty += other.empty
        self.bad_utf8 += other.bad_utf8
        self.empty_places = (self.empty_places + other.empty_places)[:_NAMED]
        self.bad_utf8_places = (self.bad_utf8_places + other.bad_utf8_places)[:_NAMED]


def find_sources(text: Text) -> list[Source]:
    """Finds the files of a `text` argument.

    Args:
      text: a file, folder, glob or tfds: name; a list of them, each a source named after its stem
        or folder; or a dict from source name to one or several of them.

    Raises:
      UserError: a path is missing, holds no documents, or two sources have the same name.
    """
    if isinstance(text, dict):
        named = list(text.items())
    else:
        items = [text] if isinstance(text, str) else list(text)
        named = [(_source_name(item), item) for item in items]
    if not named:
        raise UserError("text names nothing; expected a file, folder, glob or tfds:NAME")
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"text has two sources named {name!r}; give a dict from source name to path"
            )
    return [
        Source(name, tuple(f for p in ([s] if isinstance(s, str) else s) for f in _find_files(p)))
        for name, s in named
    ]


def split_units(sources: list[Source], unit_bytes: int | None = None) -> list[Unit]:
    """Cuts sources into units of about `unit_bytes` bytes; sources and files keep their order.

    By default a unit is 1/256 of all, from 4 to 256 MiB, but no less than 1/1024 of all.

    Raises:
      UserError: there is nothing to cut.
    """
    total = sum(source.size for source in sources)
    unit_bytes = unit_bytes or max(min(max(total // 256, 2**22), 2**28), total // 1024)
    units = []
    for source in sources:
        parts: list[Part] = []
        filled = 0
        for path, size in source.files:
            for part in split_file(path, size, unit_bytes):
                if parts and filled + part.size > unit_bytes:
                    units.append(Unit(source.name, tuple(parts)))
                    parts, filled = [], 0
                parts.append(part)
                filled += part.size
        if parts:
            units.append(Unit(source.name, tuple(parts)))
    if not units:
        raise UserError(f"text {', '.join(s.name for s in sources)} holds no documents")
    return units


def read_documents(
    unit: Unit, skipped: Skipped, text_key: str = "text", bad_utf8: str = "skip"
) -> Iterator[str]:
    """Yields the documents of a unit; each has a character that is not white space.

    Args:
      unit: what to read.
      skipped: is told of the documents that are left out.
      text_key: the key, column or feature that holds the text.
      bad_utf8: "skip" leaves out documents that are not UTF-8, "fail" stops at the first.

    Raises:
      UserError: a file cannot be read, a line is no JSON object with text under `text_key`, or a
        document is not UTF-8 and `bad_utf8` is "fail".
    """
    for part in unit.parts:
        try:
            for line, text in read_part(part, text_key):
                # JSON can spell surrogates ("\ud800"), which are no characters.
                if text is None or not _is_unicode(text):
                    place = Place(part.path, part.start, line)
                    if bad_utf8 == "fail":
                        raise UserError(f"{place} is not UTF-8, and bad_utf8 is 'fail'")
                    skipped.add(Skipped(bad_utf8=1, bad_utf8_places=[place]))
                elif not text or text.isspace():
                    place = Place(part.path, part.start, line)
                    skipped.add(Skipped(empty=1, empty_places=[place]))
                else:
                    yield text
        except (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{part.path} cannot be read: {error}") from error


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Groups documents so that a group has about a million characters."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def check_reading(
    stage: str,
    held_out_fraction: float,
    processes: int | None,
    bad_utf8: str,
    **unit_bytes: int | None,
) -> None:
    """Refuses what no stage that reads text can do.

    Raises:
      UserError: names the parameter of `stage`.
    """
    if not 0 <= held_out_fraction < 1:
        raise UserError(
            f"{stage}.held_out_fraction is {held_out_fraction}; expected from 0 to below 1"
        )
    if processes is not None and processes < 1:
        raise UserError(f"{stage}.processes is {processes}; expected at least 1")
    if bad_utf8 not in ("skip", "fail"):
        raise UserError(f"{stage}.bad_utf8 is {bad_utf8!r}; expected 'skip' or 'fail'")
    for name, size in unit_bytes.items():
        if size is not None and size < _SMALLEST_UNIT:
            raise UserError(f"{stage}.{name} is {size}; expected at least {_SMALLEST_UNIT:,}")


def _source_name(item: str) -> str:
    if item.startswith(TFDS):
        return os.path.basename(tfds_name(item)[0].rstrip("/"))
    fixed = [name for name in item.rstrip("/").split("/") if not _is_glob(name)]
    name = fixed[-1] if fixed else item
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name or item


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def _find_files(item: str) -> list[tuple[str, int]]:
    if item.startswith(TFDS):
        source = tfds_source(item)
        size = source.dataset_info.splits[source.split].num_bytes
        return [(item, max(size, len(source)))]
    path = epath.Path(item)
    if _is_glob(item) and not path.exists():
        if "**" in item:
            raise UserError(f"text {item}: ** is not known; a folder is searched to its bottom")
        names = item.split("/")
        first = next(i for i, name in enumerate(names) if _is_glob(name))
        base = epath.Path("/".join(names[:first]) or ("/" if item.startswith("/") else "."))
        found = base.glob("/".join(names[first:])) if base.exists() else ()
    elif path.is_dir():
        found = [folder / name for folder, _, names in path.walk() for name in names]
    elif path.is_file():
        if not item.endswith(SUFFIXES):
            raise UserError(f"text {item} is of no known kind; expected {', '.join(SUFFIXES)}")
        return [(item, path.stat().length)]
    else:
        raise UserError(f"text {item} does not exist; expected a file, folder, glob or tfds:NAME")
    files = sorted(
        (os.fspath(file), file.stat().length)
        for file in found
        if file.name.endswith(SUFFIXES) and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise UserError(f"text {item} holds no documents; expected {', '.join(SUFFIXES)} files")
    return files


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
