"""The feed: every mesh sees the same batches, and every process reads only what it serves."""

import numpy as np
import pytest

from pangu_tiny.errors import UserError
from pangu_tiny.program.batch import BatchLayout
from pangu_tiny.program.feed import Feed
from pangu_tiny.topology.mesh import make_mesh

ROWS = np.arange(24 * 5, dtype=np.int32).reshape(24, 5)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("per_device_batch", [1, 3])
def test_places_of_a_batch_are_the_same_on_every_mesh(sizes, per_device_batch):
    """Row p of a batch is row p of the flattened array, and requests of any device are seen."""
    feed = Feed(BatchLayout.of(make_mesh(*sizes), 24, per_device_batch))
    shards = sizes[0] * sizes[1]
    assert feed.layout.rows_at_once == per_device_batch * shards
    assert feed.layout.rows == 24
    np.testing.assert_array_equal(feed.positions, np.arange(24))
    local = {"rows": ROWS[feed.positions], "row_ids": 7 + feed.positions}
    batch = feed.place(local, saves=True)
    np.testing.assert_array_equal(np.asarray(batch.rows_abt).reshape(24, 5), ROWS)
    np.testing.assert_array_equal(np.asarray(batch.row_ids_ab).reshape(-1), 7 + np.arange(24))
    shard = batch.rows_abt.sharding.shard_shape(batch.rows_abt.shape)
    assert shard == (feed.layout.accumulation, per_device_batch, 5)
    assert np.asarray(batch.requests).tolist() == [[True, False]] * 8


@pytest.mark.parametrize(("largest", "taken"), [(1, 1), (4, 3), (5, 3), (6, 6), (100, 6)])
def test_accumulation_follows_from_the_largest_batch_of_a_device(largest, taken):
    """Six sequences for each of four shards: the most at once that divides six."""
    layout = BatchLayout.of(make_mesh(1, 4, 2), 24, largest)
    assert (layout.rows_at_once, layout.accumulation) == (4 * taken, 6 // taken)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"global_batch 12 is not divisible by .* = 8, the devices"):
        BatchLayout.of(make_mesh(1, 8, 1), 12, 4)
