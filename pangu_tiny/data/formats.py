"""The kinds of files that hold documents: how each is cut into parts, and a part is read."""

import dataclasses
import functools
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard
from etils import epath

from pangu_tiny.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TFDS = "tfds:"


@dataclasses.dataclass(frozen=True)
class Part:
    """A file or a range of one: bytes of a .jsonl, row groups of a .parquet, TFDS examples."""

    path: str
    size: int
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """A line of a file, counted from 0 at `start`; as text, path:line counted from 1."""

    path: str
    start: int
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{_lines_before(self.path, self.start) + self.line + 1}"


def split_file(path: str, size: int, unit_bytes: int) -> list[Part]:
    """Cuts a file where its format allows reading from the middle, else takes it whole."""
    if path.endswith(".parquet"):
        with _open_parquet(path) as file:
            groups = file.metadata.num_row_groups
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(groups)]
        return [Part(path, sizes[i], i, i + 1) for i in range(groups)]
    pieces = max(1, -(-size // unit_bytes))
    if path.startswith(TFDS):
        count = len(tfds_source(path))
        cuts = [count * i // pieces for i in range(pieces + 1)]
        return [Part(path, size // pieces, a, b) for a, b in itertools.pairwise(cuts)]
    if path.endswith(".jsonl") and pieces > 1:
        cuts = [size * i // pieces for i in range(pieces + 1)]
        return [Part(path, b - a, a, b) for a, b in itertools.pairwise(cuts)]
    return [Part(path, size)]


def read_part(part: Part, text_key: str) -> Iterator[tuple[int, str | None]]:
    """Yields (line, text) with lines from 0 at the start of the part; None is not UTF-8."""
    if part.path.endswith(".txt"):
        data = epath.Path(part.path).read_bytes()
        try:
            yield 0, data.decode()
        except UnicodeDecodeError as error:
            yield data.count(b"\n", 0, error.start), None
    elif part.path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        for line, data in enumerate(_read_lines(part)):
            if data.strip():
                yield line, _parse_line(part, line, data, text_key)
    elif part.path.endswith(".parquet"):
        yield from _read_parquet(part, text_key)
    else:
        yield from _read_tfds(part, text_key)


def _read_lines(part: Part) -> Iterator[bytes]:
    """The lines that start inside a part's bytes."""
    with epath.Path(part.path).open("rb") as raw:
        if part.path.endswith(".gz"):
            yield from gzip.GzipFile(fileobj=raw)
        elif part.path.endswith(".zst"):
            yield from _join_lines(_decompress_zstd(raw))
        else:
            position = part.start
            if part.start:
                raw.seek(part.start - 1)
                position += len(raw.readline()) - 1
            while part.stop is None or position < part.stop:
                if not (line := raw.readline()):
                    break
                position += len(line)
                yield line


def _decompress_zstd(raw: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream reader takes a truncated file for a whole one.
    frame = None
    while data := raw.read(2**20):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the compressed data ends before the end of its stream")


def _join_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _parse_line(part: Part, line: int, data: bytes, text_key: str) -> str | None:
    try:
        value = json.loads(data.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{Place(part.path, part.start, line)} is not JSON: {error}") from error
    found = f"a {type(value).__name__}"
    if isinstance(value, dict):
        text = value.get(text_key)
        if isinstance(text, str):
            return text
        found = f"{text!r:.40} there" if text_key in value else f"keys {sorted(value)}"
    raise UserError(
        f"{Place(part.path, part.start, line)} has {found}; expected a string under {text_key!r}"
    )


def _read_parquet(part: Part, text_key: str) -> Iterator[tuple[int, str | None]]:
    import pyarrow

    with _open_parquet(part.path) as file:
        schema = file.schema_arrow
        kind = schema.field(text_key).type if text_key in schema.names else None
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary()):
            raise UserError(
                f"{part.path} has columns {schema.names}; expected strings in {text_key!r}"
            )
        line = 0
        for batch in file.iter_batches(
            row_groups=list(range(part.start, part.stop or 0)), columns=[text_key]
        ):
            # As bytes, for Arrow does not check that its strings are UTF-8.
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                yield line, _decode(value or b"")
                line += 1


def _read_tfds(part: Part, text_key: str) -> Iterator[tuple[int, str | None]]:
    source = tfds_source(part.path)
    for line in range(part.stop - part.start):
        example = source[part.start + line]
        value = example.get(text_key) if isinstance(example, dict) else None
        if not isinstance(value, bytes | str):
            names = sorted(example) if isinstance(example, dict) else type(example).__name__
            raise UserError(f"{part.path} has features {names}; expected text in {text_key!r}")
        yield line, value if isinstance(value, str) else _decode(value)


def _lines_before(path: str, start: int) -> int:
    """How many lines of a file lie before a part of it."""
    if not start:
        return 0
    if path.endswith(".parquet"):
        with _open_parquet(path) as file:
            return sum(file.metadata.row_group(i).num_rows for i in range(start))
    if path.startswith(TFDS):
        return start
    # A part of a .jsonl starts at the first line that starts in it.
    lines, left = 0, start - 1
    with epath.Path(path).open("rb") as file:
        while left and (data := file.read(min(left, 2**20))):
            lines += data.count(b"\n")
            left -= len(data)
        return lines + bool(file.readline())


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(epath.Path(path).open("rb"))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error


def tfds_name(item: str) -> tuple[str, str]:
    """The name or folder and the split; a name may end in a version, as in c4/en:3.1.0."""
    name, colon, last = item.removeprefix(TFDS).rpartition(":")
    if not colon or re.fullmatch(r"[\d.*]+", last):
        return item.removeprefix(TFDS), "train"
    return name, last


@functools.lru_cache(maxsize=8)
def tfds_source(item: str) -> Any:
    import tensorflow_datasets as tfds

    name, split = tfds_name(item)
    try:
        if epath.Path(name).is_dir():
            return tfds.builder_from_directory(name).as_data_source(split)
        return tfds.data_source(name, split=split)
    except Exception as error:
        # TFDS raises whatever lies beneath it: no such set, split, network, or TensorFlow.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"text {item} cannot be opened as a TFDS set stored as ArrayRecord: {reason}"
        ) from error


def _decode(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
