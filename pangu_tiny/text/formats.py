"""The kinds of files that hold documents: how each is cut into parts, and a part is read."""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import zstandard
from etils import epath

from pangu_tiny.errors import UserError, failing_as

KINDS = ".txt, .jsonl, .ndjson or .json (each .gz or .zst too) or .parquet"
TFDS = "tfds:"

_SUFFIXES = re.compile(r"\.(?:(txt|jsonl|ndjson|json)(?:\.(gz|zst))?|parquet)$", re.IGNORECASE)
_HEAD = 64  # bytes that tell an encoding, and an array from a line
_LARGEST_WINDOW = 2**31  # bytes; zstd --long=31, what its format can have at most
_BATCH = 1024  # rows


class Kind(NamedTuple):
    """What a file holds, "txt", "json" (a value on each line), "parquet" or "tfds", and how it is
    compressed, "", "gz" or "zst"."""

    content: str
    compression: str = ""


def kind_of(path: str) -> Kind | None:
    """The kind of a file by its name, in letters of any case; None is no known kind."""
    if path.startswith(TFDS):
        return Kind("tfds")
    if not (match := _SUFFIXES.search(path)):
        return None
    content, compression = (group and group.lower() for group in match.groups())
    if content is None:
        return Kind("parquet")
    return Kind("txt" if content == "txt" else "json", compression or "")


def stem(path: str) -> str:
    """A file's name without the suffix of a known kind."""
    return _SUFFIXES.sub("", os.path.basename(path))


def printable(path: str) -> str:
    """A path as text; its bytes that are none (a name in another encoding) are written out."""
    return os.fsencode(path).decode(errors="backslashreplace")


def unreadable(path: str, error: Exception) -> UserError:
    """The complaint that a file or folder cannot be read."""
    return UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


@contextlib.contextmanager
def reading(path: str, kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Complains of a file where reading it raises errors of these kinds."""
    try:
        yield
    except kinds as error:
        raise unreadable(path, error) from error


@dataclasses.dataclass(frozen=True)
class Part:
    """A file or a range of one: bytes of a .jsonl, row groups of a .parquet, TFDS examples."""

    path: str
    size: int
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """A line of a file, counted from 0 at `start`; as text, path:line counted from 1."""

    path: str
    start: int
    line: int

    def __str__(self) -> str:
        line = _lines_before(self.path, self.start) + self.line + 1
        return f"{printable(self.path)}:{line}"


def split_file(path: str, size: int, unit_bytes: int) -> list[Part]:
    """Cuts a file where its format allows reading from the middle, else takes it whole."""
    kind = kind_of(path)
    if kind.content == "parquet":
        with _open_parquet(path) as file:
            groups = file.metadata.num_row_groups
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(groups)]
        return [Part(path, sizes[i], i, i + 1) for i in range(groups)]
    pieces = max(1, -(-size // unit_bytes))
    if kind.content == "tfds":
        count = len(tfds_source(path))
        cuts = [count * i // pieces for i in range(pieces + 1)]
        return [Part(path, size // pieces, a, b) for a, b in itertools.pairwise(cuts)]
    if kind == Kind("json") and pieces > 1:
        cuts = [size * i // pieces for i in range(pieces + 1)]
        return [Part(path, b - a, a, b) for a, b in itertools.pairwise(cuts)]
    return [Part(path, size)]


def read_part(part: Part, text_key: str) -> Iterator[tuple[int, str | bytes | None]]:
    """Yields (line, text) with lines from 0 at the start of the part.

    What is not UTF-8 comes as its bytes, and None is a null.
    """
    content = kind_of(part.path).content
    if content == "txt":
        yield _read_text(part)
    elif content == "json":
        for line, data in enumerate(_read_lines(part)):
            if data.strip():
                yield line, _parse_line(part, line, data, text_key)
    elif content == "parquet":
        yield from _read_parquet(part, text_key)
    else:
        yield from _read_tfds(part, text_key)


def check_head(path: str, head: bytes) -> None:
    """Refuses what a file's first bytes, uncompressed, show not to be lines of JSON in UTF-8."""
    encoding = _encoding(head)
    if not encoding.startswith("utf-8"):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        raise UserError(f"{path} is {name}, expected UTF-8, as iconv -f {name} -t UTF-8 writes it")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise UserError(
            f"{path} is one JSON array, expected an object on each line, as jq -c '.[]' writes them"
        )


def _encoding(head: bytes) -> str:
    """The encoding of text by its byte-order mark, or by the zeros that UTF-16 and UTF-32 have
    beside Latin letters; where nothing tells, UTF-8."""
    encoding = json.detect_encoding(head)
    if encoding.endswith(("-le", "-be")) and "\0" in head.decode(encoding, "ignore"):
        return "utf-8"  # zeros all over
    return encoding


def _read_text(part: Part) -> tuple[int, str | bytes]:
    with epath.Path(part.path).open("rb") as raw:
        data = b"".join(_chunks(part.path, raw))
    try:
        return 0, data.decode(_encoding(data[:_HEAD]))
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start), data


