"""A prepared token dataset: what its dataset.json says, and its rows by number."""

import concurrent.futures
import functools
import itertools
import os
import resource
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from pangu_tiny.data import records, rows
from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.workdir import check_same, finished, read_json

DESCRIPTION = "dataset.json"
_MAKERS = "prepare-data (or remap-dataset)"
TOKENIZER = "tokenizer.model"
_NAMES = (
    "packing", "digest", "sequence_length", "vocab_size", "begin_id", "end_id",
    "tokenizer_digest", "sources", "splits",
)  # fmt: skip
# No read-ahead: rows are read in random order.
_READER = "readahead_buffer_size:0,max_parallelism:0"


class TokenDataset:
    """Rows of token ids, numbered within each split: shards in order, sources in order.

    Attributes:
      description: the whole of its dataset.json (see `pangu_tiny.data.prepare_data`).
      digest: sha256 of the contents; the same for the same rows, wherever they lie.
      sequence_length: targets of a row; a row has one id more.
      vocab_size, begin_id, end_id, tokenizer_digest: of the tokenizer that wrote the ids.
      sources, splits: their names, in order; splits are "train" and "held_out".

    Reading is safe from several threads.
    """

    def __init__(self, path: str, description: dict[str, Any]):
        self.path = path
        self.description = description
        self.digest: str = description["digest"]
        self.sequence_length: int = description["sequence_length"]
        self.vocab_size: int = description["vocab_size"]
        self.begin_id: int = description["begin_id"]
        self.end_id: int = description["end_id"]
        self.tokenizer_digest: str = description["tokenizer_digest"]
        self.sources: list[str] = description["sources"]
        self.splits: list[str] = list(description["splits"])
        self._dtype = records.row_dtype(self.vocab_size)
        self._starts = {
            split: np.cumsum([0] + [shard["rows"] for shard in self._shards(split)])
            for split in self.splits
        }
        self._readers: dict[str, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "TokenDataset":
        """Opens the folder that prepare-data wrote."""
        dataset = cls.described(path)
        if "://" in dataset.path:
            raise UserError(
                f"dataset {path} cannot be read row by row there; mount the bucket (gcsfuse) and "
                f"give the path below which it then lies"
            )
        shards = [shard for split in dataset.splits for shard in dataset._shards(split)]
        _allow_open_files(len(shards))
        with concurrent.futures.ThreadPoolExecutor(32) as pool:  # one by one is slow on a mount
            list(pool.map(dataset._check_size, shards))
        return dataset

    @classmethod
    def described(cls, path: str | os.PathLike[str]) -> "TokenDataset":
        """What a folder's dataset.json says, without a look at the rows."""
        description = read_json(finished("dataset", path, _MAKERS, DESCRIPTION), *_NAMES)
        if description.get("packing") != rows.PACKING:
            raise UserError(
                f"dataset {path} has packing rule {description.get('packing')},"
                f" expected {rows.PACKING}: prepare it again"
            )
        return cls(os.fspath(path), description)

    @property
    def marks(self) -> rows.Marks:
        return rows.Marks(self.begin_id, self.end_id)

    def count(self, split: str) -> int:
        """The number of rows of a split."""
        return self._split(split)["rows"]

    def tokenizer_bytes(self) -> bytes:
        """The SentencePiece model that wrote the ids."""
        file = epath.Path(self.path) / TOKENIZER
        tokenizer = Tokenizer.open(file)
        written = "the dataset was written with"
        check_same(f"{file} has digest", tokenizer.digest, written, self.tokenizer_digest)
        return tokenizer.model_bytes

    def read(self, split: str, row_ids: np.ndarray) -> np.ndarray:
        """Reads rows by number, in any order, with repeats.

        Args:
          split: "train" or "held_out".
          row_ids: integers [n], each from 0 to below `count(split)`.

        Returns:
          int32 ids [n, sequence_length + 1].

        Raises:
          IndexError: a row number is out of range.
          UserError: a shard cannot be read or holds ids beyond the vocabulary; it is named.
        """
        row_ids = np.asarray(row_ids, np.int64)
        shards, starts = self._shards(split), self._starts[split]
        if row_ids.size and not (row_ids.min() >= 0 and row_ids.max() < starts[-1]):
            raise IndexError(f"{split} has rows 0 to {starts[-1] - 1}")
        rows_bt = np.empty((len(row_ids), self.sequence_length + 1), np.int32)
        shard_of = np.searchsorted(starts, row_ids, side="right") - 1
        for index in np.unique(shard_of):
            where = np.flatnonzero(shard_of == index)
            rows_bt[where] = self._read_shard(shards[index], row_ids[where] - starts[index])
        return rows_bt

    def source_ids(self, split: str, row_ids: np.ndarray) -> np.ndarray:
        """The index in `sources` of each row."""
        ends = np.cumsum([count for _, count in self.source_rows(split)])
        return np.searchsorted(ends, np.asarray(row_ids), side="right")

    def source_rows(self, split: str) -> list[tuple[int, int]]:
        """(first row, number of rows) of each source; a source's rows are neighbours."""
        counts = [self._split(split)["sources"][name]["rows"] for name in self.sources]
        firsts = itertools.accumulate(counts, initial=0)
        return list(zip(firsts, counts, strict=False))

    def documents(
        self, split: str, shards: Iterable[int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (source id, ids of a document with both marks), rebuilt from the rows, in order.

        Packing these again gives the same rows. `shards` are numbers of shards of the split, by
        default all.
        """
        found = self._shards(split)
        for shard in found if shards is None else [found[index] for index in shards]:
            source = self.sources.index(shard["source"])
            shard_rows = (
                row_t
                for first in range(0, shard["rows"], 256)
                for row_t in self._read_shard(
                    shard, np.arange(first, min(first + 256, shard["rows"]))
                )
            )
            for document in rows.token_stream(shard_rows, self.end_id):
                yield source, document

    def _split(self, split: str) -> dict[str, Any]:
        if split not in self.splits:
            raise UserError(f"dataset {self.path} has splits {self.splits}; {split!r} was asked")
        return self.description["splits"][split]

    def _shards(self, split: str) -> list[dict[str, Any]]:
        return self._split(split)["shards"]

    def _read_shard(self, shard: dict[str, Any], places: np.ndarray) -> np.ndarray:
        file = epath.Path(self.path) / shard["file"]
        with failing_as(f"{file} cannot be read", RuntimeError, OSError, ValueError, IndexError):
            found = self._reader(shard).read(places.tolist())
            rows_bt = records.decode_rows(found, self.sequence_length + 1, self._dtype)
        if rows_bt.size and rows_bt.max() >= self.vocab_size:
            raise UserError(
                f"{file} holds token id {rows_bt.max()}, expected ids below {self.vocab_size}"
            )
        return rows_bt

    def _reader(self, shard: dict[str, Any]) -> Any:
        name = shard["file"]
        with self._lock:
            if name not in self._readers:
                self._check_size(shard)
                self._readers[name] = array_record_module.ArrayRecordReader(
                    os.path.join(self.path, name), _READER, file_reader_buffer_size=2**15
                )
            return self._readers[name]

    def _check_size(self, shard: dict[str, Any]) -> None:
        file = os.path.join(self.path, shard["file"])
        if not os.path.exists(file):
            raise UserError(f"{file} is missing; prepare the dataset again")
        if (size := os.path.getsize(file)) != shard["size"]:
            raise UserError(f"{file} has {size} bytes, expected {shard['size']}: it is damaged")


@functools.lru_cache(maxsize=1)
def open_once(path: str, digest: str) -> TokenDataset:
    """A dataset for all jobs of a process; other contents at the same path have another digest."""
    return TokenDataset.open(path)


def _allow_open_files(count: int) -> None:
    """Raises the soft limit where `count` files more might pass it; every shard stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and count > soft // 2:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
