"""The sum of gradients over devices: of integers, so that every order of the sum is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pangu_tiny.topology.mesh import RULES, constrain, make_mesh, partition_spec
from pangu_tiny.topology.reduction import (
    reduce_gradient,
    ring_reduce_scatter,
    sum_over_replicas,
)

PARTIAL = np.random.default_rng(0).integers(0, 100, (8, 24, 16)).astype(np.float32)


@pytest.mark.parametrize("rows", [8, 16, 24])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_ring_leaves_each_device_its_part(rows, dimension):
    """1, 2 or 3 rows a device, so that the halves that go round are none, equal or unequal."""
    partial = PARTIAL[:, :rows] if dimension == 0 else PARTIAL[:, :rows].swapaxes(1, 2)
    layout = [None, None]
    layout[dimension] = "fsdp"

    def local(partial):
        return ring_reduce_scatter(partial[0], "fsdp", dimension)

    with jax.set_mesh(make_mesh(1, 8, 1)):
        summed = jax.jit(
            jax.shard_map(local, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec(*layout))
        )(partial)
    np.testing.assert_array_equal(summed, partial.sum(axis=0))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_a_gradient_is_summed_over_the_batch_and_cut_along_the_width(sizes):
    """Not over tensor, where each device has a gradient of its own."""
    mesh = make_mesh(*sizes)
    partial = PARTIAL[: sizes[0] * sizes[1]]
    with jax.set_mesh(mesh):
        summed = jax.jit(
            jax.shard_map(
                lambda partial: reduce_gradient(partial[0], 1, RULES["batch"]),
                in_specs=partition_spec(("batch", None, None)),
                out_specs=partition_spec((None, "embed")),
                check_vma=False,
            )
        )(partial)
    np.testing.assert_array_equal(summed, partial.sum(axis=0))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_replicas_sum_what_each_finds_on_its_rows(sizes):
    """Within a replica an axis of the batch is cut by fsdp alone."""
    rows_abt = PARTIAL.astype(np.int32).reshape(3, 8, 128)
    mesh, sizes_seen = make_mesh(*sizes), []

    def take(rows_abt, factor):
        sizes_seen.append(rows_abt.shape[1])
        rows_abt = constrain(rows_abt, None, "batch", None)
        return factor * jnp.sum(rows_abt, axis=(0, 1)), jnp.sum(rows_abt, axis=-1)

    with jax.set_mesh(mesh):
        summed, rows_ab = jax.jit(sum_over_replicas(take, mesh))(rows_abt, 2)
    assert set(sizes_seen) == {8 // sizes[0]}
    np.testing.assert_array_equal(summed, 2 * rows_abt.sum(axis=(0, 1)))
    np.testing.assert_array_equal(rows_ab, rows_abt.sum(axis=-1))
