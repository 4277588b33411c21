"""Shapes for tests: those of the shipped gin files, and one that is small and has everything."""

import functools
from typing import Any

import jax
import numpy as np

from pangu_tiny import config
from pangu_tiny.model.decoder import init_params, parameter_shapes
from pangu_tiny.model.shape import ModelShape

MODEL_FILES = sorted(path.name for path in (config.shipped_files() / "models").glob("*.gin"))

TINY = ModelShape(
    depth=3,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=6,
    ffn_width=48,
    vocab_size=100,
    series_terms=2,
    shortcut_ratio=8,
)
"""Grouped queries, heads that do not add up to the width, padded vocabulary, both modules."""


def read_shape(file_name: str) -> ModelShape:
    """The shape that a file of gin/models binds."""
    return config.build(ModelShape, f"models/{file_name}")


@functools.cache
def draw_params(scheme: str = "constant", seed: int = 0) -> dict[str, Any]:
    """Fresh parameters of TINY; it takes seconds to compile, hence the cache."""
    return _draw(TINY, scheme, jax.random.key(seed))


_draw = jax.jit(init_params, static_argnums=(0, 1))


def random_params(shape: ModelShape) -> dict[str, Any]:
    """Parameters far from an initialisation, so that every leaf shows in the result: norms and
    series scales around 1, matrices that keep the size of what they multiply."""
    random = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = random.normal(size=leaf.shape) / np.sqrt(shape.width)
        return jax.numpy.asarray(x + 1 if "scale" in path[-1].key else x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(shape))
