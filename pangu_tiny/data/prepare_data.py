"""The stage that makes a token dataset of text.

The folder that it writes holds

    tokens-SPLIT.array_record-IIIII-of-NNNNN    rows; one shard for each unit of text and split
    tokenizer.model                             the tokenizer that wrote them
    dataset_info.json, features.json            TFDS: `tfds.builder_from_directory(folder)`
    text.npz                                    what its text was, see `text/changes.py`
    dataset.json                                what the dataset is and holds; written last

dataset.json has, for every split and for every source in it, `rows`, `documents`, `bytes` (raw
UTF-8 of the documents, before any normaliser), `tokens` (text and both marks, without overlaps and
padding), `targets` (text and end marks), `padding` (tokens), `cut_documents` (documents whose text
lies in more than one row), `normalised_bytes` and `unknown_bytes` (see `tokenizer/unknown.py`), and
for the held-out split `gzip_bytes` and `xz_bytes` (gzip -9 and xz -9 of each document on its own,
summed). The digest covers the packing rule, the marks, the tokenizer and every row in its order.

`skipped` has the documents that were not read, counted by kind, with the places of the first few;
`left_out` has, for every source, the files that were not: by kind their `count`, `bytes`, `share`
of all bytes that were found, and `first` few.
"""

import hashlib
import json
import random
from typing import Any

from etils import epath

from pangu_tiny.data import rows
from pangu_tiny.data.dataset import DESCRIPTION, TOKENIZER, TokenDataset
from pangu_tiny.data.describe import report, write_description
from pangu_tiny.data.shards import TextJob
from pangu_tiny.errors import UserError, check_number
from pangu_tiny.jobs import UNITS, Workers, remove_results, run_jobs
from pangu_tiny.progress import Progress
from pangu_tiny.text.changes import Reading, TextRecord
from pangu_tiny.text.documents import Unit, check_reading, held_out, read_documents, split_units
from pangu_tiny.text.left_out import Skipped
from pangu_tiny.text.sources import Text, find_sources, left_out_files
from pangu_tiny.tokenizer.model import Tokenizer, train_tokenizer
from pangu_tiny.workdir import claim, read_json, write_atomically


