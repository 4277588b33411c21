"""The stage that counts how often a tokenizer emits each id over a corpus.

The folder that it writes holds counts.npy, int64 [sources, ids], and counts.json, which says of
what: the digests of tokenizer and corpus, and for every source its `documents`, `bytes` (raw UTF-8)
and `tokens` (text without marks). Only the training split is counted.

The digest of a source is the sum of the sha256 of its documents, modulo 2^256: it depends on
neither their order nor on how the work was cut.
"""

import dataclasses
import functools
import io
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.text import (
    Skipped,
    Text,
    Unit,
    batches,
    check_reading,
    document_digest,
    find_sources,
    held_out,
    read_documents,
    split_units,
)
from pangu_tiny.data.workers import run_jobs
from pangu_tiny.errors import UserError
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.workdir import claim, write_atomically

_COUNTS, _DESCRIPTION, _UNITS = "counts.npy", "counts.json", "units"
_MOSTLY = 0.5  # share of unknown and byte tokens that deserves a warning


@dataclasses.dataclass
class SourceCounts:
    """What was counted in one source. times: int64 [ids]."""

    times: np.ndarray
    documents: int = 0
    bytes: int = 0
    digest: int = 0
    empty: int = 0
    bad_utf8: int = 0

    def add(self, other: "SourceCounts") -> None:
        self.times = self.times + other.times
        self.documents += other.documents
        self.bytes += other.bytes
        self.digest = (self.digest + other.digest) % 2**256
        self.empty += other.empty
        self.bad_utf8 += other.bad_utf8

    def describe(self) -> dict[str, Any]:
        rest = {name: value for name, value in vars(self).items() if name != "times"}
        return rest | {"digest": f"{self.digest:064x}", "tokens": int(self.times.sum())}


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


def count_tokens(
    workdir: str,
    text: Text | None = None,
    tokenizer: str | None = None,
    dataset: str | None = None,
    held_out_fraction: float = 0.01,
    processes: int | None = None,
    bad_utf8: str = "skip",
    text_key: str = "text",
    unit_bytes: int | None = None,
) -> dict[str, Any]:
    """Counts the ids that a tokenizer emits over text, or those of a token dataset.

    The result depends on neither the number of processes nor on interruptions: run again, the
    stage goes on after the last unit of text that it finished.

    Args:
      workdir: the folder to write, local or gs://.
      text: as prepare-data takes it; or
      dataset: a folder that prepare-data wrote, whose training split is counted without text.
      tokenizer: the SentencePiece model file; a dataset has its own.
      held_out_fraction: share of documents that are not counted, by the rule of prepare-data;
        unused with a dataset, which was split before.
      processes: worker processes; all cores by default.
      bad_utf8: "skip" (and count) documents that are not UTF-8, or "fail".
      text_key: the JSON key, Parquet column or TFDS feature that holds the text.
      unit_bytes: text that is counted at a time; by default as prepare-data cuts it.

    Returns:
      What counts.json holds.

    Raises:
      UserError: of the arguments, the text or the workdir, or there is nothing to count.
    """
    check_reading("count_tokens", held_out_fraction, processes, bad_utf8)
    if (text is None) == (dataset is None) or (text is None) != (tokenizer is None):
        raise UserError(
            f"count_tokens has text = {text!r}, tokenizer = {tokenizer!r}, dataset = {dataset!r};"
            " expected text and tokenizer, or a dataset alone"
        )
    if dataset is not None:
        rows = TokenDataset.open(dataset)
        model = Tokenizer(rows.tokenizer_bytes())
        identity: dict[str, Any] = {"dataset_digest": rows.digest}
        jobs: list[Any] = [
            DatasetJob(index, workdir, dataset, shard)
            for index, shard in enumerate(rows.description["splits"]["train"]["shards"])
        ]
        held_out_fraction = None
    else:
        model = Tokenizer.open(tokenizer)
        sources = find_sources(text)
        identity = {
            "sources": [source.identity() for source in sources],
            "text_key": text_key,
            "held_out_fraction": held_out_fraction,
            "unit_bytes": unit_bytes,
        }
        reading = Reading(held_out_fraction, text_key, bad_utf8)
        jobs = [
            TextJob(index, workdir, unit, reading)
            for index, unit in enumerate(split_units(sources, unit_bytes))
        ]
    folder = claim(workdir, "count-tokens", identity | {"tokenizer_digest": model.digest})
    if not (folder / _DESCRIPTION).exists():
        (folder / _UNITS).mkdir(exist_ok=True)
        run_jobs(jobs, model, processes, "counting")
        by_source: dict[str, SourceCounts] = {}
        for job in jobs:
            part = _load(job.result)
            if job.source in by_source:
                by_source[job.source].add(part)
            else:
                by_source[job.source] = part
        write_counts(folder, by_source, model, held_out_fraction)
    if (folder / _UNITS).exists():
        (folder / _UNITS).rmtree()
    print(_report(folder, model))
    return json.loads((folder / _DESCRIPTION).read_text())


