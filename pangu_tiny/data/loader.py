"""Batches of rows, on Grain: batch i is a pure function of (dataset, order, i).

Batch i is rows i·B to i·B + B - 1 of the order, so what an epoch leaves over opens the next one.
Nothing is kept in memory but the rows on their way. A later round of training goes through chosen
units of the order, see `Drawn`.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import numpy as np

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.order import Order


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
    order: Order,
    positions: np.ndarray | None = None,
    start: int = 0,
    drawn: Drawn | None = None,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """An endless iterator over the batches of a split, from batch `start` on.

    Args:
      split: "train" or "held_out".
      global_batch: rows in a batch, of all processes together.
      positions: places within the global batch that this process serves; by default all.
      drawn: serves these units alone, and ends after the last whole batch of them.
      prefetch: batches read ahead, each on a thread; 0 reads on the caller's.

    Returns:
      A Grain iterator over {"rows": int32 [n, sequence_length + 1], "row_ids": int64 [n]} where n
      is len(positions).
    """
    places_to_rows = order.rows(dataset, split)
    places = np.arange(global_batch) if positions is None else np.asarray(positions)
    if places.size and not (places.min() >= 0 and places.max() < global_batch):
        raise ValueError(f"positions {places} lie outside a batch of {global_batch} rows")

    rows = sys.maxsize if drawn is None else len(drawn.units) * drawn.rows

    def read(index: int) -> dict[str, np.ndarray]:
        numbers = (index * global_batch + places).tolist()
        if drawn is not None:
            numbers = [drawn.place(number) for number in numbers]
        row_ids = np.array([places_to_rows[number] for number in numbers], np.int64)
        return {"rows": dataset.read(split, row_ids), "row_ids": row_ids}

    return _iterate(range(start, rows // global_batch), read, prefetch)


def held_out_batches(
    dataset: TokenDataset,
    batch_size: int,
    positions: np.ndarray | None = None,
    row_ids: np.ndarray | None = None,
    split: str = "held_out",
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """One pass over a split in order, so that every target comes exactly once.

    The last batch is filled up with rows of nothing but padding, whose row id is -1: they have no
    target, so that their loss is 0, and whoever keeps losses by row leaves them out.

    Args:
      row_ids: integers [n], the rows that are served; by default all of the split.

    The other args, and the result, are those of `batches`.
    """
    chosen = np.arange(dataset.count(split)) if row_ids is None else np.asarray(row_ids)
    places = np.arange(batch_size) if positions is None else np.asarray(positions)

    def read(index: int) -> dict[str, np.ndarray]:
        numbers = index * batch_size + places
        there = numbers < len(chosen)
        served = np.full(len(places), -1, np.int64)
        served[there] = chosen[numbers[there]]
        rows_bt = np.full((len(places), dataset.sequence_length + 1), dataset.end_id, np.int32)
        rows_bt[there] = dataset.read(split, served[there])
        return {"rows": rows_bt, "row_ids": served}

    return _iterate(range(-(-len(chosen) // batch_size)), read, prefetch)


def _iterate(
    numbers: range, read: Callable[[int], dict[str, Any]], prefetch: int
) -> grain.DatasetIterator:
    options = grain.ReadOptions(num_threads=min(prefetch, 8), prefetch_buffer_size=prefetch)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
    return iter(dataset.to_iter_dataset(options))
