"""Documents from text files and text data sets, and the one rule for holding some of them out.

    .txt                               one document a file
    .jsonl  .ndjson  .json             one document a line, a JSON object with text under a key
    .parquet                           one document a row, in a column
    tfds:NAME[:SPLIT]                  a TFDS data set (or the folder of one), stored as ArrayRecord

Names are taken in letters of any case, and all but .parquet end in .gz or .zst too. Text is UTF-8;
a .txt may be UTF-16 or UTF-32 where a byte-order mark or its zeros say so. `sources` finds the
files in folders and globs. Documents are skipped, counted and named that are

    empty                              without a character that is not white space
    null                               of JSON, Parquet or TFDS
    not UTF-8                          or have surrogates, which are no characters

Paths go through epath, so gs:// and s3:// work. Text is cut into units that can be read on their
own and in any order; which units there are depends on the text alone.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Iterator

import zstandard

from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.text.formats import Part, Place, read_part, reading, split_file
from pangu_tiny.text.left_out import Skipped
from pangu_tiny.text.sources import Source

_BATCH = 2**20  # characters
# The last of them is pyarrow's, for a compression that it was built without.
_UNREADABLE = (
    OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError, NotImplementedError,
)  # fmt: skip
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
class Unit:
    """What one process reads at a time: neighbouring parts of one source."""

    source: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def split_units(sources: list[Source], unit_bytes: int | None = None) -> list[Unit]:
    """Cuts sources into units of about `unit_bytes` bytes; sources and files keep their order.

    By default a unit is 1/256 of all, from 4 to 256 MiB, but no less than 1/1024 of all.
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
      skipped: is told of the documents that are left out.
      text_key: the key, column or feature that holds the text.
      bad_utf8: "skip" leaves out documents that are not UTF-8, "fail" stops at the first.
    """
    for part in unit.parts:
        with reading(part.path, _UNREADABLE):
            for line, text in read_part(part, text_key):
                if text is None:
                    skipped.add("null", Place(part.path, part.start, line))
                # JSON can spell surrogates ("\ud800"), which are no characters.
                elif isinstance(text, bytes) or not _is_unicode(text):
                    place = Place(part.path, part.start, line)
                    if bad_utf8 == "fail":
                        raise UserError(f"{place} is not UTF-8, and bad_utf8 is 'fail'")
                    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
                    skipped.add("bad_utf8", place, len(data))
                elif not text or text.isspace():
                    skipped.add("empty", Place(part.path, part.start, line))
                else:
                    yield text


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
    stage: str, held_out_fraction: float, bad_utf8: str, **unit_bytes: int | None
) -> None:
    """Checks the options of a stage that reads text."""
    check_number(f"{stage}.held_out_fraction", held_out_fraction, 0, below=1)
    check_one_of(f"{stage}.bad_utf8", bad_utf8, ("skip", "fail"))
    for name, size in unit_bytes.items():
        check_number(f"{stage}.{name}", size, _SMALLEST_UNIT)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
