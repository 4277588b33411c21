"""The loader: batch i is a pure function of (dataset, mixture, shuffle, seed, i)."""

import itertools

import grain
import numpy as np
import pytest

from pangu_tiny.data.loader import Drawn, batches, held_out_batches
from pangu_tiny.data.order import Order
from pangu_tiny.data.rows import read_marks
from pangu_tiny.errors import UserError

BATCH = 6


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def ids(dataset, count, seed=0, mixture=None, shuffle=True, **settings):
    """Row ids of the first batches, flat."""
    order = Order(seed, mixture, shuffle)
    found = take(batches(dataset, "train", BATCH, order, **settings), count)
    return np.concatenate([batch["row_ids"] for batch in found])


def test_rows_are_those_of_their_ids(dataset):
    for batch in take(batches(dataset, "train", BATCH, Order(0)), 3):
        assert batch["rows"].shape == (BATCH, 25) and batch["rows"].dtype == np.int32
        np.testing.assert_array_equal(batch["rows"], dataset.read("train", batch["row_ids"]))


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("mixture", [None, {"a": 1.0, "b": 3.0}])
def test_any_batch_can_be_the_first(dataset, prefetch, mixture):
    whole = ids(dataset, 40, mixture=mixture).reshape(40, BATCH)
    for start in (1, 17, 39):
        found = ids(dataset, 40 - start, mixture=mixture, start=start, prefetch=prefetch)
        np.testing.assert_array_equal(found.reshape(-1, BATCH), whole[start:])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_a_batch(dataset, processes):
    whole = ids(dataset, 10).reshape(10, BATCH)
    for process in range(processes):
        positions = np.arange(BATCH)[process::processes]
        found = ids(dataset, 10, positions=positions).reshape(10, -1)
        np.testing.assert_array_equal(found, whole[:, positions])


@pytest.mark.parametrize("processes", [1, 2])
def test_drawn_units_are_served_from_any_batch_on_to_any_process(dataset, processes):
    """Units of four rows, in batches of six."""
    units = np.array([9, 2, 30, 5, 11, 7])
    order = ids(dataset, 31).tolist()
    wanted = np.array([order[4 * unit + row] for unit in units for row in range(4)])
    for process in range(processes):
        positions = np.arange(BATCH)[process::processes]
        found = ids(dataset, 3, positions=positions, drawn=Drawn(units, 4), start=1)
        np.testing.assert_array_equal(found.reshape(3, -1), wanted.reshape(4, BATCH)[1:, positions])


