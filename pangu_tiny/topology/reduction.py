"""Sums of gradients over the devices that share a batch, each of which keeps its part.

To be called where the code runs on each device (`jax.shard_map`).
"""

import jax
import jax.numpy as jnp

from pangu_tiny.topology.mesh import RULES


def reduce_gradient(partial: jax.Array, embed: int) -> jax.Array:
    """The sum over all devices of the batch, in the dtype of `partial`.

    Over fsdp first, after which each device has a part alone, then over replicas, when there is
    least to sum.

    Args:
      partial: the gradient from the sequences of this device; of all the axis `embed`.
      embed: the axis of the width, along which fsdp cuts.
    """
    for axis in RULES["embed"]:
        partial = _reduce_scatter(partial, axis, embed)
    replicas = tuple(axis for axis in RULES["batch"] if axis not in RULES["embed"])
    sizes = [jax.lax.axis_size(axis) for axis in replicas]
    return jax.lax.psum(partial, replicas) if max(sizes) > 1 else partial


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
