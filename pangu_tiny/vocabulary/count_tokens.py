"""The stage that counts how often a tokenizer emits each id over a corpus (see `counts.py`)."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.data.dataset import TokenDataset, open_once
from pangu_tiny.errors import UserError
from pangu_tiny.jobs import Job, Workers, remove_results, run_jobs
from pangu_tiny.text.changes import Reader, Reading, TextRecord, UnitJob
from pangu_tiny.text.documents import (
    batches,
    check_reading,
    document_digest,
    is_held_out,
    split_units,
)
from pangu_tiny.text.left_out import left_out_lines, skipped_lines
from pangu_tiny.text.sources import Text, find_sources, left_out_files
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.unknown import text_bytes, unknown_bytes, unknown_lines
from pangu_tiny.vocabulary.counts import (
    DESCRIPTION,
    SourceCounts,
    load,
    read_counts,
    save,
    write_counts,
)
from pangu_tiny.workdir import claim, read_identity, read_json


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
    runner: str | None = None,
    runner_options: list[str] | None = None,
) -> dict[str, Any]:
    """Counts the ids that a tokenizer emits over text, or those of a token dataset.

    The result depends on neither the number of processes nor on interruptions: run again, the
    stage resumes after the last unit of text that it finished. Text that has changed since it was
    read is refused.

    Args:
      workdir: the folder to write, local or gs://.
      text: as prepare-data takes it; or
      dataset: a folder that prepare-data wrote, whose training split is counted without text.
      tokenizer: the SentencePiece model file; a dataset has its own.
      held_out_fraction: share of documents that are not counted, by the rule of prepare-data; a
        dataset was split before.
      processes: worker processes; all cores by default.
      bad_utf8: "skip" (and count) documents that are not UTF-8, or "fail".
      text_key: the JSON key, Parquet column or TFDS feature that holds the text.
      unit_bytes: text that is counted at a time; by default as prepare-data cuts it.
      runner: works with Apache Beam on that runner (DirectRunner, DataflowRunner, FlinkRunner,
        SparkRunner, …) instead of on this machine's cores; text and workdir must lie where its
        workers can reach them, with this package installed there. The result is the same.
      runner_options: its flags, such as ['--project=P', '--region=R', '--temp_location=gs://…'].
    """
    check_reading("count_tokens", held_out_fraction, bad_utf8, unit_bytes=unit_bytes)
    workers = Workers("count_tokens", processes, runner, runner_options)
    if (text is None) == (dataset is None) or (text is None) != (tokenizer is None):
        raise UserError(
            f"count_tokens has text = {text!r}, tokenizer = {tokenizer!r}, dataset = {dataset!r},"
            " expected text and tokenizer, or a dataset alone"
        )
    left_out: dict[str, Any] = {}
    if dataset is not None:
        rows = TokenDataset.open(dataset)
        model = Tokenizer(rows.tokenizer_bytes())
        identity: dict[str, Any] = {"dataset_digest": rows.digest}
        jobs: list[Any] = [
            DatasetJob(index, workdir, dataset, rows.digest, shard)
            for index, shard in enumerate(rows.description["splits"]["train"]["shards"])
        ]
        held_out_fraction = (read_identity(dataset) or {}).get("held_out_fraction")
    else:
        model = Tokenizer.open(tokenizer)
        sources = find_sources(text)
        left_out = left_out_files(sources)
        identity = {
            "sources": [source.identity() for source in sources],
            "text_key": text_key,
            "held_out_fraction": held_out_fraction,
            "unit_bytes": unit_bytes,
        }
        reading = Reading(text_key, bad_utf8)
        jobs = [
            TextJob(index, workdir, unit, reading, held_out_fraction)
            for index, unit in enumerate(split_units(sources, unit_bytes))
        ]
    folder = claim(workdir, "count-tokens", identity | {"tokenizer_digest": model.digest})
    record = None if text is None else TextRecord(folder, reading, processes)
    done = (folder / DESCRIPTION).exists()
    if record:
        record.check(jobs, done)
    if not done:
        run_jobs(jobs, model, workers, "counting")
        if record:
            record.keep(jobs)
        write_counts(folder, _add_up(jobs), left_out, model, held_out_fraction)
    remove_results(folder)
    print(_report(folder, model))
    return read_json(folder / DESCRIPTION)


def _add_up(jobs: list[Any]) -> dict[str, SourceCounts]:
    """The counts of all jobs, by source."""
    total: dict[str, SourceCounts] = {}
    for job in jobs:
        part = load(job.result)
        total[job.source] = total[job.source] + part if job.source in total else part
    return total


@dataclasses.dataclass(frozen=True)
class TextJob(UnitJob):
    """A unit of text to count."""

    SUFFIX = ".npz"

    held_out_fraction: float

    @property
    def source(self) -> str:
        return self.unit.source

    def run(self, tokenizer: Tokenizer) -> None:
        """Counts the documents that are not held out, in memory that does not grow."""
        counted = SourceCounts(np.zeros(tokenizer.pieces, np.int64))
        reader = Reader(self.unit, self.reading)

        def training_documents() -> Iterator[str]:
            for text, utf8, digest in reader:
                if not is_held_out(digest, self.held_out_fraction):
                    counted.documents += 1
                    counted.bytes += len(utf8)
                    counted.digest += digest
                    yield text

        unknown = 0
        for batch in batches(training_documents()):
            ids = tokenizer.encode_batch(batch)
            unknown += int(unknown_bytes(tokenizer, batch, ids).sum())
            counted.times += np.bincount(np.concatenate(ids), minlength=tokenizer.pieces)
        self.keep_records(reader.records)
        counted.digest %= 2**256
        sizes: dict[str, Any] = text_bytes(tokenizer, counted.times, unknown)
        save(self.result, dataclasses.replace(counted, skipped=reader.skipped, **sizes))


@dataclasses.dataclass(frozen=True)
class DatasetJob(Job):
    """A shard of a token dataset's training split to count; `shard` is its entry there."""

    SUFFIX = ".npz"

    dataset: str
    digest: str
    shard: dict[str, Any]

    @property
    def source(self) -> str:
        return self.shard["source"]

    @property
    def size(self) -> int:
        return self.shard["size"]

    def run(self, tokenizer: Tokenizer) -> None:
        """Counts the ids of the documents' text, without marks."""
        sizes = ("documents", "bytes", "normalised_bytes", "unknown_bytes")
        counted = SourceCounts(
            np.zeros(tokenizer.pieces, np.int64),
            digest=document_digest(f"{self.index} {self.shard['digest']}".encode()),
            # A dataset of an earlier version knows no unknown text.
            **{name: self.shard[name] for name in sizes if name in self.shard},
        )
        for _, ids in open_once(self.dataset, self.digest).documents("train", [self.index]):
            np.add.at(counted.times, ids[1:-1], 1)
        save(self.result, counted)


def _report(folder: epath.Path, tokenizer: Tokenizer) -> str:
    counts = read_counts(os.fspath(folder), tokenizer)
    lines = [f"counts {folder}: tokenizer {counts.tokenizer_digest[:12]}"]
    for name, source in counts.sources.items():
        times = counts.times_by_source[name]
        if times.sum():
            lines.append(
                f"  {name:<16} {source['documents']:,} documents, {source['bytes'] / 1e6:,.2f} MB,"
                f" {source['tokens']:,} tokens, {source['bytes'] / source['tokens']:.2f} bytes a"
                f" token, {np.count_nonzero(times):,} of {tokenizer.pieces:,} pieces seen"
            )
            lines += unknown_lines(name, source)
        else:
            lines.append(f"  {name:<16} nothing")
        if "skipped" in source:  # earlier versions left it unsaid
            lines += skipped_lines(source["skipped"], source["documents"], source["bytes"])
            lines += left_out_lines({name: source["left_out"]})
    return "\n".join(lines)
