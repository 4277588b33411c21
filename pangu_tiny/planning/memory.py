"""What a chip's memory holds while a program runs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.program.step import Objective
from pangu_tiny.topology.slices import Slice


def need(found: Any) -> int:
    """Bytes that one device needs for a program, by the compiler's analysis."""
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )


def shard_bytes(tree: Any) -> int:
    """Of one chip's part of arrays, given as shapes with layouts."""
    leaves = jax.tree.leaves(tree)
    shards = (jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for x in leaves)
    return sum(map(_bytes, shards))


@functools.cache
def saved_bytes(objective: Objective, rows: int, sequence_length: int, tensor: int = 1) -> int:
    """Of what one chip keeps of its rows from the forward pass for the backward pass.

    They are those of a model that has a chip's share of heads and neurons, on its share of rows:
    `tensor` cuts nothing else that is kept.

    Args:
      rows: of the chip.
    """
    whole = objective.decoder.shape
    shape = dataclasses.replace(
        whole,
        heads=whole.heads // tensor,
        kv_heads=whole.kv_heads // tensor,
        ffn_width=whole.ffn_width // tensor,
    )
    local = objective._replace(decoder=objective.decoder.clone(shape=shape))
    # What does not grow with the rows are weights in another type, cut as the weights are.
    twice, once = (_residuals(local, count, sequence_length) for count in (2 * rows, rows))
    return twice - once


def _residuals(objective: Objective, rows: int, sequence_length: int) -> int:
    """Bytes of all that comes out of a forward pass and goes into the backward pass, but for
    parameters and rows."""

    def saved(params: dict[str, Any], rows_bt: jax.Array) -> Any:
        return jax.vjp(lambda params: objective(params, rows_bt)[0].total, params)[1]

    rows_bt = jax.ShapeDtypeStruct((rows, sequence_length + 1), jnp.int32)
    jaxpr = jax.make_jaxpr(saved)(parameter_shapes(objective.decoder.shape), rows_bt).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {x for x in jaxpr.outvars if not isinstance(x, Literal) and x not in given}
    return sum(_bytes(x.aval) for x in kept)


def split(
    need: int, code: int, held: dict[str, Any], activations: int, where: Slice
) -> dict[str, int]:
    """Bytes a chip, by what they are; all but "capacity" add up to what is needed.

    Args:
      need: of the compiled program, in all.
      code: of its instructions.
      held: arrays that are there from step to step, by name.
      activations: what is kept for the backward pass, of which the compiler may do without some.
    """
    parts = {name: shard_bytes(tree) for name, tree in held.items()}
    rest = need - code - sum(parts.values())
    activations = min(activations, rest)
    return {
        "capacity": where.chip.memory,
        **parts,
        "activations": activations,
        "temporaries": rest - activations,
        "code": code,
    }


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize
