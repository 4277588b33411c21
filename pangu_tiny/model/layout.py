"""How the parameters of a model lie on a mesh: their logical axes by the rules of the mesh."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import PARAMETER_AXES, parameter_axes, parameter_shapes
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.topology.mesh import RULES, named_sharding

_SETTINGS = {"embed": "width", "ffn": "ffn_width", "vocab": "padded vocabulary"}
"""What decides the size of a logical axis, where that has another name."""


def param_shardings(shape: ModelShape, mesh: Mesh) -> dict[str, Any]:
    """The layout of every parameter."""
    return jax.tree.map(
        lambda axes: named_sharding(mesh, axes),
        parameter_axes(shape),
        is_leaf=lambda node: isinstance(node, tuple),
    )


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
