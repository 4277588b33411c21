"""How often a tokenizer emitted each id: what count-tokens writes and others read.

The folder holds counts.npy, int64 [sources, ids], and counts.json, which says of what: the digests
of tokenizer and corpus, and for every source its `documents`, `bytes` (raw UTF-8), `tokens` (text
without marks), `normalised_bytes` and `unknown_bytes` (see `tokenizer/unknown.py`). Only the
training split is counted. `skipped` and `left_out` are the documents and files that were not read,
as in dataset.json.

The digest of a source is the sum of the sha256 of its documents, modulo 2^256: it depends on
neither their order nor on how the work was cut. Where a token dataset was counted, it is made of
the digests of its shards instead.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pangu_tiny.arrays import read_array, read_described, write_array, write_arrays
from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.text.left_out import Skipped, count_skipped
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.workdir import check_same, finished, read_json, write_atomically

DESCRIPTION = "counts.json"
_COUNTS = "counts.npy"


@dataclasses.dataclass
class SourceCounts:
    """What was counted in one source. times: int64 [ids]."""

    times: np.ndarray
    documents: int = 0
    bytes: int = 0
    normalised_bytes: int = 0
    unknown_bytes: int = 0
    digest: int = 0
    skipped: Skipped = dataclasses.field(default_factory=Skipped)

    def __add__(self, other: "SourceCounts") -> "SourceCounts":
        total = SourceCounts(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))
        total.digest %= 2**256
        return total

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def describe(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "normalised_bytes": self.normalised_bytes,
            "unknown_bytes": self.unknown_bytes,
            "digest": f"{self.digest:064x}",
            "tokens": int(self.times.sum()),
            "skipped": self.skipped.describe(),
        }


class Counts(NamedTuple):
    """times: int64 [ids], over all sources. sources: name → its entry in counts.json.
    times_by_source: name → int64 [ids]."""

    tokenizer_digest: str
    held_out_fraction: float | None
    sources: dict[str, dict[str, Any]]
    times_by_source: dict[str, np.ndarray]

    @property
    def times(self) -> np.ndarray:
        return np.sum(list(self.times_by_source.values()), axis=0)

    @property
    def digest(self) -> str:
        """Of all sources together, whatever their order."""
        total = sum(int(source["digest"], 16) for source in self.sources.values())
        return f"{total % 2**256:064x}"


def read_counts(folders: str | list[str], tokenizer: Tokenizer) -> Counts:
    """Opens one folder of count-tokens, or adds several up."""
    counts: Counts | None = None
    for path in [folders] if isinstance(folders, str) else folders:
        file = finished("counts", path, "count-tokens", DESCRIPTION)
        description = read_json(file, "tokenizer_digest", "held_out_fraction", "sources")
        used = description["tokenizer_digest"]
        check_same(
            f"counts {path} are of the tokenizer", used, "the one given is", tokenizer.digest
        )
        times = read_array(file.parent / _COUNTS)
        if times.shape != (len(description["sources"]), tokenizer.pieces):
            raise UserError(
                f"{file.parent / _COUNTS} holds {list(times.shape)} counts, expected"
                f" {[len(description['sources']), tokenizer.pieces]} by the {DESCRIPTION} beside it"
            )
        fresh = Counts(
            used,
            description["held_out_fraction"],
            description["sources"],
            dict(zip(description["sources"], times, strict=True)),
        )
        counts = fresh if counts is None else _merged(counts, fresh, path)
    if counts is None:
        raise UserError("counts names no folder, expected one that count-tokens wrote")
    return counts


def _merged(counts: Counts, other: Counts, path: str) -> Counts:
    digests = {source["digest"]: name for name, source in counts.sources.items()}
    for name, source in other.sources.items():
        if source["digest"] in digests:
            raise UserError(
                f"counts {path} has the text of {name!r} again, which was counted as"
                f" {digests[source['digest']]!r} in a folder before it"
            )
        if name in counts.sources:
            raise UserError(
                f"counts {path} has a source named {name!r}, as a folder before it;"
                " name the sources apart in count_tokens.text"
            )
    if counts.held_out_fraction != other.held_out_fraction:
        raise UserError(
            f"counts {path} left out {other.held_out_fraction} of the documents, a folder before"
            f" it {counts.held_out_fraction}"
        )
    return counts._replace(
        sources=counts.sources | other.sources,
        times_by_source=counts.times_by_source | other.times_by_source,
    )


def write_counts(
    folder: epath.Path,
    by_source: dict[str, SourceCounts],
    left_out: dict[str, Any],
    tokenizer: Tokenizer,
    held_out_fraction: float | None,
) -> None:
    """Writes what makes the folder one of counts; `left_out` has, by source, the files that were
    not read."""
    times = np.stack([counted.times for counted in by_source.values()])
    if not times.sum():
        skipped = sum((counted.skipped for counted in by_source.values()), Skipped())
        raise UserError(
            f"text {', '.join(by_source)} has no document to count: {count_skipped(vars(skipped))},"
            " the others are held out"
        )
    write_array(folder / _COUNTS, times)
    description = {
        "tokenizer_digest": tokenizer.digest,
        "held_out_fraction": held_out_fraction,
        "sources": {
            name: counted.describe() | {"left_out": left_out.get(name, {})}
            for name, counted in by_source.items()
        },
    }
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1))


def save(file: epath.Path, counted: SourceCounts) -> None:
    """Writes counts to a file that appears whole or not at all."""
    rest = dataclasses.asdict(dataclasses.replace(counted, times=None))
    write_arrays(file, {"times": counted.times}, rest, compress=True)


def load(file: epath.Path) -> SourceCounts:
    """Reads what `save` wrote."""
    rest, arrays = read_described(file)
    with failing_as(f"{file} is not what count-tokens writes", KeyError, TypeError):
        return SourceCounts(**rest | arrays | {"skipped": Skipped.of(rest["skipped"])})
