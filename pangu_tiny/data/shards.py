"""One unit of text becomes shards of rows: the work that a process of prepare-data does."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from pangu_tiny.data import records, rows
from pangu_tiny.errors import failing_as
from pangu_tiny.text.changes import Reader, UnitJob
from pangu_tiny.text.documents import batches, is_held_out
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.unknown import text_bytes, unknown_bytes
from pangu_tiny.workdir import write_atomically

SPLITS = ("train", "held_out")
_WRITER = "group_size:1,uncompressed"  # ids hardly compress, and are read one row at a time


@dataclasses.dataclass(frozen=True)
class TextJob(UnitJob):
    """A unit of text, one of `count`, and what to make of it."""

    count: int
    sequence_length: int
    held_out_fraction: float

    def run(self, tokenizer: Tokenizer) -> None:
        """Writes the unit's shards, at most one for each split, and the result."""
        reader = Reader(self.unit, self.reading)
        shards = {
            split: ShardWriter(
                self.workdir,
                shard_name(split, self.index, self.count),
                self.sequence_length,
                tokenizer,
            )
            for split in SPLITS
        }
        sizes: dict[str, Counter[str]] = {"train": Counter(bytes=0)}
        sizes["held_out"] = Counter(bytes=0, gzip_bytes=0, xz_bytes=0)
        splits: list[str] = []  # of the documents in a batch

        def documents() -> Iterator[str]:
            for text, utf8, digest in reader:
                split = SPLITS[is_held_out(digest, self.held_out_fraction)]
                sizes[split]["bytes"] += len(utf8)
                if split == "held_out":
                    sizes[split]["gzip_bytes"] += len(gzip.compress(utf8, 9))
                    sizes[split]["xz_bytes"] += _xz_size(utf8)
                splits.append(split)
                yield text

        for batch in batches(documents()):
            ids_b = tokenizer.encode_batch(batch)
            unknown_b = unknown_bytes(tokenizer, batch, ids_b).tolist()
            for split, ids, unknown in zip(splits, ids_b, unknown_b, strict=True):
                shards[split].add(ids, unknown)
            splits.clear()
            for shard in shards.values():
                shard.flush()
        result = {
            "source": self.unit.source,
            "skipped": dataclasses.asdict(reader.skipped),
            "splits": {split: {**sizes[split], **shards[split].finish()} for split in SPLITS},
        }
        self.keep_records(reader.records)
        write_atomically(self.result, json.dumps(result))


def shard_name(split: str, index: int, count: int) -> str:
    """The file of a split's rows of unit `index` of `count`, as TFDS wants it."""
    return f"tokens-{split}.array_record-{index:05d}-of-{count:05d}"


class ShardWriter:
    """Rows on their way into one ArrayRecord file, which appears whole or not at all; without a
    row there is no file."""

    def __init__(self, folder: str, name: str, sequence_length: int, tokenizer: Tokenizer):
        self._name = name
        self._folder = folder
        self._tokenizer = tokenizer
        self._times = np.zeros(tokenizer.pieces, np.int64)
        self._unknown = 0
        self._dtype = records.row_dtype(tokenizer.vocab_size)
        self._packer = rows.Packer(sequence_length, tokenizer.begin_id, tokenizer.end_id)
        self._waiting: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        # ArrayRecord's writer knows local files only.
        here = tempfile.gettempdir() if "://" in folder else folder
        self._temporary = os.path.join(here, f".{self._name}.{uuid.uuid4().hex}.tmp")
        self._writer: Any = None

    def add(self, ids: np.ndarray, unknown: int = 0) -> None:
        """Takes the ids of a document's text, and how many bytes of it became the unknown piece."""
        self._unknown += unknown
        self._waiting.append(ids)

    def flush(self) -> None:
        """Packs what has been added."""
        if self._waiting:
            ids = np.concatenate(self._waiting)
            self._times += np.bincount(ids, minlength=len(self._times))
        self._write(self._packer.add(self._waiting))
        self._waiting = []

    def finish(self) -> dict[str, Any]:
        """Puts the file in its place and returns its entry for dataset.json, counts included."""
        self.flush()
        self._write(self._packer.finish())
        packer = self._packer
        entry: dict[str, Any] = {
            "rows": packer.rows,
            "documents": packer.documents,
            "tokens": packer.tokens,
            "targets": packer.tokens - packer.documents,
            "padding": packer.padding,
            "cut_documents": packer.cut_documents,
            **text_bytes(self._tokenizer, self._times, self._unknown),
        }
        if self._writer:
            with self._writing():
                self._writer.close()
            entry |= {
                "file": self._name,
                "size": os.path.getsize(self._temporary),
                "digest": self._digest.hexdigest(),
            }
            target = epath.Path(self._folder) / self._name
            if "://" in self._folder:
                epath.Path(self._temporary).copy(target, overwrite=True)
                os.unlink(self._temporary)
            else:
                os.replace(self._temporary, target)
        return entry

    def _write(self, packed: list[np.ndarray]) -> None:
        with self._writing():
            for row_t in packed:
                if self._writer is None:
                    self._writer = array_record_module.ArrayRecordWriter(self._temporary, _WRITER)
                row_t = row_t.astype(self._dtype)
                self._digest.update(row_t.tobytes())
                self._writer.write(records.encode_row(row_t))

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        """ArrayRecord raises RuntimeError, for a full disk say."""
        return failing_as(f"{self._name} cannot be written in {self._folder}", RuntimeError)


def _xz_size(utf8: bytes) -> int:
    # A dictionary beyond the data's end changes nothing but the time to clear it.
    size = min(2**26, max(4096, len(utf8)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
    return len(lzma.compress(utf8, format=lzma.FORMAT_XZ, filters=filters))
