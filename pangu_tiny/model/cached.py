"""The decoder with a cache of earlier positions, layer by layer.

A program that reads all parameters for every token must not copy them first, as taking a layer out
of stacked parameters does; so they are taken apart once, and every layer is compiled on its own.

Axes: b batch, t position, d width.
"""

from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from pangu_tiny.model.attention import Cache
from pangu_tiny.model.decoder import Block, Decoder, Embedding
from pangu_tiny.model.layers import RMSNorm, rope_tables
from pangu_tiny.topology.mesh import constrain


def by_layer(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters whose blocks are a list, a tree of each layer. Where nobody else holds the given
    ones, no more than one of them is in memory twice at any time."""
    params = dict(params)
    stacked = flatten_dict(params.pop("blocks"))
    taken: dict[Any, list[jax.Array]] = {}
    while stacked:
        name, leaf = stacked.popitem()
        taken[name] = _taken_apart(leaf)
        del leaf
    layers = zip(*taken.values(), strict=True)
    blocks = [unflatten_dict(dict(zip(taken, layer, strict=True))) for layer in layers]
    return {**params, "blocks": blocks}


@jax.jit
def _taken_apart(stacked: jax.Array) -> list[jax.Array]:
    return [stacked[i] for i in range(len(stacked))]


def extend(
    decoder: Decoder, params: dict[str, Any], tokens_bt: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs the blocks on what follows the positions in a cache, and adds it to them.

    Args:
      params: of `by_layer`.
      tokens_bt: int32 ids below vocab_size.

    Returns:
      Hidden states [b, t, d] in the dtype of the decoder, and the longer cache.
    """
    shape = decoder.shape
    t = tokens_bt.shape[1]
    seen_bts = cache.seen(t)
    rope = rope_tables(cache.places(t), shape.head_dim, shape.rope_theta)
    apply: Any = Embedding(shape, decoder.dtype).apply
    x_btd = constrain(apply({"params": params["embedding"]}, tokens_bt), "batch", None, None)
    apply, layers = Block(shape, decoder.attention).apply, []
    for layer, cached in zip(params["blocks"], cache.layers, strict=True):
        where = (cached, cache.length, seen_bts)
        x_btd, longer = apply({"params": layer}, x_btd, None, rope, where)
        layers.append(longer)
    apply = RMSNorm(shape.norm_eps).apply
    x_btd = apply({"params": params["final_norm"]}, x_btd)
    return x_btd, cache._replace(layers=tuple(layers), length=cache.length + t)