def test_an_epoch_has_every_row_once_and_what_is_left_opens_the_next(dataset):
    rows = dataset.count("train")
    assert rows % BATCH, "no row is left over"
    order = ids(dataset, 3 * rows // BATCH + 1)
    epochs = [order[n * rows : (n + 1) * rows] for n in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    assert all((a != b).any() for a, b in itertools.combinations(epochs, 2))
    assert (np.diff(epochs[0]) != 1).any(), "rows come in the order of the files"


def test_seed_and_content_give_the_order(dataset, prepare, corpora, tmp_path):
    first = ids(dataset, 10)
    np.testing.assert_array_equal(first, ids(dataset, 10))
    assert (first != ids(dataset, 10, seed=1)).any()
    other = prepare(dict(reversed(corpora.items())), tmp_path / "w")
    assert other.count("train") == dataset.count("train")
    assert (first != ids(other, 10)).any()


def test_mixtures_take_sources_by_weight_and_each_row_in_turn(dataset):
    (first, count), (_, others) = dataset.source_rows("train")
    order = ids(dataset, 400, mixture={"a": 1.0, "b": 3.0})
    sources = dataset.source_ids("train", order)
    for end in (40, 400, 1200):
        assert abs(np.mean(sources[:end] == 1) - 0.75) <= 1 / end + 1e-9, "not as even as can be"
    assert sorted(order[sources == 0][:count]) == list(range(first, first + count))
    own = order[sources == 1]
    assert sorted(own[:others]) == sorted(own[others : 2 * others]) == list(
        range(count, count + others)
    )  # fmt: skip
    alone = ids(dataset, 50, mixture={"b": 0.1})
    assert set(dataset.source_ids("train", alone)) == {1}
    assert (order[:600] != ids(dataset, 100, mixture={"a": 1.0, "b": 2.0})).any()


def test_without_shuffling_rows_come_as_they_are_stored(dataset):
    rows = dataset.count("train")
    order = ids(dataset, 2 * rows // BATCH, shuffle=False)
    np.testing.assert_array_equal(order, np.arange(len(order)) % rows)
    (_, count), _ = dataset.source_rows("train")
    taken = ids(dataset, 200, mixture={"a": 1.0, "b": 3.0}, shuffle=False)
    for source, first, several in ((0, 0, count), (1, count, rows - count)):
        own = taken[dataset.source_ids("train", taken) == source]
        np.testing.assert_array_equal(own, first + np.arange(len(own)) % several)


@pytest.mark.parametrize(
    ("mixture", "named"),
    [
        ({"c": 1.0}, r"mixture names 'c'; the dataset has sources \['a', 'b'\]"),
        ({"a": -1.0}, r"mixture\['a'\] is -1.0, expected at least 0"),
        ({"a": float("nan")}, r"mixture\['a'\] is nan, expected at least 0"),
        ({"a": 0.0}, "every source the weight 0"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(dataset, mixture, named):
    with pytest.raises(UserError, match=named):
        Order(0, mixture).rows(dataset, "train")


def test_splits_and_sources_without_rows_are_refused(prepare, corpora, write_jsonl, tmp_path):
    """And a position that lies outside of a batch, which would be another batch's row."""
    text = {**corpora, "empty": write_jsonl(tmp_path / "empty.jsonl", ["", " "])}
    dataset = prepare(text, tmp_path / "w", held_out_fraction=0.0)
    with pytest.raises(UserError, match="has no rows in split 'held_out'"):
        batches(dataset, "held_out", BATCH, Order(0))
    with pytest.raises(UserError, match="gives 'empty' a weight, which has no rows in 'train'"):
        batches(dataset, "train", BATCH, Order(0, {"a": 1.0, "empty": 1.0}))
    with pytest.raises(ValueError, match="outside a batch of 6 rows"):
        batches(dataset, "train", BATCH, Order(0), positions=np.array([6]))


def test_grain_restores_it_anywhere(dataset):
    """Grain's own check, which stops and restores at every position."""
    first = _First(lambda: batches(dataset, "train", BATCH, Order(0), prefetch=2), 8)
    grain.experimental.assert_equal_output_after_checkpoint(first)


class _First(grain.IterDataset):
    """The first of endless batches."""

    def __init__(self, endless, count):
        super().__init__()
        self._endless, self._count = endless, count

    def __iter__(self):
        return _FirstIterator(self._endless(), self._count)


class _FirstIterator(grain.DatasetIterator):
    def __init__(self, parent, count):
        super().__init__(parent)
        self._count, self._given = count, 0

    def __next__(self):
        if self._given == self._count:
            raise StopIteration
        self._given += 1
        return next(self._parent)

    def get_state(self):
        return {"parent": self._parent.get_state(), "given": self._given}

    def set_state(self, state):
        self._parent.set_state(state["parent"])
        self._given = state["given"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("batch_size", [4, 7, 1000])
def test_a_held_out_pass_has_every_target_once(dataset, batch_size, processes):
    row_ids, targets = [], 0
    for process in range(processes):
        positions = np.arange(batch_size)[process::processes]
        found = list(held_out_batches(dataset, batch_size, positions))
        assert len(found) == -(-dataset.count("held_out") // batch_size)
        for batch in found:
            row_ids += batch["row_ids"].tolist()
            marked = read_marks(batch["rows"], dataset.begin_id, dataset.end_id)
            targets += int(marked.weights.sum())
            assert batch["rows"].shape == (len(positions), 25)
    assert sorted(i for i in row_ids if i >= 0) == list(range(dataset.count("held_out")))
    assert targets == dataset.description["splits"]["held_out"]["targets"]