def read_counts(folders: str | list[str], tokenizer: Tokenizer) -> Counts:
    """Opens one folder of count-tokens, or adds several up.

    Raises:
      UserError: a folder holds no finished counts, they are of another tokenizer, or the same
        text was counted twice.
    """
    counts: Counts | None = None
    for path in [folders] if isinstance(folders, str) else folders:
        file = epath.Path(path) / _DESCRIPTION
        if not file.exists():
            raise UserError(
                f"counts {path} has no {_DESCRIPTION}; expected a folder that count-tokens finished"
            )
        found = json.loads(file.read_text())
        if found["tokenizer_digest"] != tokenizer.digest:
            raise UserError(
                f"counts {path} are of the tokenizer {found['tokenizer_digest']};"
                f" the one given is {tokenizer.digest}"
            )
        times = np.load(io.BytesIO((epath.Path(path) / _COUNTS).read_bytes()), allow_pickle=False)
        fresh = Counts(
            found["tokenizer_digest"],
            found["held_out_fraction"],
            found["sources"],
            dict(zip(found["sources"], times, strict=True)),
        )
        counts = fresh if counts is None else _merged(counts, fresh, path)
    if counts is None:
        raise UserError("counts names no folder; expected one that count-tokens wrote")
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


class Reading(NamedTuple):
    """How text becomes the documents that are counted."""

    held_out_fraction: float
    text_key: str
    bad_utf8: str


def count_unit(unit: Unit, reading: Reading, tokenizer: Tokenizer) -> SourceCounts:
    """Counts the documents of a unit that are not held out, in memory that does not grow."""
    skipped = Skipped()
    counted = SourceCounts(np.zeros(tokenizer.pieces, np.int64))

    def training_documents() -> Iterator[str]:
        for text in read_documents(unit, skipped, reading.text_key, reading.bad_utf8):
            if not held_out(text, reading.held_out_fraction):
                counted.documents += 1
                counted.bytes += len(text.encode())
                counted.digest += document_digest(text)
                yield text

    for batch in batches(training_documents()):
        ids = np.concatenate(tokenizer.encode_batch(batch))
        counted.times += np.bincount(ids, minlength=tokenizer.pieces)
    counted.digest %= 2**256
    counted.empty, counted.bad_utf8 = skipped.empty, skipped.bad_utf8
    return counted


@dataclasses.dataclass(frozen=True)
class TextJob:
    """A unit of text to count."""

    index: int
    workdir: str
    unit: Unit
    reading: Reading

    @property
    def source(self) -> str:
        return self.unit.source

    @property
    def size(self) -> int:
        return self.unit.size

    @property
    def result(self) -> epath.Path:
        return _part(self.workdir, self.index)

    def run(self, tokenizer: Tokenizer) -> None:
        _save(self.result, count_unit(self.unit, self.reading, tokenizer))


