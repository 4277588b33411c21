"""The sum of gradients over devices: of integers, so that every order of the sum is exact."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pangu_tiny.topology.mesh import make_mesh, partition_spec
from pangu_tiny.topology.reduction import reduce_gradient, ring_reduce_scatter

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
                lambda partial: reduce_gradient(partial[0], embed=1),
                in_specs=partition_spec(("batch", None, None)),
                out_specs=partition_spec((None, "embed")),
                check_vma=False,
            )
        )(partial)
    np.testing.assert_array_equal(summed, partial.sum(axis=0))
