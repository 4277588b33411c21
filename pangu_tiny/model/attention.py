"""Grouped-query attention with rotary positions, with or without a cache of earlier ones.

Axes: b batch, t position, s cached position, d width, h heads, n key-value heads, k head_dim,
f h · k.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pangu_tiny.model.init import matrix_init
from pangu_tiny.model.kernels import attention, masked_attention
from pangu_tiny.model.layers import apply_rope, gram, mean_size, record, tensordot
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.topology.mesh import constrain

CACHE_AXES = ("layer", "batch", None, "kv_heads", None)
"""Of keys and of values, the logical axes that are laid on the mesh."""


class Cache(NamedTuple):
    """Keys and values of earlier positions, float [layer, b, s, n, k] each, and how many there
    are (int32 scalar); positions from `length` on are still free. Those before `begins` (int32 [b])
    are padding, so that sequences of several lengths end at the same position."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    begins: jax.Array


def empty_cache(
    shape: ModelShape,
    batch: int,
    capacity: int,
    dtype: Any = jnp.float32,
    begins: jax.Array | None = None,
) -> Cache:
    """A cache for `capacity` positions of `batch` sequences, which begin at 0 or at `begins`."""
    size = (shape.depth, batch, capacity, shape.kv_heads, shape.head_dim)
    keys, values = (constrain(jnp.zeros(size, dtype), *CACHE_AXES) for _ in range(2))
    begins = jnp.zeros(batch, jnp.int32) if begins is None else begins
    return Cache(keys, values, jnp.zeros((), jnp.int32), begins)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Recorded: `size`, the mean length of what each head puts out; among "grams", `gram` of what all
    of them put out, head after head.
    """

    shape: ModelShape
    backend: str

    @nn.compact
    def __call__(self, x_btd, segments_bt, rope, cache):
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
    """Appends the new keys and values to one layer's cache and attends to all that is in it."""
    keys_bsnk, values_bsnk, (length, begins_b) = cache
    start = (0, length, 0, 0)
    keys_bsnk, values_bsnk = (
        constrain(jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start), *CACHE_AXES[1:])
        for old, new in ((keys_bsnk, k_btnk), (values_bsnk, v_btnk))
    )
    positions_t = length + jnp.arange(q_bthk.shape[1])
    s = jnp.arange(keys_bsnk.shape[1])
    mask_bts = (s <= positions_t[:, None]) & (s >= begins_b[:, None, None])
    mixed_bthk = masked_attention(q_bthk, keys_bsnk, values_bsnk, mask_bts)
    return mixed_bthk, (keys_bsnk, values_bsnk)