@dataclasses.dataclass(frozen=True)
class DatasetJob:
    """A shard of a token dataset's training split to count; `shard` is its entry there."""

    index: int
    workdir: str
    dataset: str
    shard: dict[str, Any]

    @property
    def source(self) -> str:
        return self.shard["source"]

    @property
    def size(self) -> int:
        return self.shard["size"]

    @property
    def result(self) -> epath.Path:
        return _part(self.workdir, self.index)

    def run(self, tokenizer: Tokenizer) -> None:
        counted = SourceCounts(
            np.zeros(tokenizer.pieces, np.int64),
            self.shard["documents"],
            self.shard["bytes"],
            document_digest(f"{self.index} {self.shard['digest']}"),
        )
        for _, ids in _open_dataset(self.dataset).documents("train", [self.index]):
            np.add.at(counted.times, ids[1:-1], 1)
        _save(self.result, counted)


@functools.lru_cache(maxsize=1)
def _open_dataset(path: str) -> TokenDataset:
    return TokenDataset.open(path)


def write_counts(
    folder: epath.Path,
    by_source: dict[str, SourceCounts],
    tokenizer: Tokenizer,
    held_out_fraction: float | None,
) -> None:
    """Writes what makes the folder one of counts.

    Raises:
      UserError: there is no token.
    """
    times = np.stack([counted.times for counted in by_source.values()])
    if not times.sum():
        raise UserError(
            f"text {', '.join(by_source)} has no document to count:"
            f" {sum(c.empty for c in by_source.values())} are empty,"
            f" {sum(c.bad_utf8 for c in by_source.values())} not UTF-8, the others held out"
        )
    data = io.BytesIO()
    np.save(data, times)
    write_atomically(folder / _COUNTS, data.getvalue())
    description = {
        "tokenizer_digest": tokenizer.digest,
        "held_out_fraction": held_out_fraction,
        "sources": {name: counted.describe() for name, counted in by_source.items()},
    }
    write_atomically(folder / _DESCRIPTION, json.dumps(description, indent=1))


def strange_share(times: np.ndarray, tokenizer: Tokenizer) -> float:
    """The share of tokens that are unknown or lone bytes: high for text in a foreign language."""
    return float(times[tokenizer.strange].sum() / times.sum())


def _report(folder: epath.Path, tokenizer: Tokenizer) -> str:
    counts = read_counts(os.fspath(folder), tokenizer)
    lines = [f"counts {folder}: tokenizer {counts.tokenizer_digest[:12]}"]
    for name, source in counts.sources.items():
        times = counts.times_by_source[name]
        if not times.sum():
            lines.append(f"  {name:<16} nothing")
            continue
        strange = strange_share(times, tokenizer)
        lines.append(
            f"  {name:<16} {source['documents']:,} documents, {source['bytes'] / 1e6:,.2f} MB,"
            f" {source['tokens']:,} tokens, {source['bytes'] / source['tokens']:.2f} bytes a token,"
            f" {np.count_nonzero(times):,} of {tokenizer.pieces:,} pieces seen"
        )
        if strange > _MOSTLY:
            lines.append(
                f"  WARNING: {strange:.0%} of the tokens of {name} are unknown or lone bytes;"
                " this tokenizer was not made for that text"
            )
    return "\n".join(lines)


def _part(workdir: str, index: int) -> epath.Path:
    return epath.Path(workdir) / _UNITS / f"{index:05d}.npz"


def _save(file: epath.Path, counted: SourceCounts) -> None:
    data = io.BytesIO()
    rest = {name: value for name, value in vars(counted).items() if name != "times"}
    np.savez_compressed(data, times=counted.times, rest=np.array(json.dumps(rest)))
    write_atomically(file, data.getvalue())


def _load(file: epath.Path) -> SourceCounts:
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
        return SourceCounts(found["times"], **json.loads(str(found["rest"])))
