"""Grouped-query attention with rotary positions, with or without a cache of earlier ones.

Axes: b batch, t position, s cached position, d width, h heads, n key-value heads, k head_dim,
f h · k, q the queries of a key-value head, t · h / n.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pangu_tiny.model.init import matrix_init
from pangu_tiny.model.kernels import attention
from pangu_tiny.model.layers import apply_rope, gram, mean_size, record, tensordot
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.topology.mesh import constrain

CACHE_AXES = ("batch", "kv_heads", None, None)
"""Of the keys and the values of a layer, the logical axes that are laid on the mesh."""


class Packing(NamedTuple):
    """What the positions of rows are, int32 [b, s] each, where a row holds several texts that may
    go on in several ways: which text, which of its ways (0 is what all have in common), and the
    place in the text."""

    text: jax.Array
    way: jax.Array
    place: jax.Array


class Cache(NamedTuple):
    """Keys and values of earlier positions, float [b, n, s, k] both, a pair for every layer, and
    how many there are (int32 scalar); positions from `length` on are still free. Those before
    `begins` (int32 [b]) are padding, so that sequences of several lengths end at the same
    position; a `packing` says instead what each position is. A batch of one has no axis b: XLA
    would take it away for the products, and copy all that is cached to do so."""

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    length: jax.Array
    begins: jax.Array
    packing: Packing | None = None

    def places(self, t: int) -> jax.Array:
        """Of the next positions in their texts, int32 [b, t]."""
        if self.packing is None:
            return jnp.maximum(self.length + jnp.arange(t) - self.begins[:, None], 0)
        return self._next(self.packing.place, t)

    def seen(self, t: int) -> jax.Array:
        """Which positions the next see, bool [b, t, s]."""
        s = jnp.arange(self.layers[0][0].shape[-2])
        earlier_ts = s <= self.length + jnp.arange(t)[:, None]
        if self.packing is None:
            return earlier_ts & (s >= self.begins[:, None, None])
        text_bs, way_bs, _ = self.packing
        text_bt, way_bt = self._next(text_bs, t), self._next(way_bs, t)
        same_bts = text_bs[:, None] == text_bt[:, :, None]
        own_bts = (way_bs[:, None] == 0) | (way_bs[:, None] == way_bt[:, :, None])
        return earlier_ts & same_bts & own_bts

    def _next(self, x_bs: jax.Array, t: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_bs, self.length, t, axis=1)


def empty_cache(
    shape: ModelShape,
    capacity: int,
    begins: jax.Array,
    dtype: Any,
    packing: Packing | None = None,
) -> Cache:
    """A cache for `capacity` positions of sequences that begin at `begins`, or are so packed."""
    size = (len(begins), shape.kv_heads, capacity, shape.head_dim)

    def empty() -> jax.Array:
        return _laid(jnp.zeros(size[1:] if len(begins) == 1 else size, dtype))

    layers = tuple((empty(), empty()) for _ in range(shape.depth))
    return Cache(layers, jnp.zeros((), jnp.int32), begins, packing)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Recorded: `size`, the mean length of what each head puts out; among "grams", `gram` of what all
    of them put out, head after head.
    """

    shape: ModelShape
    backend: str

    @nn.compact
    def __call__(self, x_btd, segments_bt, rope, cache=None):
        d, h, n, k = self.shape.width, self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        query_dhk = self.param("query", matrix_init, (d, h, k))
        key_dnk = self.param("key", matrix_init, (d, n, k))
        value_dnk = self.param("value", matrix_init, (d, n, k))
        out_hkd = self.param("out", matrix_init, (h, k, d))
        q_bthk = _project(x_btd, query_dhk, "heads")
        k_btnk, v_btnk = (_project(x_btd, kernel, "kv_heads") for kernel in (key_dnk, value_dnk))
        scaled_rope = tuple(k**-0.5 * table for table in rope)
        q_bthk, k_btnk = apply_rope(q_bthk, scaled_rope), apply_rope(k_btnk, rope)
        if cache is None:
            mixed_bthk = attention(q_bthk, k_btnk, v_btnk, segments_bt, self.backend)
        else:
            mixed_bthk, cache = _attend_cached(q_bthk, k_btnk, v_btnk, cache)
        record(self, "size", lambda: mean_size(_length(mixed_bthk)))
        record(self, "gram", lambda: gram(mixed_bthk.reshape(*x_btd.shape[:2], h * k)), "grams")
        return tensordot(mixed_bthk, out_hkd, ("heads", None, "embed")), cache


def _project(x_btd, kernel_dhk, heads):
    projected_bthk = tensordot(x_btd, kernel_dhk, ("embed", heads, None))
    return constrain(projected_bthk, "batch", None, heads, None)


def _length(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def _attend_cached(q_bthk, k_btnk, v_btnk, cache):
    """Appends the new keys and values to one layer's cache and attends to what is seen of it."""
    cached, length, seen_bts = cache
    keys, values = (
        _appended(old, new, length) for old, new in zip(cached, (k_btnk, v_btnk), strict=True)
    )
    (b, t, h, k), n = q_bthk.shape, keys.shape[-3]
    # As products of two matrices in each (b, n), what is cached never has to be turned.
    q_bntx = jnp.swapaxes(q_bthk.reshape(b, t, n, h // n * k), 1, 2)
    scores_bnqs = _product(q_bntx.reshape(b, n, -1, k), keys, -1, jnp.float32)
    seen_b1qs = jnp.repeat(seen_bts, h // n, axis=1)[:, None]
    scores_bnqs = jnp.where(seen_b1qs, scores_bnqs, jnp.finfo(jnp.float32).min)
    weights_bnqs = jax.nn.softmax(scores_bnqs, axis=-1).astype(q_bthk.dtype)
    mixed_bnqk = _product(weights_bnqs, values, -2)
    mixed_btnx = jnp.swapaxes(mixed_bnqk.reshape(b, n, t, h // n * k), 1, 2)
    return mixed_btnx.reshape(b, t, h, k), (keys, values)


def _product(x_bnqi: jax.Array, cached: jax.Array, summed: int, dtype: Any = None) -> jax.Array:
    """Of the queries, or of their weights, with what is cached, over one of its axes."""
    each = tuple(range(cached.ndim - 2))
    x = x_bnqi.reshape(*cached.shape[:-2], *x_bnqi.shape[-2:])
    axes = (((x.ndim - 1,), (cached.ndim + summed,)), (each, each))
    product = jax.lax.dot_general(x, cached, axes, preferred_element_type=dtype)
    return product.reshape(*x_bnqi.shape[:-1], product.shape[-1])


def _appended(cached: jax.Array, new_btnk: jax.Array, length: jax.Array) -> jax.Array:
    new_bntk = jnp.swapaxes(new_btnk, 1, 2).astype(cached.dtype)
    new = new_bntk.reshape(*cached.shape[:-2], *new_bntk.shape[-2:])
    return _laid(jax.lax.dynamic_update_slice_in_dim(cached, new, length, axis=-2))


def _laid(cached: jax.Array) -> jax.Array:
    return constrain(cached, *CACHE_AXES[-cached.ndim :])