def _read_lines(part: Part) -> Iterator[bytes]:
    """The lines that start inside a part's bytes."""
    with epath.Path(part.path).open("rb") as raw:
        if kind_of(part.path).compression:
            chunks = _chunks(part.path, raw)
            first = next(chunks, b"")
            check_head(part.path, first[:_HEAD])
            yield from _join_lines(itertools.chain([first], chunks))
            return
        position = part.start
        if part.start:
            raw.seek(part.start - 1)
            position += len(raw.readline()) - 1
        else:
            check_head(part.path, raw.read(_HEAD))
            raw.seek(0)
        while part.stop is None or position < part.stop:
            if not (line := raw.readline()):
                break
            position += len(line)
            yield line


def _chunks(path: str, raw: BinaryIO) -> Iterator[bytes]:
    """A file's bytes, decompressed."""
    compression = kind_of(path).compression
    if compression == "zst":
        return _decompress_zstd(raw)
    file = gzip.GzipFile(fileobj=raw) if compression == "gz" else raw
    return iter(lambda: file.read(2**20), b"")


def _decompress_zstd(raw: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream reader takes a truncated file for a whole one.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame = None
    while data := raw.read(2**17):  # what a piece becomes lies in memory as a whole
        while data:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the compressed data ends before the end of its stream")


def _join_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    begun = []
    for chunk in chunks:
        end, *lines = chunk.split(b"\n")
        begun.append(end)
        if lines:
            yield b"".join(begun)
            begun = [lines.pop()]
            yield from lines
    if rest := b"".join(begun):
        yield rest


def _parse_line(part: Part, line: int, data: bytes, text_key: str) -> str | bytes | None:
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
        value = json.loads(text)
    except UnicodeDecodeError:
        return data
    except (ValueError, RecursionError) as error:
        if part.start:  # the head says more, and who reads it may be slower
            with epath.Path(part.path).open("rb") as file:
                check_head(part.path, file.read(_HEAD))
        place = Place(part.path, part.start, line)
        if line == part.start == 0 and getattr(error, "pos", 0) >= len(text.rstrip()):
            raise UserError(
                f"{place} has the beginning of a JSON value, expected a whole object on each line,"
                " as jq -c . writes them, or a glob that leaves this file out"
            ) from error
        raise UserError(f"{place} is not JSON: {error}") from error
    found = f"a {type(value).__name__}"
    if isinstance(value, dict):
        text = value.get(text_key)
        if isinstance(text, str) or (text is None and text_key in value):
            return text
        found = f"{text!r:.40} there" if text_key in value else f"keys {sorted(value)!s:.200}"
    place = Place(part.path, part.start, line)
    raise UserError(f"{place} has {found}, expected a string under {text_key!r}")


def _read_parquet(part: Part, text_key: str) -> Iterator[tuple[int, str | bytes | None]]:
    import pyarrow

    with _open_parquet(part.path) as file:
        _check_column(part.path, file.schema_arrow, text_key)
        line = 0
        for batch in file.iter_batches(
            _BATCH, row_groups=list(range(part.start, part.stop or 0)), columns=[text_key]
        ):
            # As bytes, for Arrow does not check that its strings are UTF-8.
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                yield line, value if value is None else _decode(value)
                line += 1


def _check_column(path: str, schema: Any, text_key: str) -> None:
    import pyarrow

    times = schema.names.count(text_key)
    if times != 1:
        found = f"columns {schema.names!s:.200}" if not times else f"{times} columns {text_key!r}"
        raise UserError(f"{path} has {found}, expected strings in {text_key!r}")
    kind = found = schema.field(text_key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
    ):
        raise UserError(f"{path} has {found} in column {text_key!r}, expected strings")


def _read_tfds(part: Part, text_key: str) -> Iterator[tuple[int, str | bytes | None]]:
    source = tfds_source(part.path)
    for line in range(part.stop - part.start):
        example = source[part.start + line]
        value = example.get(text_key, ...) if isinstance(example, dict) else ...
        if not isinstance(value, bytes | str | None):
            names = sorted(example) if isinstance(example, dict) else type(example).__name__
            raise UserError(f"{part.path} has features {names}, expected text in {text_key!r}")
        yield line, _decode(value) if isinstance(value, bytes) else value


def _lines_before(path: str, start: int) -> int:
    """How many lines of a file lie before a part of it."""
    if not start:
        return 0
    content = kind_of(path).content
    if content == "parquet":
        with _open_parquet(path) as file:
            return sum(file.metadata.row_group(i).num_rows for i in range(start))
    if content == "tfds":
        return start
    # A part of lines starts at the first line that starts in it.
    lines, left = 0, start - 1
    with epath.Path(path).open("rb") as file:
        while left and (data := file.read(min(left, 2**20))):
            lines += data.count(b"\n")
            left -= len(data)
        return lines + bool(file.readline())


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    with reading(path), failing_as(f"{path} is not a Parquet file", pyarrow.ArrowInvalid):
        return pyarrow.parquet.ParquetFile(epath.Path(path).open("rb"))


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
    # TFDS raises whatever lies beneath it: no such set, split, network, or TensorFlow.
    with failing_as(f"text {item} cannot be opened as a TFDS set stored as ArrayRecord"):
        if epath.Path(name).is_dir():
            return tfds.builder_from_directory(name).as_data_source(split)
        return tfds.data_source(name, split=split)


def _decode(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
