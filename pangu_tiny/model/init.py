"""The random initialisations of the paper (P1, section on parameter initialisation).

Every matrix is drawn from N(0, STD²); the schemes differ only in how they scale the two matrices
of a block that write to the residual stream, `attention/out` and `ffn/down`:

  constant    not at all: one standard deviation everywhere, which the paper recommends.
  gpt2        by 1/√(2·depth) in every block.
  internevo   by 1/√(2·(layer + 1)), layer = 0, 1, …, the default of the paper's framework.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pangu_tiny.errors import check_one_of

STD = 0.02
"""Not stated in the paper: chosen because it is the default of the framework that it used."""

SERIES_STD = 0.01
"""Spread of aᵢ, i ≥ 2. Not stated in the paper: small, so that training starts near the plain
activation, and random, since equal terms get equal gradients and would never separate."""

SCHEMES = ("constant", "gpt2", "internevo")
_RESIDUAL_OUTPUTS = (("attention", "out"), ("ffn", "down"))


def matrix_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return STD * jax.random.normal(key, shape, dtype)


def series_scale_init(
    key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32
) -> jax.Array:
    """a₁ = 1; the others random, different per term and channel. Shape [terms, ffn_width]."""
    return (SERIES_STD * jax.random.normal(key, shape, dtype)).at[0].set(1.0)


def apply_scheme(params: dict[str, Any], scheme: str) -> dict[str, Any]:
    """Scales freshly drawn parameters (constant) to `scheme`; blocks are stacked on axis 0."""
    check_one_of("init", scheme, SCHEMES)
    if scheme == "constant":
        return params
    blocks = {name: dict(part) for name, part in params["blocks"].items()}
    for part, name in _RESIDUAL_OUTPUTS:
        leaf = blocks[part][name]
        depth = leaf.shape[0]
        layer = jnp.arange(1, depth + 1, dtype=leaf.dtype) if scheme == "internevo" else depth
        factor = jnp.broadcast_to(1.0 / jnp.sqrt(2.0 * layer), (depth,))
        blocks[part][name] = leaf * factor.reshape(depth, *([1] * (leaf.ndim - 1)))
    return {**params, "blocks": blocks}
