"""How the parameters of a model lie on a mesh: their logical axes by the rules of the mesh."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

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


def thin_shards(shape: ModelShape, mesh: Mesh) -> list[str]:
    """What is cut into fewer columns than half the lanes of a TPU, a line each: exchanges and
    copies then take as long as with twice as many."""
    leaves, found = flatten_dict(parameter_shapes(shape), sep="/"), {}
    for name in filter(leaves.get, PARAMETER_AXES):
        for axis, size in zip(PARAMETER_AXES[name], leaves[name].shape, strict=True):
            for cut in RULES.get(axis, ()) if axis in _SETTINGS else ():
                columns, parts = size // mesh.shape[cut], mesh.shape[cut]
                if parts > 1 and columns < _LEAST_COLUMNS:
                    found[axis] = (
                        f"Hardware.{cut} {parts} cuts ModelShape.{_SETTINGS[axis]} {size} into "
                        f"{columns} columns, expected at least {_LEAST_COLUMNS}"
                    )
    return list(found.values())


def check_divides(shape: ModelShape, mesh: Mesh) -> None:
    """Refuses a mesh on which an axis of the model does not divide."""
    leaves = flatten_dict(parameter_shapes(shape), sep="/")
    for name in filter(leaves.get, PARAMETER_AXES):
        for axis, size in zip(PARAMETER_AXES[name], leaves[name].shape, strict=True):
            for cut in RULES.get(axis, ()):
                if size % mesh.shape[cut]:
                    raise UserError(
                        f"ModelShape.{_SETTINGS.get(axis, axis)} {size} is not divisible by "
                        f"Hardware.{cut} {mesh.shape[cut]}: choose another mesh"
                    )
