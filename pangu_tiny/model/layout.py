"""How the parameters of a model lie on a mesh: their logical axes by the rules of the mesh."""

from collections.abc import Iterator
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import PARAMETER_AXES, parameter_axes, parameter_shapes
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.topology.mesh import RULES, named_sharding

_SETTINGS = {"embed": "width", "ffn": "ffn_width", "vocab": "padded vocabulary"}
"""What decides the size of a logical axis, where that has another name."""

_LEAST_COLUMNS = 64


def param_shardings(shape: ModelShape, mesh: Mesh) -> dict[str, Any]:
    """The layout of every parameter; scales of norms are on every device, in every layer."""

    def layout(axes: tuple[str, ...]) -> NamedSharding:
        vector = len([axis for axis in axes if axis != "layer"]) == 1
        return named_sharding(mesh, () if vector else axes)

    axes = parameter_axes(shape)
    return jax.tree.map(layout, axes, is_leaf=lambda node: isinstance(node, tuple))


def layer_shardings(shape: ModelShape, mesh: Mesh) -> dict[str, Any]:
    """The same for parameters by layer (`model/cached.py`)."""
    shardings = param_shardings(shape, mesh)
    layer = jax.tree.map(
        lambda layout: NamedSharding(mesh, PartitionSpec(*layout.spec[1:])), shardings["blocks"]
    )
    return shardings | {"blocks": [layer] * shape.depth}


def thin_shards(shape: ModelShape, mesh: Mesh) -> list[str]:
    """What is cut into fewer columns than half of the 128 lanes of a TPU, a line each."""
    lines = {
        f"Hardware.{cut} {parts} cuts ModelShape.{_SETTINGS[axis]} {size} into {size // parts} "
        f"columns, expected at least {_LEAST_COLUMNS}": None
        for axis, size, cut, parts in _cuts(shape, mesh)
        if axis in _SETTINGS and parts > 1 and size // parts < _LEAST_COLUMNS
    }
    return list(lines)


def check_divides(shape: ModelShape, mesh: Mesh) -> None:
    """Refuses a mesh on which an axis of the model does not divide."""
    for axis, size, cut, parts in _cuts(shape, mesh):
        if size % parts:
            raise UserError(
                f"ModelShape.{_SETTINGS.get(axis, axis)} {size} is not divisible by "
                f"Hardware.{cut} {parts}: choose another mesh"
            )


def _cuts(shape: ModelShape, mesh: Mesh) -> Iterator[tuple[str, int, str, int]]:
    """Of every axis of every parameter that a mesh axis cuts: its name and size, that of the mesh
    axis, and into how many parts."""
    leaves = flatten_dict(parameter_shapes(shape), sep="/")
    for name in filter(leaves.get, PARAMETER_AXES):
        for axis, size in zip(PARAMETER_AXES[name], leaves[name].shape, strict=True):
            for cut in RULES.get(axis, ()):
                yield axis, size, cut, mesh.shape[cut]
