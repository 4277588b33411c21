"""What can be dropped from a model, told by the logical axes of its parameters.

A structure is an index on one of the axes `embed` (a residual channel, the same in all layers),
`kv_heads`, `heads`, `ffn` (a neuron) or `bottleneck` (of the augmented shortcut); or a layer.
All parameters that have the axis belong to it, what it reads with and what it writes with.

Axes: l layer, d width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pangu_tiny.model.decoder import PARAMETER_AXES
from pangu_tiny.model.shape import ModelShape

STRUCTURES = ("embed", "kv_heads", "heads", "ffn", "bottleneck")

OUTSIDE = "embed_outside"
"""Residual channels, in embedding, final norm and head."""

_WRITERS = {"attention/out": "heads", "ffn/down": "ffn", "shortcut/up": "bottleneck"}
"""What writes to the residual stream → the structures that it is summed over."""


def sizes(shape: ModelShape) -> dict[str, int]:
    """How many structures of each kind a layer has."""
    return {
        "embed": shape.width,
        "kv_heads": shape.kv_heads,
        "heads": shape.heads,
        "ffn": shape.ffn_width,
        "bottleneck": shape.bottleneck,
    }


def sum_by_structure(values: dict[str, Any]) -> dict[str, jax.Array]:
    """Adds up a value for every weight of a parameter tree, over all that belong to a structure:
    float32, by kind, [l, structures] over the blocks, and `OUTSIDE` [d]."""
    totals: dict[str, Any] = {}
    for name, leaf in flatten_dict(values, sep="/").items():
        axes = PARAMETER_AXES[name]
        for kind in STRUCTURES:
            if kind not in axes:
                continue
            kept = {axes.index(kind)} | ({0} if axes[0] == "layer" else set())
            others = tuple(axis for axis in range(leaf.ndim) if axis not in kept)
            total = jnp.sum(leaf, axis=others, dtype=jnp.float32)
            place = kind if axes[0] == "layer" else OUTSIDE
            totals[place] = totals.get(place, 0.0) + total
    return totals


def with_groups(scores: dict[str, Any]) -> dict[str, Any]:
    """Adds to every key-value head what its query heads have: they stay or go together."""
    heads = scores["heads"]
    groups = heads.reshape(*scores["kv_heads"].shape, -1)
    return {**scores, "kv_heads": scores["kv_heads"] + groups.sum(axis=-1)}


def apply_masks(params: dict[str, Any], masks: dict[str, Any]) -> dict[str, Any]:
    """A model with structures silenced, as a parameter tree of the same shape.

    With 0/1 masks it equals the model with those structures removed: a masked norm takes its mean
    over the channels that are kept. (To the letter if its ε is that of `masked_shape`.)

    Args:
      masks: float, 0 (gone) to 1 (there), by kind: "layer" [l], "embed" [d], the others
        [l, structures]; a kind that is absent is all there. Key-value heads go with their query
        heads and have no mask of their own.
    """
    flat = dict(flatten_dict(params, sep="/"))

    def scale(name: str, factor: jax.Array, axis: str) -> None:
        if name in flat:
            axes = PARAMETER_AXES[name]
            over = [axes.index(axis)] if factor.ndim == 1 else [0, axes.index(axis)]
            flat[name] = flat[name] * jnp.expand_dims(
                factor, [axis for axis in range(len(axes)) if axis not in over]
            )

    for name, kind in _WRITERS.items():
        if "layer" in masks:
            scale(f"blocks/{name}", masks["layer"], "layer")
        if kind in masks:
            scale(f"blocks/{name}", masks[kind], kind)
        if "embed" in masks:
            scale(f"blocks/{name}", masks["embed"], "embed")
    if "embed" in masks:
        mask_d = masks["embed"]
        scale("embedding/table", mask_d, "embed")
        kept = jnp.sqrt(jnp.sum(mask_d) / mask_d.size)
        for name in ("blocks/attention_norm/scale", "blocks/ffn_norm/scale", "final_norm/scale"):
            flat[name] = flat[name] * kept
    return unflatten_dict(flat, sep="/")


def masked_shape(shape: ModelShape, width: int) -> ModelShape:
    """The shape that a model masked to `width` channels is run with. Its norms divide by the
    square root of a mean over all channels plus ε; over those kept the mean is width / d of it."""
    return dataclasses.replace(shape, norm_eps=shape.norm_eps * width / shape.width)


def select_layers(params: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The parameters of a model of these layers only."""
    blocks = jax.tree.map(lambda leaf: leaf[np.asarray(layers)], params["blocks"])
    return {**params, "blocks": blocks}