def prepare_data(
    text: Text,
    workdir: str,
    sequence_length: int,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    held_out_fraction: float = 0.01,
    seed: int = 0,
    processes: int | None = None,
    bad_utf8: str = "skip",
    text_key: str = "text",
    shard_bytes: int | None = None,
    tokenizer_sample_bytes: int = 16 * 2**20,
    runner: str | None = None,
    runner_options: list[str] | None = None,
) -> dict[str, Any]:
    """Tokenises and packs text into a dataset that `TokenDataset` and TFDS can open.

    The result depends on neither the number of processes nor on interruptions: run again, the
    stage resumes after the last unit of text that it finished. Text that has changed since it was
    read is refused.

    Args:
      text: .txt, .jsonl, .ndjson, .json (each .gz or .zst too) or .parquet files, folders or globs
        of them, tfds:NAME[:SPLIT]; one, a list of them, or a dict from source name to one or
        several.
      workdir: the folder to write, local or gs://.
      sequence_length: targets of a row.
      tokenizer: a SentencePiece model file; or
      vocab_size: the number of pieces of a BPE model that is trained on a sample of the text.
      held_out_fraction: share of documents, chosen by their hash, in the split "held_out".
      seed: chooses the sample that the tokenizer is trained on, where it cannot be all text.
      processes: worker processes; all cores by default.
      bad_utf8: "skip" (and count) documents that are not UTF-8, or "fail".
      text_key: the JSON key, Parquet column or TFDS feature that holds the text.
      shard_bytes: text in one shard and unit of work; by default 1/256 of all, from 4 to 256
        MiB, but no less than 1/1024 of all.
      tokenizer_sample_bytes: text that the tokenizer is trained on, at most.
      runner, runner_options: as count-tokens takes them.
    """
    _check_arguments(sequence_length, tokenizer, vocab_size)
    check_reading("prepare_data", held_out_fraction, bad_utf8, shard_bytes=shard_bytes)
    workers = Workers("prepare_data", processes, runner, runner_options)
    sources = find_sources(text)
    given = _open_tokenizer(tokenizer) if tokenizer else None
    identity: dict[str, Any] = {
        "packing": rows.PACKING,
        "sources": [source.identity() for source in sources],
        "text_key": text_key,
        "sequence_length": sequence_length,
        "held_out_fraction": held_out_fraction,
        "shard_bytes": shard_bytes,
    }
    if given:
        identity["tokenizer_digest"] = given.digest
    else:
        identity |= {
            "vocab_size": vocab_size,
            "seed": seed,
            "tokenizer_sample_bytes": tokenizer_sample_bytes,
        }
    folder = claim(workdir, "prepare-data", identity)
    reading = Reading(text_key, bad_utf8)
    units = split_units(sources, shard_bytes)
    finished = (folder / DESCRIPTION).exists()
    if not finished:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        (folder / UNITS).mkdir(exist_ok=True)
        if given is None:
            _train_tokenizer(
                folder / TOKENIZER, units, vocab_size, held_out_fraction, seed,
                tokenizer_sample_bytes, reading,
            )  # fmt: skip
        elif not (folder / TOKENIZER).exists():
            write_atomically(folder / TOKENIZER, given.model_bytes)
    given = given or Tokenizer.open(folder / TOKENIZER)
    jobs = [
        TextJob(index, workdir, unit, reading, len(units), sequence_length, held_out_fraction)
        for index, unit in enumerate(units)
    ]
    record = TextRecord(folder, reading, processes)
    record.check(jobs, finished)
    if not finished:
        run_jobs(jobs, given, workers, "tokenising")
        record.keep(jobs)
        results = [read_json(job.result) for job in jobs]
        skipped = sum((Skipped.of(result["skipped"]) for result in results), Skipped())
        left_out = {"skipped": skipped.describe(), "left_out": left_out_files(sources)}
        names = [source.name for source in sources]
        write_description(folder, names, results, left_out, given, sequence_length)
    remove_results(folder)
    dataset = TokenDataset.described(workdir)
    print(report(dataset))
    return dataset.description


def _check_arguments(sequence_length: int, tokenizer: str | None, vocab_size: int | None) -> None:
    if bool(tokenizer) == bool(vocab_size):
        raise UserError(
            f"prepare_data.tokenizer is {tokenizer!r} and vocab_size is {vocab_size!r}, expected"
            " exactly one: a model file, or the size of the model to train"
        )
    check_number("prepare_data.sequence_length", sequence_length, 2)


def _open_tokenizer(path: str) -> Tokenizer:
    tokenizer = Tokenizer.open(path)
    if tokenizer.begin_id == tokenizer.end_id:
        raise UserError(f"tokenizer {path} has one mark for begin and end, expected two")
    return tokenizer


def _train_tokenizer(
    file: epath.Path,
    units: list[Unit],
    vocab_size: int,
    held_out_fraction: float,
    seed: int,
    sample_bytes: int,
    reading: Reading,
) -> None:
    """Trains the tokenizer, unless an interrupted run did, on the same text."""
    share = max(sample_bytes // len(units), 2**18)
    shuffled = random.Random(seed).sample(units, len(units))
    sample: list[str] = []
    taken = 0
    with Progress("sampling for the tokenizer", sample_bytes, "B") as progress:
        for unit in shuffled:
            budget = min(share, sample_bytes - taken)
            for text in read_documents(unit, Skipped(), *reading):
                if budget <= 0:
                    break
                if not held_out(text, held_out_fraction):
                    size = len(text.encode())
                    sample.append(text)
                    progress.update(size)
                    budget -= size
                    taken += size
        record = file.parent / UNITS / "sample.json"
        digest = hashlib.sha256("\0".join(sample).encode()).hexdigest()
        if file.exists():
            if read_json(record, "digest")["digest"] != digest:
                raise UserError(
                    f"text has changed since {file} was trained on it; choose another workdir"
                )
            return
        progress.say(f"training a tokenizer of {vocab_size} pieces on {taken:,} bytes")
    tokenizer = train_tokenizer(sample, vocab_size)
    write_atomically(record, json.dumps({"digest": digest}))
    write_atomically(file, tokenizer.model_bytes)
