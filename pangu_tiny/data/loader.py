"""Batches of rows, on Grain: batch i is a pure function of (dataset, mixture, shuffle, seed, i).

Rows come in an endless order. Without a mixture, an epoch is a permutation of all rows of the
split, another one for each epoch, given by the dataset's digest, the seed and the epoch. With a
mixture, each source goes through its own rows in that way, and the sources take turns as evenly as
their weights allow. Without shuffling, the rows of a source come as they are stored, and without a
mixture one source comes behind the other. Batch i is rows i·B to i·B + B - 1 of the order, so what
an epoch leaves over opens the next one. Nothing is kept in memory but the rows on their way: any
place in the order can be computed on its own. A later round of training goes through chosen units
of that order, see `Drawn`.
"""

import hashlib
import json
import math
import sys
from typing import Any, NamedTuple

import grain
import numpy as np

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError


class Drawn(NamedTuple):
    """What is served of an order instead of all of it, and in which order.

    Attributes:
      units: integers [n]; unit u is the rows at places u · rows to u · rows + rows − 1.
      rows: in a unit.
    """

    units: np.ndarray
    rows: int

    def place(self, index: int) -> int:
        """The place in the order of the row that is served as number `index`."""
        unit, inside = divmod(index, self.rows)
        return int(self.units[unit]) * self.rows + inside


def batches(
    dataset: TokenDataset,
    split: str,
    global_batch: int,
    seed: int,
    mixture: dict[str, float] | None = None,
    shuffle: bool = True,
    positions: np.ndarray | None = None,
    start: int = 0,
    drawn: Drawn | None = None,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """An endless iterator over the batches of a split, from batch `start` on.

    Args:
      dataset: where the rows are.
      split: "train" or "held_out".
      global_batch: rows in a batch, of all processes together.
      seed: of the order.
      mixture: weight of each source by its name; a source that is not named is left out. The
        weights are shares of rows. By default every row comes once in an epoch.
      shuffle: False takes rows as they are stored.
      positions: places within the global batch that this process serves; by default all.
      start: number of the first batch.
      drawn: serves these units alone, and ends behind the last whole batch of them.
      prefetch: batches read ahead, each on a thread; 0 reads on the caller's.

    Returns:
      A Grain iterator over {"rows": int32 [n, sequence_length + 1], "row_ids": int64 [n]} where n
      is len(positions). Its state is the number of the next batch, whatever `start` was.

    Raises:
      UserError: a bad mixture, or a split without rows.
    """
    served = batch_dataset(
        dataset, split, global_batch, seed, mixture, shuffle, positions, drawn, prefetch
    )
    iterator = iter(served)
    if start:
        iterator.set_state({"next_index": start})
    return iterator


def batch_dataset(
    dataset: TokenDataset,
    split: str,
    global_batch: int,
    seed: int,
    mixture: dict[str, float] | None = None,
    shuffle: bool = True,
    positions: np.ndarray | None = None,
    drawn: Drawn | None = None,
    prefetch: int = 4,
) -> grain.IterDataset:
    """The Grain dataset that `batches` iterates over."""
    order = row_order(dataset, split, seed, mixture, shuffle)
    places = np.arange(global_batch) if positions is None else np.asarray(positions)
    if places.size and not (places.min() >= 0 and places.max() < global_batch):
        raise ValueError(f"positions {places} lie outside a batch of {global_batch} rows")

    rows = sys.maxsize if drawn is None else len(drawn.units) * drawn.rows

    def read(index: int) -> dict[str, np.ndarray]:
        numbers = index * global_batch + places
        if drawn is not None:
            numbers = map(drawn.place, numbers)
        row_ids = np.array([order[int(number)] for number in numbers], np.int64)
        return {"rows": dataset.read(split, row_ids), "row_ids": row_ids}

    return _prefetched(grain.MapDataset.range(rows // global_batch).map(read), prefetch)


def held_out_batches(
    dataset: TokenDataset,
    batch_size: int,
    positions: np.ndarray | None = None,
    row_ids: np.ndarray | None = None,
    split: str = "held_out",
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """One pass over a split in order, so that every target comes exactly once.

    The last batch is filled up with rows of nothing but padding, whose row id is -1.

    Args:
      row_ids: integers [n], the rows that are served; by default all of the split.

    The other args, and the result, are those of `batches`.
    """
    chosen = np.arange(dataset.rows(split)) if row_ids is None else np.asarray(row_ids)
    places = np.arange(batch_size) if positions is None else np.asarray(positions)

    def read(index: int) -> dict[str, np.ndarray]:
        numbers = index * batch_size + places
        there = numbers < len(chosen)
        served = np.full(len(places), -1, np.int64)
        served[there] = chosen[numbers[there]]
        rows_bt = np.full((len(places), dataset.sequence_length + 1), dataset.end_id, np.int32)
        rows_bt[there] = dataset.read(split, served[there])
        return {"rows": rows_bt, "row_ids": served}

    count = -(-len(chosen) // batch_size)
    return iter(_prefetched(grain.MapDataset.range(count).map(read), prefetch))


def row_order(
    dataset: TokenDataset,
    split: str,
    seed: int,
    mixture: dict[str, float] | None = None,
    shuffle: bool = True,
) -> grain.MapDataset:
    """The endless order of rows: item k is the number of the row at place k.

    Raises:
      UserError: a bad mixture, or a split without rows.
    """
    if not dataset.rows(split):
        raise UserError(f"dataset {dataset.path} has no rows in split {split!r}")
    if mixture is None:
        return _endless(0, dataset.rows(split), shuffle, [dataset.digest, split, seed])
    weights = _check_mixture(dataset, split, mixture)
    orders = [
        _endless(first, count, shuffle, [dataset.digest, split, seed, weights, source])
        for source, (first, count) in enumerate(dataset.source_rows(split))
        if weights[source]
    ]
    return grain.MapDataset.mix(orders, [weight for weight in weights if weight])


def _endless(first: int, count: int, shuffle: bool, key: list[Any]) -> grain.MapDataset:
    rows = grain.MapDataset.range(first, first + count)
    if not shuffle:
        return rows.repeat()
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    # Grain adds the number of the epoch to this seed.
    seed = int.from_bytes(digest[:4], "big")
    return rows.shuffle(seed=seed).repeat()


def _prefetched(dataset: grain.MapDataset, prefetch: int) -> grain.IterDataset:
    options = grain.ReadOptions(num_threads=min(prefetch, 8), prefetch_buffer_size=prefetch)
    return dataset.to_iter_dataset(options)


def _check_mixture(dataset: TokenDataset, split: str, mixture: dict[str, float]) -> list[float]:
    """The weight of each source, in order."""
    rows = {
        name: count
        for name, (_, count) in zip(dataset.sources, dataset.source_rows(split), strict=True)
    }
    for name, weight in mixture.items():
        if name not in rows:
            raise UserError(f"mixture names {name!r}; the dataset has sources {dataset.sources}")
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"mixture gives {name!r} the weight {weight}; expected 0 or more")
        if weight and not rows[name]:
            raise UserError(f"mixture gives {name!r} a weight, which has no rows in {split!r}")
    weights = [float(mixture.get(name, 0)) for name in dataset.sources]
    if not any(weights):
        raise UserError(f"mixture {mixture} gives every source the weight 0")
    return weights
