"""The device mesh, and the one table of rules that lays logical axes on it.

Mesh axes: `data` (replicas), `fsdp` (parameters cut along the width, gathered where used), `tensor`
(heads, feed-forward and vocabulary cut, activations reduced). They are Auto axes: the compiler
propagates shardings from the parameters, the batch and the few places that call `constrain`.
"""

import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pangu_tiny.errors import UserError
from pangu_tiny.topology.torus import closed_paths

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
}
"""Logical axis → mesh axes. Every other axis is on each device in full. replica: the batch, of what
fsdp cuts along the width."""


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices; one of the sizes may be −1 for "what is left".

    Of several TPU slices, `data` alone goes from one to the other: their network is the slowest,
    and replicas exchange the least.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    binding = f"Hardware.data × fsdp × tensor = {data} × {fsdp} × {tensor}"
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{binding}: expected positive sizes, one of them −1 at most")
    given = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if np.prod(sizes) != len(devices):
        raise UserError(f"{binding} does not fit the {len(devices)} devices that JAX found")
    types = (AxisType.Auto,) * 3
    by_slice = [list(part) for _, part in itertools.groupby(sorted(devices, key=_slice), _slice)]
    if sizes[0] % len(by_slice):
        raise UserError(
            f"Hardware.data is {sizes[0]}, expected a multiple of the {len(by_slice)} slices"
        )
    within = (sizes[0] // len(by_slice), *sizes[1:])
    paths = [_along_links(part, within) for part in by_slice]
    if all(path is not None for path in paths):
        return Mesh(np.concatenate(paths), AXES, axis_types=types)
    if len(by_slice) == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    joined = create_hybrid_device_mesh(within, (len(by_slice), 1, 1), devices)
    return Mesh(joined, AXES, axis_types=types)


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _along_links(devices: list[jax.Device], sizes: tuple[int, ...]) -> np.ndarray | None:
    """Devices of a slice, neighbours on fsdp being linked chips; None where they cannot be, or
    where another axis than data has to be laid too."""
    if devices[0].platform != "tpu" or sizes[2] != 1:
        return None
    by_chip = {tuple(device.coords): device for device in devices}
    paths = closed_paths(list(by_chip), sizes[1]) if len(by_chip) == len(devices) else None
    if paths is None:
        return None
    return np.array([[[by_chip[chip]] for chip in path] for path in paths])


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis, but those along which the code is already split in context:
    a step takes each replica's gradients for itself."""
    split = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in RULES.get(axis, ()) if name not in split)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names."""
    return PartitionSpec(*(mesh_axes(axis) or None if axis else None for axis in axes))


def named_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its layout; without a mesh in context (`jax.set_mesh`), a no-op."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
