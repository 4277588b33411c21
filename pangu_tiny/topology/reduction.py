"""Sums of gradients over the devices that share a batch, each of which keeps its part."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pangu_tiny.topology.mesh import RULES


def sum_over_replicas(
    take: Callable[..., tuple[Any, Any]], mesh: Mesh
) -> Callable[..., tuple[Any, Any]]:
    """The same function, which each replica calls for itself, on its rows.

    What it finds is so summed over replicas once in a step, after the last layer and the last step
    of accumulation: hardly anything else goes from one slice to another.

    Args:
      take: rows [accumulation, batch, …] and other arrays to what is to be summed, and what each
        row has, [accumulation, batch].
    """
    (replica,) = RULES["replica"]
    if mesh.shape[replica] == 1:
        return take

    def of_one(rows_abt, *arguments):
        found, rows_ab = take(rows_abt, *arguments)
        return jax.lax.psum(found, replica), rows_ab

    def of_all(rows_abt, *arguments):
        whole, cut = PartitionSpec(), PartitionSpec(None, replica)
        return jax.shard_map(
            of_one,
            in_specs=(cut, *[whole] * len(arguments)),
            out_specs=(whole, cut),
            axis_names={replica},
            check_vma=False,
        )(rows_abt, *arguments)

    return of_all


def reduce_gradient(partial: jax.Array, embed: int, batch: Sequence[str]) -> jax.Array:
    """The sum over devices of the batch, in the dtype of `partial`; to be called where the code
    runs on each device (`jax.shard_map`).

    Over fsdp first, after which each device has a part alone, then over replicas, when there is
    least to sum.

    Args:
      partial: the gradient from the sequences of this device; of all the axis `embed`.
      embed: the axis of the width, along which fsdp cuts.
      batch: the mesh axes over which the sum goes.
    """
    for axis in RULES["embed"]:
        partial = _reduce_scatter(partial, axis, embed)
    replicas = tuple(axis for axis in batch if axis not in RULES["embed"])
    sizes = [jax.lax.axis_size(axis) for axis in replicas]
    return jax.lax.psum(partial, replicas) if max(sizes, default=1) > 1 else partial


def _reduce_scatter(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    if jax.lax.axis_size(axis) == 1:
        return x
    return jax.lax.platform_dependent(
        x,
        tpu=lambda x: ring_reduce_scatter(x, axis, dimension),
        default=lambda x: jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True),
    )


def ring_reduce_scatter(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """`jax.lax.psum_scatter(..., tiled=True)` over the devices of a mesh axis taken as a ring.

    For TPUs: for most meshes their compiler knows nothing but an all-reduce in place of it, which
    moves twice as much while nothing is computed. What a ring hands on runs beside computation.
    One half of each part goes round one way, the other half the other way, so that every link is
    used both ways. `make_mesh` lays fsdp so that neighbours on it are linked, where tensor is 1.
    """
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    size = x.shape[dimension] // devices
    halves = []
    for begin, end, way in ((0, size // 2, 1), (size // 2, size, -1)):

        def part(device, begin=begin, end=end):
            start = device % devices * size + begin
            return jax.lax.dynamic_slice_in_dim(x, start, end - begin, dimension)

        neighbours = [(device, (device + way) % devices) for device in range(devices)]
        # What arrives in the last turn is the part of this device, with all others in the sum.
        total = part(here - way)
        for turn in range(2, devices + 1):
            total = jax.lax.ppermute(total, axis, neighbours) + part(here - way * turn)
        halves.append(total)
    return jnp.concatenate(halves, dimension)
