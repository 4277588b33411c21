"""What was found in a corpus and not read: counted by kind, the first few named, and told.

Documents are skipped that hold no text; files are left out that cannot hold any. Both stages that
read text report both, and warn where much of it may be lost.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from pangu_tiny.text.formats import Place, printable

_NAMED = 5  # documents or files named, of each kind
_MUCH = 0.01  # share of the bytes or documents that deserves a warning

_DOCUMENTS = {"empty": "empty", "null": "null", "bad_utf8": "not UTF-8"}
_FILES = {
    "unknown": "file{s} of no known kind",
    "empty": "file{s} of 0 bytes",
    "hidden": "hidden file{s} or folder{s}",
    "dangling": "dangling link{s}",
    "special": "named pipe{s}, socket{s} or device{s}",
    "again": "found again through a link",
    "claimed": "folder{s} that a stage wrote",
}


@dataclasses.dataclass
class Skipped:
    """Documents left out, counted by kind, with the places of the first few of each.

    A null stands in place of a text; how long a document is that is not UTF-8 is known too.
    """

    empty: int = 0
    null: int = 0
    bad_utf8: int = 0
    bad_utf8_bytes: int = 0
    places: dict[str, list[Place]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, place: Place, size: int = 0) -> None:
        """Counts one document."""
        setattr(self, kind, getattr(self, kind) + 1)
        if kind == "bad_utf8":
            self.bad_utf8_bytes += size
        places = self.places.setdefault(kind, [])
        if len(places) < _NAMED:
            places.append(place)

    def __add__(self, other: "Skipped") -> "Skipped":
        return Skipped(
            self.empty + other.empty,
            self.null + other.null,
            self.bad_utf8 + other.bad_utf8,
            self.bad_utf8_bytes + other.bad_utf8_bytes,
            {
                # The first in order of the files, whichever process came to its own first.
                kind: sorted(self.places.get(kind, []) + other.places.get(kind, []))[:_NAMED]
                for kind in self.places | other.places
            },
        )

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Skipped":
        """What `dataclasses.asdict` made a dict of."""
        places = {kind: [Place(**place) for place in p] for kind, p in found["places"].items()}
        return cls(**found | {"places": places})

    def describe(self) -> dict[str, Any]:
        """Counts and places as dataset.json and counts.json hold them. Reads the files again, to
        count lines."""
        counts = {name: value for name, value in vars(self).items() if name != "places"}
        places = {
            f"{kind}_places": [str(place) for place in self.places.get(kind, ())]
            for kind in _DOCUMENTS
        }
        return counts | places


def count_skipped(skipped: dict[str, Any]) -> str:
    """How many documents were skipped, in words."""
    return ", ".join(f"{skipped.get(kind, 0)} {label}" for kind, label in _DOCUMENTS.items())


def skipped_lines(skipped: dict[str, Any], documents: int, size: int) -> list[str]:
    """A report's lines about skipped documents, as `Skipped.describe` has them, beside so many that
    were read, of so many bytes."""
    lines = []
    for kind, label in _DOCUMENTS.items():
        if count := skipped.get(kind, 0):  # a dataset of an earlier version knows no null
            lines.append(f"  skipped      {_named(count, label, skipped[f'{kind}_places'])}")
    bad, bad_bytes = skipped["bad_utf8"], skipped.get("bad_utf8_bytes", 0)
    if max(_share(bad_bytes, size), _share(bad, documents)) > _MUCH:
        lines.append(
            f"  WARNING: {_share(bad_bytes, size):.1%} of the bytes and"
            f" {_share(bad, documents):.1%} of the documents are not UTF-8 and were skipped;"
            " convert text in another encoding, such as by iconv -f GB18030 -t UTF-8"
        )
    if (share := _share(skipped.get("null", 0), documents)) > _MUCH:
        lines.append(f"  WARNING: {share:.1%} of the documents are null")
    return lines


def files_by_kind(left_out: Iterable[tuple[str, str, int]], size: int) -> dict[str, Any]:
    """Sums up the (kind, path, bytes) of files that were left out, where `size` bytes are read: for
    every kind its `count`, `bytes`, `share` of all bytes, and `first` few paths."""
    kinds: dict[str, Any] = {}
    for kind, path, length in left_out:
        found = kinds.setdefault(kind, {"count": 0, "bytes": 0, "first": []})
        found["count"] += 1
        found["bytes"] += length
        if len(found["first"]) < _NAMED:
            found["first"].append(printable(path))
    return {kind: found | {"share": _share(found["bytes"], size)} for kind, found in kinds.items()}


def describe_files(kinds: dict[str, Any]) -> str:
    """What `files_by_kind` found, in words."""
    return ", ".join(
        _named(found["count"], label.format(s="s" * (found["count"] > 1)), found["first"])
        for kind, label in _FILES.items()
        if (found := kinds.get(kind))
    )


def left_out_lines(left_out: dict[str, dict[str, Any]]) -> list[str]:
    """A report's lines about files that were left out, of each source by its name."""
    lines = []
    for name, kinds in left_out.items():
        if kinds:
            lines.append(f"  left out     of {name}: {describe_files(kinds)}")
        if (share := kinds.get("unknown", {}).get("share", 0)) > _MUCH:
            lines.append(f"  WARNING: {share:.1%} of the bytes of {name} are of no known kind")
    return lines


def _named(count: int, label: str, first: list[str]) -> str:
    return f"{count:,} {label} ({', '.join(first)}{', …' if count > len(first) else ''})"


def _share(lost: int, kept: int) -> float:
    return lost / (lost + kept) if lost else 0.0
